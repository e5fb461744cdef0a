"""Shards: stable row ids, one fingerprint however they are cut, and bad data named before training."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data

from bss_ray.data.arrays import shards_of_arrays
from bss_ray.data.build import build_shards
from bss_ray.data.columns import Columns
from bss_ray.data.sources import load_splits
from bss_ray.data.store import StoreConfig
from bss_ray.errors import ConfigError, DataError, ResourceError
from bss_ray.placement.resources import Placement, check_resources, settle_engine
from bss_ray.runtime.ray_internals import is_alone
from bss_ray.runtime.wait import DEFAULT_LIMIT_S, WaitError, set_wait_limit
from bss_ray.sample.coordinator import check_batch_size
from bss_ray.scoring.config import Scoring
from tests.runs import COLUMNS, make_columns, make_dataset
from tests.scoring import make_table
from tests.support import join_calls

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]


def test_cuts_change_neither_rows_nor_fingerprint() -> None:
    columns = make_columns()
    made = [build_shards(make_dataset(columns), COLUMNS, min_shards=count) for count in (1, 2, 7)]
    made.append(shards_of_arrays(columns, COLUMNS, nodes=("",) * 3))  # without Ray
    assert [len(shards.parts) for shards in made] == [1, 2, 7, 3]
    assert len({shards.fingerprint for shards in made}) == 1
    rows = np.array([202, 0, 5, 5, 101, 33])
    for shards in made:
        batch = shards.gather(rows)
        for name, values in columns.items():
            np.testing.assert_array_equal(batch[name], values[rows])


def test_fingerprint_sees_content_and_order() -> None:
    columns = make_columns()
    swapped = {name: values[[1, 0, *range(2, len(values))]] for name, values in columns.items()}
    changed = {**columns, "a": columns["a"].copy()}
    changed["a"][100, 3] += 1e-6
    prints = {build_shards(make_dataset(c), COLUMNS).fingerprint for c in (columns, swapped, changed)}
    assert len(prints) == 3


def test_reads_are_views_and_batches_are_copies() -> None:
    shards = build_shards(make_dataset(make_columns()), COLUMNS)
    view = shards.read(0)["a"]
    assert not view.flags.writeable
    assert not view.flags.owndata
    batch = shards.gather(np.arange(10))
    batch["a"] += 1  # an in-place operation on a batch must not reach the store
    np.testing.assert_array_equal(shards.gather(np.arange(10))["a"], make_columns()["a"][:10])


def test_parquet_lists_and_functions(tmp_path: Any) -> None:
    columns = make_columns(40)
    table = pa.table({name: list(values) if values.ndim > 1 else values for name, values in columns.items()})
    (tmp_path / "train").mkdir()
    pq.write_table(table, tmp_path / "train" / "0.parquet")
    splits = load_splits(str(tmp_path))
    assert splits["validation"] is None
    assert splits["train"] is not None
    shards = build_shards(splits["train"], COLUMNS)
    np.testing.assert_array_equal(shards.gather(np.arange(40))["b"], columns["b"])
    assert build_shards(make_dataset(columns), COLUMNS).fingerprint == shards.fingerprint
    with pytest.raises(DataError, match=r"no such file or folder.*nowhere"):
        load_splits("./nowhere")
    with pytest.raises(DataError, match="did you mean 'make_dataset'"):
        load_splits("tests.runs:make_datase")


Change = Callable[[dict[str, Any]], None]


def _set(name: str, row: int, value: Any) -> Change:
    def change(columns: dict[str, Any]) -> None:
        columns[name][row] = value

    return change


def _replace(name: str, make: Callable[[Any], Any]) -> Change:
    def change(columns: dict[str, Any]) -> None:
        columns[name] = make(columns[name])

    return change


BAD: dict[str, tuple[Change, dict[str, Any], str]] = {
    "NaN input": (_set("a", 150, np.nan), {}, r"NaN or infinite values in modality 'a' \(1 row; first row ids 150\)"),
    "infinite input": (_set("b", 7, np.inf), {}, r"NaN or infinite values in modality 'b' \(1 row; first row ids 7\)"),
    "negative label": (_set("label", 90, -1), {}, r"negative labels in column 'label' \(1 row; first row ids 90\)"),
    "label too large": (_set("label", 3, 9), {"num_classes": 3}, r"0\.\.2 \(num_classes=3\).*first row ids 3"),
    "float labels": (_replace("label", lambda x: x + 0.5), {}, r"labels must be integers.*float64"),
    "missing label": (
        _replace("label", lambda x: [None if i in (4, 180) else int(v) for i, v in enumerate(x)]),
        {},
        r"nulls in column 'label' \(2 rows; first row ids 4, 180\)",
    ),
    "text input": (_replace("a", lambda x: [f"row {i}" for i in range(len(x))]), {}, r"'a' must hold numeric tensors"),
    "ragged input": (_replace("a", lambda x: [v[: 3 + i % 2] for i, v in enumerate(x)]), {}, r"'a' need one shape"),
    "duplicate id": (
        _replace("name", lambda x: [*x[:-1], x[9]]),
        {"id": "name"},
        r"'row 9' in rows 9 and 202",
    ),
    "no such column": (_replace("a", lambda x: x), {"label": "lable"}, r"no column 'lable'; did you mean 'label'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_named(case: str) -> None:
    change, options, message = BAD[case]
    columns: dict[str, Any] = make_columns()
    columns["name"] = [f"row {i}" for i in range(len(columns["label"]))]
    change(columns)
    roles = Columns(**{"modalities": ("a", "b"), **{k: v for k, v in options.items() if k != "num_classes"}})
    with pytest.raises(DataError, match=message):
        build_shards(make_dataset(columns), roles, num_classes=options.get("num_classes"), min_shards=3)


def test_no_rows_and_too_few() -> None:
    with pytest.raises(DataError, match="no rows"):
        build_shards(make_dataset(make_columns()).filter(lambda row: row["label"] > 99), COLUMNS)
    with pytest.raises(ConfigError, match="batch_size=64, rows=10"):
        check_batch_size(64, 10)


def test_impossible_resources_are_refused_at_once() -> None:
    with pytest.raises(ResourceError, match=r"needs 100 CPU .*the cluster has 6"):
        check_resources(ray.train.ScalingConfig(num_workers=100), Scoring(), Placement())
    with pytest.raises(ResourceError, match=r"needs 1 GPU .*the cluster has 0"):
        check_resources(ray.train.ScalingConfig(num_workers=1, use_gpu=True), Scoring(), Placement())
    with pytest.raises(ResourceError, match=r"needs 1 GPU \(2 scorers x 0\.5\); the cluster has 0"):
        check_resources(
            ray.train.ScalingConfig(num_workers=1), Scoring(engine="actors", gpus_per_scorer=0.5), Placement()
        )


def test_the_engine_follows_from_what_the_ranks_leave() -> None:
    def settled(workers: int, **settings: Any) -> tuple[str, str]:
        scoring, why = settle_engine(ray.train.ScalingConfig(num_workers=workers), Scoring(**settings))
        return scoring.engine, why

    assert settled(4) == ("actors", "the ranks leave 2 CPUs for 2 scorers")
    assert settled(5) == ("workers", "the ranks leave 1 CPU, too few for 2 scorers as well")
    assert settled(5, num_scorers=1)[0] == "actors"
    assert settled(6, overlap=True)[0] == "actors"
    assert settled(1, engine="online") == ("online", "as set")


def test_a_computed_dataset_is_executed_once_and_errors_still_name_its_columns(tmp_path: Path) -> None:
    columns = make_columns()

    def make(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (tmp_path / f"{batch['id'][0]}-{time.time_ns()}").touch()
        if len(batch["id"]) == 1:
            raise ArithmeticError("the user's own")
        return {name: values[batch["id"]] for name, values in columns.items()}

    dataset = ray.data.range(200, override_num_blocks=4).map_batches(make, batch_size=None)
    shards = build_shards(dataset, COLUMNS)
    assert len(list(tmp_path.iterdir())) == 4
    np.testing.assert_array_equal(shards.gather(np.arange(200))["a"], columns["a"][:200])
    with pytest.raises(DataError, match=r"no column 'lable'; did you mean 'label'"):
        build_shards(dataset, Columns(modalities=("a", "b"), label="lable"))
    with pytest.raises(Exception, match="the user's own"):
        build_shards(ray.data.range(3, override_num_blocks=3).map_batches(make, batch_size=None), COLUMNS)


def test_a_table_becomes_shards_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = make_columns()
    table = make_table(columns)
    whole = build_shards(make_dataset(columns), COLUMNS, min_shards=3)
    assert is_alone()
    monkeypatch.setattr("bss_ray.data.tasks._task_of_shard", None)
    for store in (StoreConfig(), StoreConfig(kind="disk", folder=str(tmp_path))):
        shards = build_shards(table, COLUMNS, min_shards=3, store=store)
        assert (shards.fingerprint, shards.parts) == (whole.fingerprint, whole.parts)
        np.testing.assert_array_equal(shards.gather(np.arange(203))["b"], columns["b"])
    with pytest.raises(DataError, match=r"no column 'lable'; did you mean 'label'"):
        build_shards(table, Columns(modalities=("a", "b"), label="lable"))
    with pytest.raises(DataError, match="the dataset has no rows"):
        build_shards(table.slice(0, 0), COLUMNS)


@pytest.mark.parametrize("stuck", [{0, 1}, {1}])
def test_rows_that_do_not_come_are_not_waited_for_without_end(stuck: set[int], tmp_path: Path) -> None:
    def make(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        while batch["id"][0] in stuck and not (tmp_path / "go on").exists():
            time.sleep(0.05)
        return {name: values[batch["id"]] for name, values in make_columns().items()}

    dataset = ray.data.range(2, override_num_blocks=2).map_batches(make, batch_size=None)
    set_wait_limit(5)
    try:
        with pytest.raises(WaitError, match="waited 5 s for the dataset's next rows"):
            build_shards(dataset, COLUMNS)
    finally:
        set_wait_limit(DEFAULT_LIMIT_S)
        (tmp_path / "go on").touch()
        join_calls()
