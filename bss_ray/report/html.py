"""`report.html`: the figures of a run in one file that needs no network."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from bss_ray.errors import optional_import
from bss_ray.storage import StoragePath

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Most rows of a histogram, so that the file stays small for any number of rows.
_SAMPLE_ROWS = 200_000

_STYLE = (
    "body{font-family:sans-serif;max-width:960px;margin:2em auto;color:#222}"
    "table{border-collapse:collapse;margin:1em 0 2em}caption{text-align:left;font-weight:bold;padding:.3em 0}"
    "td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd}"
    ".scroll{overflow-x:auto}.scroll td,.scroll th{white-space:nowrap}li{margin:.4em 0;white-space:pre-line}"
)


def write_report(folder: StoragePath) -> StoragePath:
    """Draw the run in `folder` from its metrics and scores.

    Returns:
        Path of `report.html`.

    Raises:
        MissingDependencyError: Plotly is not installed.
    """
    go = optional_import("plotly.graph_objects", extra="report", needed_for="report.html")
    figures = [
        _validation_figure(go, folder),
        _figure(go, "Training measures", _series(folder, "train_"), "epoch", "mean over the rows seen"),
        _figure(go, "Rows and effective sample size", _sizes(folder), "epoch", "rows"),
        _figure(go, "Seconds of an epoch", _series(folder, "seconds_"), "epoch", "seconds"),
    ]
    if (folder / "scores.parquet").exists():
        figures.insert(1, _scores_figure(go, folder / "scores.parquet"))
    return write_page(folder, "Run", figures)


def write_page(folder: StoragePath, kind: str, parts: Iterable[Figure | str]) -> StoragePath:
    """Write `report.html`, a page headed `kind` and the folder's name.

    Args:
        folder: Folder of the page.
        kind: Kind of the folder.
        parts: Figures, and text that is HTML already.

    Returns:
        Path of `report.html`.
    """
    pieces = []
    script = True  # plotly's code, 5 MB, is in the first figure only
    for part in parts:
        if not isinstance(part, str):
            part = part.to_html(full_html=False, include_plotlyjs=script, default_height="380px")
            script = False
        pieces.append(part)
    title = html.escape(folder.name)
    path = folder / "report.html"
    path.write_text(
        f"<!doctype html><meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{kind} {title}</h1>" + "\n".join(pieces)
    )
    return path


def _validation_figure(go: ModuleType, folder: StoragePath) -> Figure:
    """Accuracy by head; R² if labels are numbers."""
    numbers = _series(folder, "val_r2_")
    name, series = ("R²", numbers) if numbers else ("accuracy", _series(folder, "val_accuracy_"))
    return _figure(go, f"Validation {name} by head", series, "epoch", name)


def _history(folder: StoragePath) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "metrics.csv").read_text(), newline="")))


def _series(folder: StoragePath, prefix: str) -> dict[str, tuple[list[int], list[float]]]:
    """Columns of the metrics that start with `prefix`: name -> (epochs from 1, values)."""
    rows = _history(folder)
    names = [name for name in rows[0] if name.startswith(prefix)]
    return {name.removeprefix(prefix): _column(rows, name) for name in names}


def _sizes(folder: StoragePath) -> dict[str, tuple[list[int], list[float]]]:
    rows = _history(folder)
    return {name.replace("_", " "): _column(rows, name) for name in ("rows", "eligible_rows", "effective_sample_size")}


def _column(rows: list[dict[str, str]], name: str) -> tuple[list[int], list[float]]:
    kept = [row for row in rows if row.get(name)]
    return [int(row["epoch"]) for row in kept], [float(row[name]) for row in kept]


def _figure(go: ModuleType, title: str, series: dict[str, tuple[list[int], list[float]]], x: str, y: str) -> Figure:
    figure = go.Figure()
    for name, (epochs, values) in series.items():
        figure.add_scatter(x=epochs, y=values, name=name, mode="lines+markers")
    return label_axes(figure, title, x, y)


def label_axes(figure: Figure, title: str, x: str, y: str) -> Figure:
    """Give a figure its title and the names of its axes, which are plain text."""
    return figure.update_layout(
        title=html.escape(title), xaxis_title=html.escape(x), yaxis_title=html.escape(y), template="plotly_white"
    )


def _scores_figure(go: ModuleType, path: StoragePath) -> Figure:
    """Histogram of the final scores, separated by a boolean extra column if there is one."""
    table = path.read_table()
    if len(table) > _SAMPLE_ROWS:
        table = table.take(np.linspace(0, len(table) - 1, _SAMPLE_ROWS).astype(np.int64))
    score = table["score"].to_numpy()
    truth = next((name for name in table.column_names if pa.types.is_boolean(table.schema.field(name).type)), None)
    groups = {"all rows": np.ones(len(score), dtype=bool)}
    if truth is not None:
        flag = table[truth].to_numpy().astype(bool)
        groups = {f"not {truth}": ~flag, truth: flag}
    figure = go.Figure()
    for name, rows in groups.items():
        figure.add_histogram(x=score[rows], name=name, opacity=0.6, xbins={"start": -1, "end": 1, "size": 0.04})
    figure.update_layout(barmode="overlay")
    return label_axes(figure, "Final balance scores", "balance score", "rows")
