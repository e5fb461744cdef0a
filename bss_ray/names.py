"""Fixed names that data, models and measures share, so that these folders need not know each other."""

from __future__ import annotations

import importlib
from typing import Any

from bss_ray.errors import ConfigError, nearest

# Outputs of a model in addition to the logits of each modality: fused logits, and (optional) the inputs of the heads.
FUSED = "fused"
FEATURES = "features"

# Prefixes of the names of an epoch's figures that depend on the clock: a repeated run has all other figures again.
CLOCKED = ("seconds_", "loader_stall_share", "scoring_rows_per_second")

# Settings of commands that name files. Their paths are absolute in a run's config.yaml; earlier versions wrote them as
# they were given.
PLACES = frozenset({"data", "validation", "test", "initial_scores", "initial_checkpoint", "checkpoint"})


def presence_column(modality: str) -> str:
    """Boolean column (rows,) of a batch: does the row have this modality? It exists only if some row lacks it."""
    return f"has_{modality}"


def loss_column(modality: str) -> str:
    """Column (rows,) of score files: loss of the head of this modality."""
    return f"loss_{modality}"


def import_name(path: str) -> Any:
    """The object at `package.module.name` (or `package.module:name`).

    Raises:
        ConfigError: The module or name does not exist; the error has the nearest name.
    """
    module_name, _, name = path.replace(":", ".").rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"cannot import {path!r}: {error}. Write package.module:name") from error
    except Exception as error:  # from the module's own code
        raise ConfigError(f"cannot import {path!r}: the module fails with {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ConfigError(f"module {module_name} has no {name!r}; {nearest(name, dir(module))}")
    return getattr(module, name)
