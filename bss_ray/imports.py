"""Names that users write: `package.module.name` or `package.module:name`."""

from __future__ import annotations

import importlib
from typing import Any

from bss_ray.errors import ConfigError, nearest


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
