"""Measure files, read tasks, plan and pool of a scoring job: planning without Ray."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from bss_ray.data.columns import Columns
from bss_ray.errors import CheckpointError, ConfigError, DataError, ResourceError, StorageError
from bss_ray.placement.packing import Node
from bss_ray.score.config import ScoreConfig, resolve
from bss_ray.score.job import Source, _claim_plan, forget_beginning
from bss_ray.score.measure_files import (
    MeasureFile,
    clear_marks,
    find_measure_files,
    group_measure_files,
    marked,
    missing_rows,
    read_measure_file,
    runs_within,
    write_measure_file,
)
from bss_ray.score.pool import PoolConfig
from bss_ray.score.read_tasks import ParquetTask, known_features, parquet_tasks
from bss_ray.storage import StoragePath
from bss_ray.train.initial import Weights
from tests.scoring import COLUMNS, make_columns, make_table, write_folder


def touch(folder: StoragePath, *files: tuple[int, int]) -> None:
    for file in files:
        write_measure_file(folder, MeasureFile(*file), pa.table({"row_id": np.arange(file[0], file[0] + file[1])}))


class TestMeasureFiles:
    def test_finished_files_are_found_and_nothing_else(self, tmp_path: Path) -> None:
        touch(StoragePath.of(tmp_path), (0, 4), (8, 2), (20, 5))
        for name in (".measures-000000000004-000000004.parquet.77.tmp", "measures-4.parquet", "note.txt"):
            (tmp_path / name).write_text("")
        assert find_measure_files(StoragePath.of(tmp_path)) == [
            MeasureFile(0, 4),
            MeasureFile(8, 2),
            MeasureFile(20, 5),
        ]
        assert missing_rows(find_measure_files(StoragePath.of(tmp_path)), 26) == [(4, 8), (10, 20), (25, 26)]

    def test_of_files_that_overlap_one_counts(self, tmp_path: Path) -> None:
        # Another --piece_rows, or a process that outlived its driver.
        touch(StoragePath.of(tmp_path), (0, 4), (0, 8), (6, 4), (8, 4))
        assert find_measure_files(StoragePath.of(tmp_path)) == [MeasureFile(0, 8), MeasureFile(8, 4)]

    def test_a_damaged_file_is_named_with_what_to_do(self, tmp_path: Path) -> None:
        file = MeasureFile(0, 4)
        with pytest.raises(CheckpointError, match=r"measures-000000000000-000000004.*Remove it"):
            read_measure_file(StoragePath.of(tmp_path), file)
        write_measure_file(StoragePath.of(tmp_path), file, pa.table({"row_id": [0, 1]}))
        with pytest.raises(CheckpointError, match="holds 2 rows and not 4"):
            read_measure_file(StoragePath.of(tmp_path), file)
        (tmp_path / file.name).write_bytes(b"PAR1 no more")
        with pytest.raises(CheckpointError, match="cannot be read"):
            read_measure_file(StoragePath.of(tmp_path), file)

    def test_a_file_that_cannot_be_written_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="cannot be written"):
            write_measure_file(StoragePath.of(tmp_path / "gone"), MeasureFile(0, 1), pa.table({"row_id": [0]}))
        assert find_measure_files(StoragePath.of(tmp_path)) == []

    def test_groups_keep_the_order_and_reach_their_size(self) -> None:
        files = [MeasureFile(start, 10) for start in range(0, 70, 10)]
        groups = group_measure_files(files, 25)
        assert [len(group) for group in groups] == [3, 3, 1]
        assert [file for group in groups for file in group] == files

    def test_runs_within_bounds(self) -> None:
        assert runs_within([(0, 5), (8, 12), (20, 30)], 4, 22) == [(4, 5), (8, 12), (20, 22)]
        assert runs_within([(0, 5)], 5, 9) == []


class TestReadTasks:
    def test_rows_of_all_files_are_numbered_in_order_and_read_as_asked(self, tmp_path: Path) -> None:
        columns = make_columns(100)
        write_folder(tmp_path / "rows", make_table(columns), [30, 65], row_group=12)
        tasks = parquet_tasks(str(tmp_path / "rows"), COLUMNS)
        assert [(task.first_row, task.rows) for task in tasks] == [(0, 30), (30, 35), (65, 35)]
        features = known_features(tasks, COLUMNS)
        seen: list[int] = []
        for task in tasks:
            for first_row, rows in task.read(COLUMNS, features, [(10, 40), (64, 70)], finite=True):
                assert rows.problems == []
                here = slice(first_row, first_row + len(rows.arrays["label"]))
                np.testing.assert_array_equal(rows.arrays["a"], columns["a"][here])
                assert rows.arrays["name"].tolist() == columns["name"][here]
                assert rows.arrays["has_a"].all()
                seen += range(here.start, here.stop)
        assert seen == [*range(10, 40), *range(64, 70)]

    def test_large_row_groups_are_tasks_of_their_own(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("bss_ray.score.read_tasks._TASK_BYTES", 1)
        write_folder(tmp_path / "rows", make_table(make_columns(100)), [50], row_group=20)
        tasks = parquet_tasks(str(tmp_path / "rows"), COLUMNS)
        assert [task.rows for task in tasks] == [20, 20, 10, 20, 20, 10]

    def test_shapes_come_from_the_first_row_that_has_them(self, tmp_path: Path) -> None:
        gone = np.arange(100) < 70
        table = make_table(make_columns(100), {"a": gone})
        write_folder(tmp_path / "rows", table, [30, 65], row_group=12)
        tasks = parquet_tasks(str(tmp_path / "rows"), COLUMNS)
        features = known_features(tasks, COLUMNS)
        assert {name: feature.shape for name, feature in features.items()} == {"a": (4,), "b": (4,)}
        first, rows = next(iter(tasks[0].read(COLUMNS, features, [(0, 30)], finite=True)))
        assert first == 0
        assert rows.arrays["a"].shape == (len(rows.arrays["label"]), 4)
        assert not rows.arrays["has_a"].any()
        assert not rows.arrays["a"].any()

    def test_what_is_wrong_is_named(self, tmp_path: Path) -> None:
        table = make_table(make_columns(10))
        write_folder(tmp_path / "rows", table, [], row_group=5)
        with pytest.raises(DataError, match="has no column 'lable'; did you mean 'label'"):
            parquet_tasks(str(tmp_path / "rows"), Columns(modalities=("a", "b"), label="lable"))
        with pytest.raises(DataError, match="no such file"):
            parquet_tasks(str(tmp_path / "nowhere"), COLUMNS)
        (tmp_path / "rows" / "9.parquet").write_text("not Parquet")
        with pytest.raises(DataError, match=r"cannot read Parquet from .*9\.parquet"):
            parquet_tasks(str(tmp_path / "rows"), COLUMNS)
        write_folder(tmp_path / "nulls", make_table(make_columns(10), {"b": np.ones(10, bool)}), [], row_group=5)
        with pytest.raises(DataError, match="modality 'b' is null in all rows"):
            known_features(parquet_tasks(str(tmp_path / "nulls"), COLUMNS), COLUMNS)


def on(*resources: dict[str, float]) -> list[Node]:
    return [Node(id=str(index), resources=each) for index, each in enumerate(resources)]


class TestPool:
    def test_a_cpu_is_left_to_read_with(self) -> None:
        size = PoolConfig().fit(on({"CPU": 2}))
        assert (size.min_actors, size.max_actors, size.cpus, size.gpus) == (1, 1, 1.0, 0.0)
        assert PoolConfig().fit(on({"CPU": 4}, {"CPU": 4})).max_actors == 7
        assert PoolConfig().fit(on({"CPU": 1})).cpus == 0

    def test_gpus_are_used_where_there_are_any_also_in_shares(self) -> None:
        nodes = on({"CPU": 16, "GPU": 2}, {"CPU": 16})
        assert (PoolConfig().fit(nodes).max_actors, PoolConfig().fit(nodes).gpus) == (2, 1.0)
        assert PoolConfig(gpus_per_actor=0.25).fit(nodes).max_actors == 8
        assert PoolConfig(gpus_per_actor=0).fit(nodes).max_actors == 31

    @pytest.mark.parametrize(
        ("pool", "said"),
        [
            (
                PoolConfig(gpus_per_actor=1),
                "with 1 CPU and 1 GPU each, .* the cluster has 4 CPU, 0 GPU and room for 0 of",
            ),
            (PoolConfig(cpus_per_actor=3), "do not fit"),  # 4 CPUs, but no node has 3
            (PoolConfig(min_actors=5), "room for 3 of them"),
            (PoolConfig(min_actors=4), "4 scoring actors with 1 CPU each, and 1 CPU to read rows with, do not fit"),
            # No node has a CPU left to read with, though all of them together have one.
            (PoolConfig(min_actors=2, cpus_per_actor=1.5), "room for 1 of them"),
        ],
    )
    def test_what_the_cluster_can_never_give_is_refused(self, pool: PoolConfig, said: str) -> None:
        with pytest.raises(ResourceError, match=said):
            pool.fit(on({"CPU": 2}, {"CPU": 2}))

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"min_actors": 0}, "at least 1; received 0"),
            ({"min_actors": 3, "max_actors": 2}, "at least min_actors=3; received 2"),
            ({"gpus_per_actor": -1.0}, "gpus_per_actor cannot be negative"),
        ],
    )
    def test_impossible_numbers(self, settings: dict[str, float], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            PoolConfig(**settings)  # type: ignore[arg-type]


def test_a_job_that_fails_before_its_first_file_leaves_its_name_free(tmp_path: Path) -> None:
    folder = tmp_path / "scores"
    (folder / "measures" / ".begun").mkdir(parents=True)
    for name in ("plan.json", "config.yaml"):
        (folder / name).write_text("")
    touch(StoragePath.of(folder / "measures"), (0, 4))
    forget_beginning(StoragePath.of(folder))
    assert (folder / "config.yaml").exists(), "what is measured stays claimed"
    (folder / "measures" / MeasureFile(0, 4).name).unlink()
    forget_beginning(StoragePath.of(folder))
    assert not folder.exists()


def test_rows_that_end_their_actors_are_not_tried_for_ever(tmp_path: Path) -> None:
    file, other = MeasureFile(64, 32), MeasureFile(6, 4)
    clear_marks(StoragePath.of(tmp_path))
    for _ in range(3):
        with marked(StoragePath.of(tmp_path), file):  # leaves no mark: it ends well
            pass
        (tmp_path / ".begun" / f"64-{_}").touch()  # as a killed process leaves it
    with (
        pytest.raises(ResourceError, match=r"3 actors were lost while they scored rows 64\.\.95"),
        marked(StoragePath.of(tmp_path), file),
    ):
        pass
    with marked(StoragePath.of(tmp_path), other):
        pass
    clear_marks(StoragePath.of(tmp_path))
    with marked(StoragePath.of(tmp_path), file):
        pass


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ('{"rows": 3, "data": "a"}', "weights: None there"),  # of a version that did not write it
        ('{"rows": 4, "data": "a", "weights": ""}', "rows: 4 there, 3 now"),
        ("[3]", "is damaged"),
        ("{", "is damaged"),
    ],
)
def test_a_plan_of_other_rows_or_weights_is_refused(plan: str, said: str, tmp_path: Path) -> None:
    path = StoragePath.of(tmp_path / "plan.json")
    job = resolve(ScoreConfig(data="rows.parquet", columns=COLUMNS), Weights({}, "weights.pt"))
    source = Source([ParquetTask(path, (0,), 0, 3, 3)], {}, "a")
    _claim_plan(path, job, source)
    _claim_plan(path, job, source)  # the same again
    path.write_text(plan)
    with pytest.raises(CheckpointError, match=said):
        _claim_plan(path, job, source)
