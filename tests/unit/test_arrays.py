"""Shards of arrays in this process: the rules of the data hold for them, too."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from bss_ray.data.arrays import shards_of_arrays
from bss_ray.data.columns import Columns
from bss_ray.data.shards import Feature
from bss_ray.errors import DataError

ROWS = 12
COLUMNS = Columns(modalities=("audio", "image"), id="name", extra=("truth",))


def make_arrays(**changed: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "audio": rng.normal(size=(ROWS, 3)).astype(np.float32),
        "image": rng.integers(0, 256, size=(ROWS, 2, 2), dtype=np.uint8),
        "label": (np.arange(ROWS) % 5).astype(np.int16),
        "name": np.array([f"row {row}" for row in range(ROWS)]),
        "truth": np.arange(ROWS) < 3,
    }
    return {**arrays, **changed}


def test_rows_features_and_nodes() -> None:
    arrays = make_arrays()
    shards = shards_of_arrays(arrays, COLUMNS, nodes=("x", "y", "x", "", "y"))
    assert [(part.first_row, part.rows, part.node) for part in shards.parts] == [
        (0, 2, "x"),
        (2, 2, "y"),
        (4, 3, "x"),
        (7, 2, ""),
        (9, 3, "y"),
    ]
    assert shards.features == {
        "audio": Feature((3,), "float32"),
        "image": Feature((2, 2), "uint8"),
        "label": Feature((), "int64"),  # as all stores keep classes
    }
    assert shards.num_classes == 5
    assert shards.nodes() == ["x", "y", "x", "", "y"], "without asking a cluster"
    rows = np.array([11, 0, 7, 7])
    for travelled in (shards, pickle.loads(pickle.dumps(shards))):
        for name, values in travelled.gather(rows, COLUMNS.all).items():
            np.testing.assert_array_equal(values, arrays[name][rows])
        with pytest.raises(ValueError, match="read-only"):
            travelled.read(1)["audio"][0] = 0
    arrays["audio"] += 1  # the caller's own arrays stay writable


def test_rows_that_lack_a_modality() -> None:
    there = np.arange(ROWS) % 4 != 1
    shards = shards_of_arrays(make_arrays(has_audio=there, has_image=np.ones(ROWS, bool)), COLUMNS)
    assert "has_audio" in shards.features
    assert "has_image" not in shards.features, "no row lacks it"
    np.testing.assert_array_equal(shards.gather(np.arange(ROWS))["has_audio"], there)
    complete = shards_of_arrays(make_arrays(), COLUMNS)
    assert complete.fingerprint != shards.fingerprint
    assert complete.fingerprint == shards_of_arrays(make_arrays(has_image=np.ones(ROWS, bool)), COLUMNS).fingerprint


@pytest.mark.parametrize(
    ("arrays", "nodes", "message"),
    [
        ({"image": np.full((ROWS, 1), np.nan)}, 1, "inputs must be finite"),
        ({"label": np.arange(ROWS) - 1}, 1, r"labels must lie in 0..C-1.*\(1 row; first row ids 0\)"),
        ({"label": np.arange(ROWS - 1)}, 1, "all columns need one row count"),
        ({}, ROWS + 1, "each of 13 shards a row"),
        ({"name": np.array(["a"] * ROWS)}, 1, "ids must be unique: column 'name'"),
        ({"has_audio": np.arange(ROWS) > 1, "has_image": np.arange(ROWS) > 0}, 1, "a row needs at least one modality"),
    ],
)
def test_unsound_rows_are_refused(arrays: dict[str, np.ndarray], nodes: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        shards_of_arrays(make_arrays(**arrays), COLUMNS, nodes=("",) * nodes)


def test_a_missing_column_is_named() -> None:
    arrays = make_arrays()
    del arrays["truth"]
    with pytest.raises(DataError, match="the dataset has no column 'truth'"):
        shards_of_arrays(arrays, COLUMNS)
