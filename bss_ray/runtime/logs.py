"""How a run speaks: the format of what a command prints, and the logger of the run's processes."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any, Literal, get_args

from bss_ray.errors import check_one_of

# `auto`: rich on a terminal, plain elsewhere.
LogFormat = Literal["auto", "rich", "plain", "json"]


def check_log_format(value: str) -> None:
    """Refuse a format that does not exist.

    Raises:
        ConfigError: names the nearest.
    """
    check_one_of("log_format", value, get_args(LogFormat))


def ray_logging(log_format: str) -> dict[str, Any]:
    """Arguments of `ray.init`: with `json` all processes of the job write JSON lines, with Ray's ids."""
    if log_format != "json":
        return {}
    import ray  # after --help: it takes a second

    return {"logging_config": ray.LoggingConfig(encoding="JSON", log_level="INFO")}


class RunLogger(logging.LoggerAdapter[logging.Logger]):
    """The logger `bss_ray` in a process of a run. Its records say where they come from: `epoch`, `version`, `rank`.

    Whoever formats them decides what becomes of those: Ray's JSON lines hold all of them.

    Args:
        **place: their values, None where there is none, and other attributes such as `run`.
    """

    def __init__(self, **place: Any) -> None:
        super().__init__(logging.getLogger("bss_ray"), {"epoch": None, "version": None, "rank": None, **place})

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, {**kwargs, "extra": {**(self.extra or {}), **kwargs.get("extra", {})}}

    def at(self, **place: Any) -> RunLogger:
        """The same logger with more, or other, attributes: `epoch` and `version`."""
        return RunLogger(**{**(self.extra or {}), **place})
