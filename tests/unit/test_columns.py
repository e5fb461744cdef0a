"""Roles of columns, and the rules for labels, without Ray."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bss_ray.data.checks import check_labels, check_presence, count_outputs, store_labels
from bss_ray.data.columns import TASKS, Columns
from bss_ray.errors import DataError, Problem, raise_first_problem

FIRST = 1000


def roles(**settings: Any) -> Columns:
    return Columns(**{"modalities": ("audio", "image"), **settings})


class TestColumns:
    def test_tasks(self) -> None:
        assert TASKS == ("multiclass", "multilabel", "regression")
        assert roles().task == "multiclass"
        with pytest.raises(DataError, match="unknown task 'regresion'; did you mean 'regression'"):
            roles(task="regresion")

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"modalities": ("fused", "audio")}, r"'fused'.* used by the outputs of models; rename \['fused'\]"),
            ({"modalities": ("features", "audio")}, r"rename \['features'\]"),
            ({"modalities": ("audio", "has_audio")}, r"rename \['has_audio'\]"),
            ({"label": "has_image"}, r"rename \['has_image'\]"),
            ({"extra": ("note", "loss_audio")}, r"score files; rename \['loss_audio'\]"),
            ({"id": "score"}, r"rename \['score'\]"),
            ({"modalities": ("audio",)}, r"at least two input columns; received \['audio'\]"),
            ({"extra": ("audio",)}, r"\['audio'\] are named more than once"),
        ],
    )
    def test_names_that_are_taken(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(DataError, match=message):
            roles(**settings)

    def test_names_that_only_look_taken(self) -> None:
        # Of no modality, so nobody adds them.
        assert roles(extra=("has_video", "loss_video"), label="fused").extra == ("has_video", "loss_video")


def problems_of(values: Any, task: str, num_classes: int | None = None, present: Any = None) -> list[Problem]:
    values = np.asarray(values)
    there = np.ones(len(values), dtype=bool) if present is None else np.array(present)
    return check_labels(values, there, roles(task=task), FIRST, num_classes)


SOUND = [
    ("multiclass", np.array([0, 2, 1], dtype=np.uint8), np.int64, 3),
    ("multilabel", [[0, 1], [1, 1], [0, 0]], np.uint8, 2),
    ("multilabel", [[True], [False]], np.uint8, 1),
    ("multilabel", [[0.0, 1.0, 1.0]], np.uint8, 3),
    ("regression", [1.5, -2.0], np.float32, 1),
    ("regression", [3, 4], np.float32, 1),
    ("regression", [[1.0, 2.0], [3.0, 4.0]], np.float32, 2),
]


@pytest.mark.parametrize(("task", "values", "dtype", "outputs"), SOUND)
def test_sound_labels(task: Any, values: Any, dtype: Any, outputs: int) -> None:
    assert problems_of(values, task) == problems_of(values, task, num_classes=outputs) == []
    stored = store_labels(np.asarray(values), task)
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored, values)
    assert count_outputs(stored, task) == outputs


BAD = [
    ("multiclass", [[0, 1], [1, 0]], None, r"one integer a row, not shape \(2,\).*columns\.task=multilabel.*\(2 rows"),
    ("multiclass", [0, 5, 1], 3, r"0\.\.2 \(num_classes=3\).*0\.\.5 \(1 row; first row ids 1001\)"),
    ("multiclass", [0.0, np.nan], None, r"must not be missing.*\(1 row; first row ids 1001\)"),
    ("multilabel", [[0, 1], [0, 2]], None, r"must be 0 or 1.*'label' \(1 row; first row ids 1001\)"),
    ("multilabel", [[0, 1], [np.nan, 1]], None, r"must be 0 or 1.*\(1 row; first row ids 1001\)"),
    ("multilabel", [[0.5, 1], [0, 1]], None, r"must be 0 or 1.*\(1 row; first row ids 1000\)"),
    ("multilabel", [1, 0], None, r"tensor \(C,\) of 0 and 1 a row.*shape \(\).*columns\.task=multiclass \(2 rows"),
    ("multilabel", [["a", "b"]], None, r"holds <U1 of shape \(2,\)"),
    ("multilabel", [[], []], None, r"of shape \(0,\)"),
    ("multilabel", [[0, 1]], 3, r"num_classes=3 values a row: column 'label' has 2\. Leave num_classes out"),
    ("regression", [1.0, np.inf, 2.0, np.nan], None, r"must be finite.*\(2 rows; first row ids 1001, 1003\)"),
    ("regression", [1.0, 1e39], None, r"too large for float32 in column 'label' \(1 row; first row ids 1001\)"),
    ("regression", ["a", "b"], None, r"must be a number.*holds <U1 of shape \(\) \(2 rows"),
    ("regression", [[[1.0]]], None, r"shape \(1, 1\)"),
    ("regression", [1.0], 2, r"num_classes=2 values a row: column 'label' has 1"),
]


@pytest.mark.parametrize(("task", "values", "num_classes", "message"), BAD)
def test_bad_labels(task: str, values: Any, num_classes: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        raise_first_problem(problems_of(values, task, num_classes), DataError)


@pytest.mark.parametrize("task", TASKS)
def test_missing_labels(task: str) -> None:
    with pytest.raises(DataError, match=r"nulls in column 'label' \(2 rows; first row ids 1000, 1002\)"):
        raise_first_problem(problems_of([1], task, present=[False, True, False]), DataError)
    assert check_labels(None, np.zeros(3, dtype=bool), roles(task=task), FIRST, None)[0].count == 3


def test_a_row_needs_a_modality() -> None:
    audio, image = np.array([True, False, False]), np.array([False, False, True])
    (problem,) = check_presence({"audio": audio, "image": image}, FIRST)
    assert (problem.count, problem.first_ids) == (1, [FIRST + 1])
    assert check_presence({"audio": audio, "image": ~audio}, FIRST) == []
