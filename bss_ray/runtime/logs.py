"""What each command is told, the format of what it prints, and the logger of a run's processes."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bss_ray.errors import check_one_of

# `auto`: rich on a terminal, plain elsewhere.
LogFormat = Literal["auto", "rich", "plain", "json"]


@dataclass(frozen=True, kw_only=True)
class CommandConfig:
    """Settings of each command that starts Ray.

    Args:
        storage_path: Folder of all runs, on a file system that all nodes share, or a URI such as s3://bucket/runs.
        ray_address: Address of a running cluster; null starts Ray on this machine, or takes RAY_ADDRESS.
        log_format: Format of the output: `rich` (colours and a moving line), `plain` (lines), `json` (a JSON object per
            line); `auto` is rich on a terminal and plain elsewhere.
        verbose: Whether Ray's own output is shown.

    Raises:
        ConfigError: The log format does not exist; the message names the nearest format.
    """

    storage_path: str = "runs"
    ray_address: str | None = None
    log_format: LogFormat = "auto"
    verbose: bool = False

    def __post_init__(self) -> None:
        check_one_of("log_format", self.log_format, get_args(LogFormat))


def ray_logging(log_format: str) -> dict[str, object]:
    """Arguments of `ray.init`: with `json` all processes of the job write JSON lines, with Ray's ids."""
    if log_format != "json":
        return {}
    import ray  # imported after --help, because it takes a second

    return {"logging_config": ray.LoggingConfig(encoding="JSON", log_level="INFO")}


class RunLogger(logging.LoggerAdapter[logging.Logger]):
    """The logger `bss_ray` in a process of a run. Its records say where they come from: `epoch`, `version`, `rank`.

    The formatter of a log decides which of these it shows; Ray's JSON lines hold all of them.

    Args:
        **place: Values of these attributes, None if there is no value, and other attributes such as `run`.
    """

    def __init__(self, **place: object) -> None:
        super().__init__(logging.getLogger("bss_ray"), {"epoch": None, "version": None, "rank": None, **place})

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, {**kwargs, "extra": {**(self.extra or {}), **kwargs.get("extra", {})}}

    def at(self, **place: object) -> RunLogger:
        """The same logger with more, or other, attributes: `epoch` and `version`."""
        return RunLogger(**{**(self.extra or {}), **place})


class Named:
    """An actor that Ray's logs and `ray list actors` show by its name."""

    def __repr__(self) -> str:
        import ray

        return ray.get_runtime_context().get_actor_name() or type(self).__name__
