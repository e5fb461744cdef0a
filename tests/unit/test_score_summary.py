"""A job's summary against plain NumPy, and what people see of it."""

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from bss_ray.data.columns import Columns
from bss_ray.report.scores import ScoreDisplay, print_summary, progress_text, sparkline, write_scores_report
from bss_ray.runtime.messages import RowsProgress
from bss_ray.score.measuring import Norms, check_pairs, with_row_ids, with_scores
from bss_ray.score.summary import Summary
from bss_ray.storage import StoragePath
from tests.scoring import COLUMNS

ROWS = 400


def make_scores(task: str = "multiclass") -> tuple[pa.Table, dict[str, np.ndarray]]:
    """A table of scores with unpaired and bad rows, and its columns as arrays with NaN."""
    rng = np.random.default_rng(3)
    bad, single = rng.random(ROWS) < 0.05, rng.random(ROWS) < 0.1
    label = rng.integers(0, 4, ROWS) * 10
    columns = {
        "similarity": np.where(bad | single, np.nan, rng.random(ROWS)),
        "information": np.where(bad, np.nan, rng.gamma(2, size=ROWS)),
        "loss_a": np.where(bad, np.nan, rng.gamma(2, size=ROWS)),
        "loss_b": np.where(bad | single, np.nan, rng.gamma(2.5, size=ROWS)),
    }
    columns = {name: values.astype(np.float32) for name, values in columns.items()}
    table = pa.table(
        {
            "name": [f"row {row}" for row in range(ROWS)],
            "label": label,
            "flag": rng.random(ROWS) < 0.5,
            **{name: pa.array(values, mask=np.isnan(values)) for name, values in columns.items()},
        }
    )
    table = with_scores(with_row_ids(table, 0), Norms.of(table, "minmax"), "neutral")
    columns["score"] = table["score"].to_numpy(zero_copy_only=False)
    return table, {**columns, "label": label}


@pytest.fixture(scope="module")
def found() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    table, columns = make_scores()
    parts = [table.slice(0, 130), table.slice(130, 1), table.slice(131)]
    return Summary.union([Summary.of(part, COLUMNS) for part in parts]).to_json(), columns


def test_all_rows(found: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    summary, columns = found
    assert summary["rows"] == ROWS
    assert summary["bad_rows"] == np.isnan(columns["information"]).sum() > 0
    assert summary["unpaired_rows"] == (np.isnan(columns["similarity"]) & ~np.isnan(columns["information"])).sum() > 0
    for name in ("similarity", "information", "score"):
        assert summary[name] == pytest.approx(np.nanmean(columns[name].astype(np.float64)), rel=1e-12)
    score = columns["score"]
    edges = np.linspace(-1, 1, 41)
    expected = [int(((score >= low) & (score < high)).sum()) for low, high in itertools.pairwise(edges)]
    assert summary["histogram"]["rows"] == expected
    assert sum(expected) == ROWS - summary["bad_rows"]


def test_classes(found: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    summary, columns = found
    assert [row["label"] for row in summary["classes"]] == [0, 10, 20, 30]
    for row in summary["classes"]:
        here = columns["label"] == row["label"]
        assert row["rows"] == here.sum()
        for name in ("similarity", "information", "score"):
            assert row[name] == pytest.approx(np.nanmean(columns[name][here].astype(np.float64)), rel=1e-12)


def test_modalities(found: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    summary, columns = found
    a, b = columns["loss_a"], columns["loss_b"]
    both = ~np.isnan(a) & ~np.isnan(b)
    for row, own, other in zip(summary["modalities"], (a, b), (b, a), strict=True):
        assert row["rows"] == (~np.isnan(own)).sum()
        assert row["loss"] == pytest.approx(np.nanmean(own.astype(np.float64)), rel=1e-12)
        assert row["compared"] == both.sum()
        assert row["weaker_share"] == pytest.approx((own[both] > other[both]).mean())


def test_lowest_and_highest_rows(found: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    summary, columns = found
    score = columns["score"]
    known = [row for row in range(ROWS) if not np.isnan(score[row])]
    assert [row["row_id"] for row in summary["lowest"]] == sorted(known, key=lambda row: (score[row], row))[:10]
    assert [row["row_id"] for row in summary["highest"]] == sorted(known, key=lambda row: (-score[row], row))[:10]
    first = summary["lowest"][0]
    assert first["name"] == f"row {first['row_id']}"
    assert first["label"] == columns["label"][first["row_id"]]


def test_labels_that_are_no_classes_make_no_groups() -> None:
    table, _ = make_scores()
    columns = Columns(modalities=("a", "b"), task="regression", id="name", extra=("flag",))
    assert Summary.of(table, columns).to_json()["classes"] == []


def test_an_extra_column_is_no_loss() -> None:
    table, _ = make_scores()
    columns = Columns(modalities=("a", "b"), id="name", extra=("flag", "loss_of_sleep"))
    table = table.append_column("loss_of_sleep", pa.array(np.full(ROWS, 99.0)))
    assert [row["modality"] for row in Summary.of(table, columns).to_json()["modalities"]] == ["a", "b"]


def test_rows_of_one_modality_are_an_error_where_that_is_asked_for() -> None:
    table, columns = make_scores()
    alone = np.flatnonzero(np.isnan(columns["similarity"]) & ~np.isnan(columns["information"]))
    (problem,) = check_pairs(table, 1000, "error")
    assert problem.count == len(alone)
    assert problem.first_ids == (1000 + alone[:5]).tolist()
    assert "unpaired=neutral" in problem.rule
    assert check_pairs(table, 0, "neutral") == []


# ---- what people see ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(found: tuple[dict[str, Any], dict[str, np.ndarray]]) -> dict[str, Any]:
    about = {"data": "rows/", "split": "train", "checkpoint": "<w>.pt", "rows_per_second": 1234.5}
    return {**about, **found[0], "score_roc_area": {"flag": 0.5}}


def test_the_terminal_shows_all_of_it(shown: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("")
    console = Console(file=io.StringIO(), width=120)
    print_summary(console, shown, StoragePath.of(tmp_path))
    out = console.file.getvalue()  # type: ignore[attr-defined]
    said = (
        "400 (1,234 rows/s)",
        "weaker",
        "classes",
        "rows of lowest score",
        "unpaired rows",
        "bad rows",
        "summary.json",
    )
    for words in (*said, "area under the ROC curve 0.500"):
        assert words in out, words
    assert "report.html" not in out, "what is not there is not named"


def test_many_classes_show_the_lowest(shown: dict[str, Any], tmp_path: Path) -> None:
    classes = [
        {"label": label, "rows": 1, "score": label / 100, "similarity": 0.5, "information": 1.0} for label in range(50)
    ]
    console = Console(file=io.StringIO(), width=120)
    print_summary(console, {**shown, "classes": classes[::-1]}, StoragePath.of(tmp_path))
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert "the 12 of 50 with the lowest mean score" in out
    assert "0.1100" in out
    assert "0.1200" not in out.split("rows of lowest")[0].split("classes")[1]


def test_a_line_of_bars() -> None:
    assert sparkline([0, 1, 500, 1000]) == " ▁▄█"
    assert sparkline([0, 0]) == "  "


def test_progress_off_a_terminal_is_lines() -> None:
    out = io.StringIO()
    display = ScoreDisplay(Console(file=out, width=120))
    display.on_message(RowsProgress(1, 4, 2.0))
    assert out.getvalue() == "", "not for every piece"
    display.on_message(RowsProgress(4, 4, 2.0))
    assert "4 of 4 rows, measuring, 2 rows/s" in out.getvalue()
    assert progress_text(1000, 73_000, 10.0) == "measuring, 10 rows/s, 2 h 0 min left"
    assert progress_text(0, 75, 1.0) == "measuring, 1 rows/s, 1 min 15 s left"


def test_the_report_is_one_file_and_escapes_names(shown: dict[str, Any], tmp_path: Path) -> None:
    text = write_scores_report(StoragePath.of(tmp_path), shown).read_text()
    assert "&lt;w&gt;.pt" in text
    for words in ("Balance scores", "Means by class", "rows of lowest score", "weaker"):
        assert words in text, words
    assert 'src="http' not in text, "it opens without a network"
