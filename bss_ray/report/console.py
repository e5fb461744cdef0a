"""The output of a running command: a bar on a terminal, plain lines in a log, JSON lines for programs."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from bss_ray.runtime.messages import (
    BatchProgress,
    EpochFinished,
    FatalError,
    Message,
    Metrics,
    NodeProcesses,
    Notice,
    PlacementMap,
    RowsProgress,
    ShardsProgress,
    Status,
)
from bss_ray.storage import StoragePath

# Content of `result.json` or `summary.json`.
Result = Mapping[str, Any]

# Messages of progress, of which one in some seconds and the last are shown.
_PROGRESS_S = 10.0


class JsonLines:
    """Prints each message at once as a JSON object on its own line.

    Every line has `time` (UTC), `level`, `event`, `run`, `epoch`, `version`, `rank` (null where there is none) and
    `message`, or the figures of the event.

    Args:
        run: Name of the run, job or search.
        out: Stream to which lines are written; default standard output.
    """

    def __init__(self, run: str, out: TextIO | None = None) -> None:
        self._run = run
        self._out = out or sys.stdout
        self._told: dict[str, float] = {}  # time of the last progress of each kind

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, Exception):
            self._line("error", {"type": type(error).__name__, "message": str(error)}, level="ERROR")

    def say(self, text: str) -> None:
        """Show a message to the user."""
        self._line("notice", {"message": text})

    def status(self, text: str) -> None:
        """What is being done now."""
        self._line("status", {"message": text})

    def on_message(self, message: Message) -> None:
        """A message of the run, job or search."""
        match message:
            case FatalError():
                return  # it ends the command: see `__exit__`
            case BatchProgress(batch, batches):
                due = self._due(message, last=batch + 1 == batches)
            case ShardsProgress(done=done, of=of) | RowsProgress(done=done, of=of):
                due = self._due(message, last=done == of)
            case _:
                due = True
        if due:
            self._line(message.kind, message.figures())

    def show(self, result: Result, folder: object) -> None:
        """The end."""
        self._line("result", {**result, "folder": str(folder)})

    def _due(self, message: Message, *, last: bool) -> bool:
        now = time.monotonic()
        if not last and now - self._told.get(message.kind, -math.inf) < _PROGRESS_S:
            return False
        self._told[message.kind] = now
        return True

    def _line(self, event: str, figures: Mapping[str, object], level: str = "INFO") -> None:
        if str(figures.get("message", "")).startswith("Warning:"):
            level = "WARNING"
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        head = {"time": now, "level": level, "event": event, "run": self._run}
        place = {name: figures.get(name) for name in ("epoch", "version", "rank")}
        text = json.dumps(_plain({**head, **place, **figures}), default=str)
        print(text, file=self._out, flush=True)


def _plain(value: object) -> object:
    """JSON has no NaN, no infinity and no dataclasses."""
    if isinstance(value, NodeProcesses):
        value = vars(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_ORDER = ("ranks", "scorers", "holders", "coordinator", "controller")


def placement_table(message: PlacementMap) -> Table:
    """A row for each node, a column for each kind of process."""
    kinds = _kinds(message)
    table = Table("node", *(_with(kind, _amounts(message.each[kind])) for kind in kinds), "left")
    for row in message.rows:
        counts = (str(row.processes.get(kind, "")) for kind in kinds)
        table.add_row(row.node, *counts, _left(row.left))
    return table


def placement_lines(message: PlacementMap) -> list[str]:
    """A line for each node."""
    each = message.each
    lines = []
    for row in message.rows:
        here = [
            _with(
                kind if number == 1 and kind[-1] == "r" else f"{number} {_plural(kind, number)}", _amounts(each[kind])
            )
            for kind in _kinds(message)
            if (number := row.processes.get(kind))
        ]
        left = f"; left {_left(row.left)}" if row.left else ""
        lines.append(f"{row.node}: {', '.join(here) or 'nothing of this run'}{left}")
    return lines


def _kinds(message: PlacementMap) -> list[str]:
    return sorted(message.each, key=lambda kind: (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), kind))


def _plural(kind: str, number: int) -> str:
    return kind.removesuffix("s") if number == 1 else kind


def _with(kind: str, amounts: str) -> str:
    return f"{kind} ({amounts})" if amounts else kind


def _amounts(takes: Mapping[str, float]) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in takes.items())


def _left(left: Mapping[str, tuple[float, float]]) -> str:
    return ", ".join(f"{free:g} of {of:g} {name}" for name, (free, of) in left.items())


# Width of output that is not on a terminal, where nobody can make the window wider.
_PLAIN_WIDTH = 160

# Metrics that are shares and shown in per cent; metrics of a regression are plain numbers.
_SHARES = ("accuracy", "map", "f1")
# Metrics that the line of an epoch shows for each head; the first that exists is shown.
_PREFIXES = ("val_accuracy_", "val_r2_")


class Shown(Protocol):
    """The interface of displays."""

    def __enter__(self) -> Shown: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def status(self, text: str) -> None:
        """What is being done now."""
        ...

    def on_message(self, message: Message) -> None:
        """A message of the run, job or search."""
        ...

    def show(self, result: Result, folder: StoragePath) -> None:
        """The end."""
        ...


def open_display(log_format: str, run: str, for_people: Callable[[Console], Shown]) -> Shown:
    """The display of a command.

    Args:
        log_format: Format: `auto`, `rich`, `plain` or `json`.
        run: Name of the run, job or search.
        for_people: Function that makes the command's display for a terminal, or for a log that people read.
    """
    if log_format == "json":
        return JsonLines(run)
    # Not Rich's own guess: variables such as FORCE_COLOR would put control characters into a job's log.
    terminal = log_format == "rich" or (log_format == "auto" and sys.stdout.isatty())
    width = None if terminal else _PLAIN_WIDTH
    return for_people(Console(highlight=False, soft_wrap=True, force_terminal=terminal, width=width))


class Display:
    """Shows the messages of a run.

    On a terminal: a moving line with the current work and the progress of the epoch. Elsewhere (a job's
    log, a pipe): one line per stage and per epoch, without control characters.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=None)
        self._header: list[str] = []
        self._where: list[tuple[str, Mapping[str, int]]] = []
        self._started = time.monotonic()

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._progress.stop()

    def show(self, result: Result, folder: StoragePath) -> None:
        """The end of a run."""
        self.console.print(result_table(result, folder))

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def status(self, text: str) -> None:
        """What is being done now."""
        if self.console.is_terminal:
            self._progress.reset(self._task, description=text, total=None, start=True)
        else:
            self.say(f"[{time.monotonic() - self._started:5.1f} s] {text}")

    def on_message(self, message: Message) -> None:
        """A message of the run (see `BalancedTrainer`)."""
        match message:
            case Status(text) if self.console.is_terminal or text != "scoring":
                self.status(text)
            case Notice(text):
                self.say(text)
            case ShardsProgress(split, done, of) if self.console.is_terminal:
                self._progress.update(self._task, description=f"building shards ({split})", completed=done, total=of)
            case BatchProgress(batch, batches, epoch=epoch) if self.console.is_terminal:
                self._progress.update(self._task, description=f"epoch {epoch}", completed=batch + 1, total=batches)
            case EpochFinished(row):
                self._epoch(row)
            case PlacementMap():
                self._placement(message)

    def _placement(self, message: PlacementMap) -> None:
        """The placement of processes, shown again only if it has changed."""
        where = [(row.node, row.processes) for row in message.rows]
        if where == self._where:
            return
        self._where = where
        if self.console.is_terminal:
            self.console.print(placement_table(message))
        else:
            for line in placement_lines(message):
                self.say(line)

    def _epoch(self, row: Metrics) -> None:
        """A line per epoch, under a header that is shown once."""
        cells = epoch_cells(row)
        widths = [max(len(name), 7) for name in cells]
        if list(cells) != self._header:
            self._header = list(cells)
            self.say("  ".join(name.rjust(width) for name, width in zip(cells, widths, strict=True)))
        self.say("  ".join(text.rjust(width) for text, width in zip(cells.values(), widths, strict=True)))


def epoch_cells(row: Metrics) -> dict[str, str]:
    """Column name and text of each figure in the line of an epoch."""
    cells = {
        "epoch": str(row["epoch"]),
        "rows": str(row["rows"]),
        "eff. size": f"{row['effective_sample_size']:.0f}",
        "loss": f"{row['train_loss']:.4f}" if "train_loss" in row else "-",
    }
    for prefix in _PREFIXES:
        heads = [name.removeprefix(prefix) for name in row if name.startswith(prefix)]
        cells |= {_column_name(prefix, head): show(prefix + head, row[prefix + head]) for head in heads}
    cells |= {f"{name} s": f"{row[f'seconds_{name}']:.2f}" for name in ("scoring", "planning", "training")}
    return cells


def _column_name(prefix: str, head: str) -> str:
    """`val fused`, or `val r2 fused` if the metric is not accuracy."""
    split, metric, _ = prefix.split("_")
    return f"{split} {head}" if metric == "accuracy" else f"{split} {metric} {head}"


def is_share(metric: str) -> bool:
    """Whether a metric is a share, such as `val_accuracy_fused`."""
    parts = metric.split("_")
    return (parts[1] if len(parts) > 2 else metric) in _SHARES


def show(metric: str, value: float, *, unit: bool = True) -> str:
    """The value of a metric for people: `97.31%`, or `0.4711` if the metric is no share."""
    if not is_share(metric):
        return f"{value:.4g}"
    return f"{value:.2%}" if unit else f"{100 * value:.2f}"


def result_table(result: Result, folder: StoragePath) -> Table:
    """The end of a run: the metrics of the chosen epoch by head, and the paths of all files."""
    table = Table(title=f"epoch {result['chosen_epoch']}, chosen on validation", title_justify="left")
    figures = {**result["validation"], **result["test"]}
    names = [name.split("_", 2) for name in figures]
    columns = list(dict.fromkeys((split, metric) for split, metric, _ in names))
    table.add_column("head")
    for split, metric in columns:
        table.add_column(f"{split} {metric}", justify="right")
    for head in dict.fromkeys(head for _, _, head in names):
        cells = [f"{split}_{metric}_{head}" for split, metric in columns]
        table.add_row(head, *(show(cell, figures[cell]) if cell in figures else "-" for cell in cells))
    paths = ("config.yaml", "metrics.csv", "scores.parquet", "result.json", "report.html", "tensorboard")
    notes = [f"  {folder / name}" for name in paths if (folder / name).exists()]
    for name, area in result.get("score_roc_area", {}).items():
        notes.insert(0, f"balance score finds {name!r} rows: area under the ROC curve {area:.3f} (0.5 is chance)")
    table.caption = "\n".join(notes)
    table.caption_justify = "left"
    return table
