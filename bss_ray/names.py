"""Fixed names that data, models and measures agree on, so that none of them has to know the others."""

from __future__ import annotations

import importlib
from typing import Any

from bss_ray.errors import ConfigError, nearest

# What a model returns beside the logits of each modality: the fused logits, and (optional) the inputs of the heads.
FUSED = "fused"
FEATURES = "features"

# Beginnings of the names of an epoch's figures that the clock makes: all others are the same in a run that is repeated.
CLOCKED = ("seconds_", "loader_stall_share", "scoring_rows_per_second")


def presence_column(modality: str) -> str:
    """Boolean column (rows,) of a batch: does the row have this modality? Only where some row has not."""
    return f"has_{modality}"


def loss_column(modality: str) -> str:
    """Column (rows,) of score files: loss of this modality's own head."""
    return f"loss_{modality}"


def import_name(path: str) -> Any:
    """The object at `package.module.name` (or `package.module:name`).

    Raises:
        ConfigError: no such module or name (with the nearest).
    """
    module_name, _, name = path.replace(":", ".").rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"cannot import {path!r}: {error}. Write package.module:name") from error
    except Exception as error:  # the module's own code
        raise ConfigError(f"cannot import {path!r}: the module fails with {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ConfigError(f"module {module_name} has no {name!r}; {nearest(name, dir(module))}")
    return getattr(module, name)
