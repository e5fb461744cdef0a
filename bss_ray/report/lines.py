"""What a command says, as lines of JSON, for programs that read logs."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

# Messages of how far something is: one in so many seconds, and the last.
_PROGRESS = {"batch", "shards", "rows"}
_PROGRESS_S = 10.0

# What is no figure, or is in other lines as well.
_LEFT_OUT = ("kind", "row", "history", "text")


class JsonLines:
    """Prints each message as a JSON object on a line of its own, at once.

    Every line has `time` (UTC), `level`, `event`, `run`, `epoch`, `version`, `rank` (null where there is none) and
    `message`, or the figures of the event.

    Args:
        run: name of the run, job or search.
        out: where lines go; default standard output.
    """

    def __init__(self, run: str, out: TextIO | None = None) -> None:
        self._run = run
        self._out = out or sys.stdout
        self._told: dict[str, float] = {}  # when progress of each kind was told last

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, Exception):
            self._line("error", {"type": type(error).__name__, "message": str(error)}, level="ERROR")

    def say(self, text: str) -> None:
        """Something that the user should read."""
        self._line("notice", {"message": text})

    def status(self, text: str) -> None:
        """What is being done now."""
        self._line("status", {"message": text})

    def on_message(self, message: Mapping[str, Any]) -> None:
        """A message of the run, job or search."""
        kind = message["kind"]
        if kind == "fatal" or (kind in _PROGRESS and not self._due(kind, message)):
            return  # a fatal error ends the command: see `__exit__`
        figures = {name: value for name, value in message.items() if name not in _LEFT_OUT}
        figures |= message.get("row", {})
        if "text" in message:
            figures["message"] = message["text"]
        self._line(kind, figures)

    def show(self, result: Mapping[str, Any], folder: object) -> None:
        """The end."""
        self._line("result", {**result, "folder": str(folder)})

    def _due(self, kind: str, message: Mapping[str, Any]) -> bool:
        last = message.get("done", message.get("batch", 0) + 1) == message.get("of", message.get("batches"))
        now = time.monotonic()
        if not last and now - self._told.get(kind, -math.inf) < _PROGRESS_S:
            return False
        self._told[kind] = now
        return True

    def _line(self, event: str, figures: Mapping[str, Any], level: str = "INFO") -> None:
        if str(figures.get("message", "")).startswith("Warning:"):
            level = "WARNING"
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        head = {"time": now, "level": level, "event": event, "run": self._run}
        place = {name: figures.get(name) for name in ("epoch", "version", "rank")}
        text = json.dumps(_plain({**head, **place, **figures}), default=str)
        print(text, file=self._out, flush=True)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
