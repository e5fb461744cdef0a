"""Output of a scoring job: progress, tables, and `report.html`."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bss_ray.errors import optional_import
from bss_ray.report.console import Display, Result
from bss_ray.report.html import label_axes, write_page
from bss_ray.runtime.messages import Message, RowsProgress
from bss_ray.storage import StoragePath

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Seconds between two lines of progress in a log.
_LINE_S = 10.0

# Most classes that a table on the terminal shows; they have the lowest mean scores.
_SHOWN_CLASSES = 12

_BARS = " ▁▂▃▄▅▆▇█"

Rows = Sequence[Result]


class ScoreDisplay(Display):
    """Shows the messages of a scoring job: on a terminal a bar of rows, elsewhere a line every ten seconds."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._last_line = time.monotonic()

    def show(self, result: Result, folder: StoragePath) -> None:
        """The end of a job."""
        print_summary(self.console, result, folder)

    def on_message(self, message: Message) -> None:
        """A message of the job (see `bss_ray.score.job.score`)."""
        if not isinstance(message, RowsProgress):
            super().on_message(message)
            return
        text = progress_text(message.done, message.of, message.rows_per_second)
        if self.console.is_terminal:
            self._progress.update(self._task, description=text, completed=message.done, total=message.of)
        elif time.monotonic() - self._last_line >= _LINE_S or message.done == message.of:
            self._last_line = time.monotonic()
            self.status(f"{message.done} of {message.of} rows, {text}")


def progress_text(done: int, rows: int, speed: float) -> str:
    """`measuring, 1,234 rows/s, 12 s left`."""
    seconds = round((rows - done) / speed) if speed else 0
    left = f"{seconds // 3600} h {seconds % 3600 // 60} min" if seconds >= 3600 else _minutes(seconds)
    return f"measuring, {speed:,.0f} rows/s, {left} left"


def _minutes(seconds: int) -> str:
    return f"{seconds // 60} min {seconds % 60} s" if seconds >= 60 else f"{seconds} s"


# ---- terminal -------------------------------------------------------------------------------------


def print_summary(console: Console, summary: Result, folder: StoragePath) -> None:
    """The end of a job: all rows, modalities, classes, lowest and highest rows, and the paths of all files."""
    console.print(_all_rows(summary))
    for title, rows in _tables(summary, _SHOWN_CLASSES):
        console.print(_table(title, rows))
    names = ("scores.parquet", "summary.json", "report.html", "config.yaml")
    for name in names:
        if (folder / name).exists():
            console.print(f"  {folder / name}", markup=False)


def _all_rows(summary: Result) -> Table:
    table = Table(title="scores", title_justify="left", show_header=False)
    speed = summary["rows_per_second"]
    measured = f" ({speed:,.0f} rows/s)" if speed else ""
    table.add_row("rows", f"{summary['rows']:,}{measured}")
    for name in ("similarity", "information", "score"):
        table.add_row(f"mean {name}", _text(summary[name]))
    table.add_row("score, -1 to 1", f"|{sparkline(summary['histogram']['rows'])}|")
    for name, area in summary["score_roc_area"].items():
        table.add_row(f"finds {name!r} rows", f"area under the ROC curve {area:.3f} (0.5 is chance)")
    for name in ("unpaired_rows", "bad_rows"):
        if summary[name]:
            table.add_row(name.replace("_", " "), f"{summary[name]:,}")
    return table


def sparkline(counts: Sequence[int]) -> str:
    """A histogram in one line of text; every bin that is not empty is visible."""
    most = max([*counts, 1])
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // most)] for count in counts)


def _tables(summary: Result, classes: int | None) -> Iterable[tuple[str, Rows]]:
    """Title and rows of each table that has rows."""
    lowest = sorted(summary["classes"], key=lambda row: (row["score"] is None, row["score"], row["label"]))
    shown = lowest if classes is None else lowest[:classes]
    more = f" (the {len(shown)} of {len(lowest)} with the lowest mean score)" if len(shown) < len(lowest) else ""
    tables = {
        "modalities: a row's weaker one has the larger loss": summary["modalities"],
        f"classes{more}": shown,
        "rows of lowest score": summary["lowest"],
        "rows of highest score": summary["highest"],
    }
    return [(title, rows) for title, rows in tables.items() if rows]


def _table(title: str, rows: Rows) -> Table:
    table = Table(title=title, title_justify="left")
    for name in rows[0]:
        table.add_column(_heading(name), justify="right")
    for row in rows:
        table.add_row(*(_text(value, share=name.endswith("_share")) for name, value in row.items()))
    return table


def _heading(name: str) -> str:
    return name if name == "row_id" else name.removesuffix("_share").replace("_", " ")


def _text(value: object, *, share: bool = False) -> str:
    """A cell."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.1%}" if share else f"{value:.4f}"
    return f"{value}"


# ---- HTML -----------------------------------------------------------------------------------------


def write_scores_report(folder: StoragePath, summary: Result) -> StoragePath:
    """Draw the summary of a job in one file that needs no network.

    Returns:
        Path of `report.html`.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    go = optional_import("plotly.graph_objects", extra="report", needed_for="report.html")
    figures = [_histogram(go, summary), *_bars_of_classes(go, summary["classes"])]
    tables = [_html_table(title, rows) for title, rows in _tables(summary, None)]
    return write_page(folder, "Scores", [_facts(summary), *figures, *tables])


def _facts(summary: Result) -> str:
    """What was scored, in one or two sentences."""
    what = (
        f"{summary['rows']:,} {summary['split']} rows of {summary['data']}, with the weights of {summary['checkpoint']}"
    )
    counts = [f"{summary[name]:,} {name.replace('_', ' ')}" for name in ("unpaired_rows", "bad_rows") if summary[name]]
    return f"<p>{html.escape(what)}.{' ' + html.escape(', '.join(counts)) + '.' if counts else ''}</p>"


def _histogram(go: ModuleType, summary: Result) -> Figure:
    found = summary["histogram"]
    width = (found["high"] - found["low"]) / len(found["rows"])
    middles = [found["low"] + width * (place + 0.5) for place in range(len(found["rows"]))]
    figure = go.Figure(go.Bar(x=middles, y=found["rows"], width=width, name="rows"))
    return label_axes(figure, "Balance scores", "score", "rows")


def _bars_of_classes(go: ModuleType, classes: Rows) -> list[Figure]:
    """Mean measures of the classes, if there are classes."""
    if not classes:
        return []
    figure = go.Figure()
    for name in ("score", "similarity"):
        figure.add_bar(x=[str(row["label"]) for row in classes], y=[row[name] for row in classes], name=name)
    figure.update_xaxes(type="category")
    return [label_axes(figure, "Means by class", "class", "mean")]


def _html_table(title: str, rows: Rows) -> str:
    head = "".join(f"<th>{html.escape(_heading(name))}</th>" for name in rows[0])
    body = "".join(
        "<tr>"
        + "".join(f"<td>{html.escape(_text(value, share=name.endswith('_share')))}</td>" for name, value in row.items())
        + "</tr>"
        for row in rows
    )
    return f"<table><caption>{html.escape(title)}</caption><tr>{head}</tr>{body}</table>"
