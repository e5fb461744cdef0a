"""Kinds of labels, and rows without some modality, from a Ray Dataset into every store."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
import torch

from bss_ray.data import build
from bss_ray.data.build import build_shards, build_split
from bss_ray.data.columns import Columns
from bss_ray.data.shards import Feature, Shards
from bss_ray.data.store import StoreConfig
from bss_ray.errors import DataError
from bss_ray.load.loader import Loader

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

ROWS = 120
ROLES = Columns(modalities=("audio", "image"))
BOTH = Columns(modalities=("audio", "image"), id="name")
STORES = ("object", "disk", "lance")


def make_columns() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "audio": rng.normal(size=(ROWS, 6)).astype(np.float32),
        "image": rng.integers(1, 256, (ROWS, 2, 3), dtype=np.uint8),
        "label": np.arange(ROWS) % 3,
    }


def with_nulls(values: np.ndarray, present: np.ndarray) -> list[np.ndarray | None]:
    """The rows that are present, and None for the others."""
    return [row if there else None for row, there in zip(values, present, strict=True)]


def in_blocks(columns: dict[str, Any], blocks: int = 6) -> ray.data.Dataset:
    """A block is a run of rows; one of nulls alone has no type."""
    size = ROWS // blocks
    rows = [{name: values[row] for name, values in columns.items()} for row in range(ROWS)]
    parts = [ray.data.from_items(rows[i : i + size], override_num_blocks=1) for i in range(0, ROWS, size)]
    return parts[0].union(*parts[1:])


def in_parquet(folder: Path, columns: dict[str, Any]) -> ray.data.Dataset:
    """Lists, and null lists for rows that are None."""

    def plain(values: Any) -> list[Any]:
        return [value.ravel().tolist() if isinstance(value, np.ndarray) else value for value in values]

    table = pa.table({name: plain(values) for name, values in columns.items()})
    pq.write_table(table, folder / "rows.parquet", row_group_size=20)
    return ray.data.read_parquet(str(folder / "rows.parquet"))


def store_in(folder: Path, kind: Any) -> StoreConfig:
    return StoreConfig(kind=kind, folder=None if kind == "object" else str(folder / kind))


def assert_rows(shards: Shards, columns: dict[str, np.ndarray], **present: np.ndarray) -> None:
    """Batches hold the rows, zeros where they are not present, and say so."""
    batch = shards.gather(np.arange(ROWS))
    expected = {name: values.copy() for name, values in columns.items()}
    for name, there in present.items():
        expected[name][~there] = 0
        expected[f"has_{name}"] = there
    assert list(batch) == list(shards.features) == [*columns, *(f"has_{name}" for name in present)]
    for name, values in expected.items():
        np.testing.assert_array_equal(batch[name], values, err_msg=name)
        assert batch[name].dtype == values.dtype == shards.features[name].dtype
    order = np.random.default_rng(1).permutation(ROWS)[:50]
    np.testing.assert_array_equal(shards.gather(order)["audio"], expected["audio"][order])


# ---- rows without a modality ------------------------------------------------------------------


@pytest.mark.parametrize("kind", STORES)
def test_a_null_is_a_row_without_the_modality(kind: str, tmp_path: Path) -> None:
    """Rows 0..39 have no audio at all, of 40..79 some have none, the others are complete; every fifth has no image."""
    columns, row = make_columns(), np.arange(ROWS)
    audio, image = (row >= 80) | ((row >= 40) & (row % 2 == 0)), row % 5 != 1
    audio |= ~image
    holed = {**columns, "audio": with_nulls(columns["audio"], audio), "image": with_nulls(columns["image"], image)}
    progress: list[tuple[int, int]] = []
    shards = build_shards(
        in_blocks({**holed, "name": [f"row {n}" for n in row]}),
        BOTH,
        min_shards=6,
        store=store_in(tmp_path, kind),
        on_progress=lambda *done: progress.append(done),
    )
    assert len(shards.parts) == 6
    assert progress[-1] == (6, 6)
    assert shards.features["has_audio"] == Feature((), "bool")
    assert_rows(shards, columns, audio=audio, image=image)
    assert shards.gather(np.array([7]), ("name",))["name"].tolist() == ["row 7"]
    again = build_shards(in_blocks({**holed, "name": [f"row {n}" for n in row]}, blocks=3), BOTH, min_shards=2)
    assert again.fingerprint == shards.fingerprint, "cuts do not count"


@pytest.mark.parametrize("kind", ["disk", "object"])
def test_data_sets_one_after_the_other(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream whose first half has no audio, and whose second half has no image: each waits for the other."""
    monkeypatch.setattr(build, "SHARD_BYTES", 700)
    columns, first = make_columns(), np.arange(ROWS) < ROWS // 2
    holed = {**columns, "audio": with_nulls(columns["audio"], ~first), "image": with_nulls(columns["image"], first)}
    shards = build_shards(in_blocks(holed), ROLES, store=store_in(tmp_path, kind))
    assert len(shards.parts) >= 4
    assert_rows(shards, columns, audio=~first, image=first)


def test_only_what_lacks_rows_is_marked(tmp_path: Path) -> None:
    columns, there = make_columns(), np.arange(ROWS) != 77
    holed = {**columns, "audio": with_nulls(columns["audio"], there)}
    marked = build_shards(in_blocks(holed), ROLES, min_shards=3, store=store_in(tmp_path, "disk"))
    assert_rows(marked, columns, audio=there)
    # A row that lacks audio is another than one whose audio is zeros.
    zeros = {**columns, "audio": columns["audio"] * there[:, None]}
    whole = build_shards(in_blocks(zeros), ROLES, min_shards=3, store=store_in(tmp_path, "disk"))
    assert_rows(whole, zeros)
    assert whole.fingerprint != marked.fingerprint
    # The loader's batches say it, also of rows that another node sends.
    loader = Loader(marked, rank=0, rank_nodes=["another node"], device=torch.device("cpu"))
    batches = list(loader.rows(50))
    assert torch.cat([batch["has_audio"] for batch in batches]).tolist() == there.tolist()
    assert batches[0]["has_audio"].dtype == torch.bool
    # Splits may differ in it.
    assert build_split("test", in_blocks(holed), ROLES, train=whole).features == marked.features


def test_the_fingerprint_of_complete_rows_is_that_of_earlier_versions() -> None:
    """Checkpoints name it."""
    assert build_shards(in_blocks(make_columns()), ROLES).fingerprint == "d64cc20ba1009c7f7d5e1be3349be200"


def test_nulls_of_every_type(tmp_path: Path) -> None:
    columns, there = make_columns(), np.arange(ROWS) % 3 != 0
    flat = {**columns, "image": columns["image"].reshape(ROWS, 6)}
    image = flat["image"].astype(np.int64)
    audio = with_nulls(columns["audio"].astype(np.float64), there)
    parquet = build_shards(in_parquet(tmp_path, {**flat, "audio": audio}), ROLES, min_shards=3)
    assert_rows(parquet, {**columns, "audio": columns["audio"].astype(np.float64), "image": image}, audio=there)

    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(columns["audio"])
    storage = pa.array(with_nulls(columns["audio"], there), pa.list_(pa.float32(), 6))
    table = {name: pa.array(list(values)) for name, values in flat.items()}
    table["audio"] = pa.ExtensionArray.from_storage(tensors.type, storage)
    assert_rows(build_shards(ray.data.from_arrow(pa.table(table)), ROLES), flat, audio=there)

    def objects(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        values = np.empty(len(batch["id"]), dtype=object)
        for place, row in enumerate(batch["id"]):
            values[place] = columns["audio"][row] if there[row] else (None if row % 2 else np.nan)
        return {"audio": values, **{name: columns[name][batch["id"]] for name in ("image", "label")}}

    made = ray.data.range(ROWS, override_num_blocks=4).map_batches(objects)
    assert_rows(build_shards(made, ROLES, min_shards=3), columns, audio=there)


def _drop(name: str, rows: Callable[[int], bool]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(columns: dict[str, Any]) -> dict[str, Any]:
        return {**columns, name: [None if rows(row) else value for row, value in enumerate(columns[name])]}

    return change


BAD_NULLS = {
    "no row": ([_drop("audio", lambda _row: True)], r"modality 'audio' is null in all rows\. Leave it out"),
    "nothing in a row": (
        [_drop("audio", lambda row: row > 30), _drop("image", lambda row: row in (9, 31, 100))],
        r"at least one modality: nulls in all of \['audio', 'image'\].* \(2 rows; first row ids 31, 100\)",
    ),
    "ragged beside nulls": (
        [_drop("audio", lambda row: row == 1), lambda c: {**c, "audio": [*c["audio"][:-1], np.zeros(7, np.float32)]}],
        r"'audio' need one shape",
    ),
    "NaN beside nulls": (
        [lambda c: {**c, "audio": [*c["audio"][:-1], np.full(6, np.nan, np.float32)]}, _drop("audio", lambda r: r < 9)],
        r"NaN or infinite values in modality 'audio' \(1 row; first row ids 119\)",
    ),
}


@pytest.mark.parametrize("case", BAD_NULLS)
def test_nulls_that_are_refused(case: str) -> None:
    changes, message = BAD_NULLS[case]
    columns: dict[str, Any] = make_columns()
    for change in changes:
        columns = change(columns)
    with pytest.raises(DataError, match=message):
        build_shards(in_blocks(columns, blocks=3), ROLES, min_shards=3)


# ---- kinds of labels --------------------------------------------------------------------------

KINDS: dict[str, tuple[str, Any, np.ndarray, int]] = {
    "multilabel of integers": ("multilabel", lambda tags: tags, np.uint8, 4),
    "multilabel of bools": ("multilabel", lambda tags: tags.astype(bool), np.uint8, 4),
    "multilabel of floats": ("multilabel", lambda tags: tags.astype(np.float64), np.uint8, 4),
    "number": ("regression", lambda tags: tags[:, 0] / 3, np.float32, 1),
    "integer as a number": ("regression", lambda tags: tags.sum(1), np.float32, 1),
    "numbers": ("regression", lambda tags: tags[:, :2] - 0.25, np.float32, 2),
}


@pytest.mark.parametrize(("case", "store"), list(zip(KINDS, itertools.cycle(STORES))))
def test_labels_of_every_kind(case: str, store: str, tmp_path: Path) -> None:
    task, make, dtype, width = KINDS[case]
    tags = np.random.default_rng(2).integers(0, 2, (ROWS, 4))
    columns = {**make_columns(), "label": make(tags)}
    roles = Columns(modalities=("audio", "image"), task=task)  # type: ignore[arg-type]
    shards = build_shards(in_blocks(columns), roles, min_shards=3, store=store_in(tmp_path, store))
    assert shards.num_classes == width
    assert_rows(shards, {**columns, "label": columns["label"].astype(dtype)})
    test = build_split("test", in_blocks(columns), roles, train=shards)
    assert test.columns.task == task
    assert test.features == shards.features
    with pytest.raises(DataError, match=rf"num_classes=9 values a row: column 'label' has {width}.*\(120 rows"):
        build_shards(in_blocks(columns), roles, num_classes=9)


def test_missing_labels_of_every_kind() -> None:
    there = np.arange(ROWS) != 50
    for task, label in (("multilabel", np.ones((ROWS, 2), np.int64)), ("regression", np.ones(ROWS))):
        roles = Columns(modalities=("audio", "image"), task=task)  # type: ignore[arg-type]
        columns = {**make_columns(), "label": with_nulls(label, there)}
        with pytest.raises(DataError, match=r"nulls in column 'label' \(1 row; first row ids 50\)"):
            build_shards(in_blocks(columns, blocks=2), roles, min_shards=2)
