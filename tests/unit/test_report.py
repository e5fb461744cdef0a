"""What people look at, by the kind of labels."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bss_ray.report.console import epoch_cells, result_table
from bss_ray.report.html import write_report
from bss_ray.storage import StoragePath

ROW = {"epoch": 3, "rows": 10, "effective_sample_size": 8.2, "seconds_scoring": 1, "seconds_planning": 0}


def row(**metrics: float) -> dict[str, Any]:
    return {**ROW, "seconds_training": 2, **metrics}


def test_an_epoch_shows_accuracy_or_r2() -> None:
    cells = epoch_cells(row(val_accuracy_fused=0.9876, val_map_fused=0.5, val_accuracy_sum=0.5))
    assert {name: text for name, text in cells.items() if "val" in name} == {"val fused": "98.76%", "val sum": "50.00%"}
    cells = epoch_cells(row(val_r2_fused=-0.25, val_mae_fused=3.0, val_r2_mean=0.98765))
    assert {name: text for name, text in cells.items() if "val" in name} == {
        "val r2 fused": "-0.25",
        "val r2 mean": "0.9877",
    }


def test_the_result_of_a_regression_is_in_numbers(tmp_path: Path) -> None:
    result = {"chosen_epoch": 1, "validation": {"val_r2_fused": 0.5, "val_rmse_fused": 12.3456}, "test": {}}
    out = io.StringIO()
    Console(file=out, width=120).print(result_table(result, StoragePath.of(tmp_path)))
    assert "12.35" in out.getvalue()
    assert "%" not in out.getvalue()


@pytest.mark.parametrize(("metric", "title"), [("accuracy", "Validation accuracy by head"), ("r2", "Validation R")])
def test_the_report_draws_what_there_is(metric: str, title: str, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    history = row(**{f"val_{metric}_fused": 0.5}, eligible_rows=10, train_information=1.0)
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(history))
        writer.writeheader()
        writer.writerow(history)
    assert title in write_report(StoragePath.of(tmp_path)).read_text()
