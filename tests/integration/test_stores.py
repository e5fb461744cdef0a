"""Stores on disk and in Lance against the object store: the same rows, and what happens to their files."""

import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data

from bss_ray.data import build
from bss_ray.data.build import build_shards, build_split
from bss_ray.data.columns import Columns
from bss_ray.data.disk import DiskStore
from bss_ray.data.lance import LanceStore
from bss_ray.data.shards import Shards
from bss_ray.data.store import ObjectStore, StoreConfig
from bss_ray.errors import DataError, StorageError
from bss_ray.runtime.messages import Message, ShardsProgress, Status
from bss_ray.train.run import TrainConfig, load_shards
from tests.processes import ROOT
from tests.runs import COLUMNS, make_columns, make_dataset

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

ROWS = 301
ROLES = Columns(modalities=("audio", "image"), id="name", extra=("flag", "flags", "weight", "note"))


def all_kinds() -> dict[str, Any]:
    """Columns of all kinds; texts are wider in later rows, so that shards differ in their width."""
    rng = np.random.default_rng(0)
    return {
        "audio": rng.normal(size=(ROWS, 5, 3)).astype(np.float32),
        "image": rng.integers(0, 256, (ROWS, 4, 4, 3), dtype=np.uint8),
        "label": rng.integers(0, 4, ROWS).astype(np.int32),
        "name": [f"row {'x' * (index // 20)} {index}" for index in range(ROWS)],
        "flag": rng.random(ROWS) < 0.5,
        "flags": rng.random((ROWS, 3)) < 0.5,
        "weight": rng.normal(size=ROWS),
        "note": [f"é{index % 7}" for index in range(ROWS)],
    }


def disk(folder: Path, **settings: Any) -> StoreConfig:
    return StoreConfig(kind="disk", folder=str(folder), **settings)


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/shard-*.arrow"))


@pytest.fixture(scope="module")
def in_memory() -> Shards:
    return build_shards(make_dataset(all_kinds()), ROLES, min_shards=4, store=StoreConfig(kind="object"))


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("disk")
    return build_shards(make_dataset(all_kinds()), ROLES, min_shards=4, store=disk(folder))


def assert_same(here: Shards, there: Shards) -> None:
    assert here.fingerprint == there.fingerprint
    assert here.features == there.features
    assert here.num_classes == there.num_classes
    assert spans(here) == spans(there)
    for index in range(len(here.parts)):
        for name, values in there.read(index).items():
            np.testing.assert_array_equal(here.read(index)[name], values)
            assert here.read(index)[name].dtype == values.dtype, name
    rng = np.random.default_rng(1)
    for rows in (rng.integers(0, ROWS, 64), np.arange(ROWS), np.array([7]), np.array([], dtype=np.int64)):
        batch = here.gather(rows, ROLES.all)
        for name, values in there.gather(rows, ROLES.all).items():
            np.testing.assert_array_equal(batch[name], values)
            assert batch[name].dtype == values.dtype, name
            assert batch[name].flags.writeable


def spans(shards: Shards) -> list[tuple[int, int]]:
    return [(part.first_row, part.rows) for part in shards.parts]


def test_disk_equals_object_store(in_memory: Shards, on_disk: Shards) -> None:
    assert isinstance(on_disk.store, DiskStore)
    assert_same(on_disk, in_memory)
    assert [part.node for part in on_disk.parts] == [part.node for part in in_memory.parts]


def test_rows_come_from_the_page_cache_without_a_copy(on_disk: Shards) -> None:
    maps = Path("/proc/self/maps").read_text().splitlines() if on_disk.read(0) else []
    spans = [line.split()[0].split("-") for line in maps if "shard-00000.arrow" in line]
    for name, values in on_disk.read(0).items():
        assert not values.flags.writeable
        address = values.__array_interface__["data"][0]
        assert any(int(start, 16) <= address < int(stop, 16) for start, stop in spans), name
    assert on_disk.read(0)["audio"] is on_disk.read(0)["audio"]


def test_other_processes_read_it(on_disk: Shards) -> None:
    @ray.remote
    def gather(shards: Shards, rows: np.ndarray) -> dict[str, np.ndarray]:
        return shards.gather(rows, ROLES.all)

    rows = np.array([300, 5, 77, 5])
    batch = ray.get(gather.remote(on_disk, rows))
    np.testing.assert_array_equal(batch["audio"], all_kinds()["audio"][rows])
    assert batch["name"].tolist() == [all_kinds()["name"][row] for row in rows]
    part = on_disk.only([1, 3])
    first = part.parts[1].first_row
    np.testing.assert_array_equal(part.gather(np.array([first]))["image"], all_kinds()["image"][[first]])


# ---- streaming --------------------------------------------------------------------------------


def many_blocks(tensors: int = 24) -> ray.data.Dataset:
    """24 blocks of 0.5 MiB, made when they are asked for."""

    def make(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        rows = batch["id"]
        noise = np.stack([np.random.default_rng(int(row)).normal(size=4096) for row in rows]).astype(np.float32)
        return {"a": noise, "b": -noise, "label": rows % 3}

    return ray.data.range(16 * tensors, override_num_blocks=tensors).map_batches(make, batch_size=16)


def test_streams_are_cut_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SHARD_BYTES", 2 << 20)
    progress: list[tuple[int, int]] = []
    streamed = build_shards(
        many_blocks(), COLUMNS, store=disk(tmp_path), on_progress=lambda *done: progress.append(done)
    )
    assert len(streamed.parts) == 6
    assert progress[-1] == (6, 6)
    whole = build_shards(many_blocks(), COLUMNS, store=StoreConfig(kind="object"))
    assert streamed.fingerprint == whole.fingerprint
    rows = np.array([383, 0, 17])
    np.testing.assert_array_equal(streamed.gather(rows)["b"], whole.gather(rows)["b"])
    # A block that is larger than a shard is cut, and cut rows of a stream keep their place.
    monkeypatch.setattr(build, "SHARD_BYTES", 1 << 18)
    fine = build_shards(many_blocks(4).limit(50), COLUMNS, store=disk(tmp_path))
    assert len(fine.parts) > 4
    np.testing.assert_array_equal(fine.gather(np.arange(50))["a"], whole.gather(np.arange(50))["a"])


def test_auto_goes_to_disk_when_memory_is_short_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SHARD_BYTES", 2 << 20)
    auto, notices = StoreConfig(folder=str(tmp_path)), []
    roomy = build_shards(many_blocks(), COLUMNS, store=auto, on_notice=notices.append)
    assert isinstance(roomy.store, ObjectStore)
    assert notices == []
    assert files_in(tmp_path) == []
    tight = build_shards(many_blocks(), COLUMNS, store=auto, memory_bytes=5 << 20, on_notice=notices.append)
    assert isinstance(tight.store, DiskStore)
    assert tight.fingerprint == roomy.fingerprint
    assert len(notices) == 1
    for part in ("need more than 0.0049 GiB of the object stores'", str(tmp_path), "--store.kind"):
        assert part in notices[0]


def test_bad_rows_leave_no_files(tmp_path: Path) -> None:
    columns = make_columns()
    columns["a"][150, 2] = np.nan
    with pytest.raises(DataError, match=r"modality 'a' \(1 row; first row ids 150\)"):
        build_shards(make_dataset(columns), COLUMNS, min_shards=3, store=disk(tmp_path))
    twice = {**all_kinds(), "name": ["same"] * ROWS}
    with pytest.raises(DataError, match="'same' in rows 0 and 1"):
        build_shards(make_dataset(twice), ROLES, min_shards=3, store=disk(tmp_path))
    assert list(tmp_path.iterdir()) == []


# ---- reuse ------------------------------------------------------------------------------------


def counted(folder: Path, columns: dict[str, Any]) -> ray.data.Dataset:
    """The columns, leaving a file each time a block of them is made."""

    def count(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        folder.mkdir(exist_ok=True)
        (folder / os.urandom(8).hex()).touch()
        return batch

    return make_dataset(columns).map_batches(count)


class Source:
    """A data set with a key, built again and again."""

    def __init__(self, folder: Path, config: StoreConfig) -> None:
        self.folder, self.config, self.notices = folder, config, list[str]()

    def build(self, source_key: str = "one", **options: Any) -> tuple[Shards, bool]:
        """Shards, and whether the data set was executed for them."""
        counts = self.folder / "counts"
        shutil.rmtree(counts, ignore_errors=True)
        shards = build_split(
            "train",
            counted(counts, make_columns()),
            COLUMNS,
            min_shards=3,
            store=self.config,
            source_key=source_key,
            on_notice=self.notices.append,
            **options,
        )
        rows = np.array([202, 0, 101])
        np.testing.assert_array_equal(shards.gather(rows)["a"], make_columns()["a"][rows])
        return shards, counts.exists()


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path, disk(tmp_path / "cache"))


def test_a_known_source_is_not_executed(source: Source) -> None:
    first, executed = source.build()
    assert executed
    again, executed = source.build()
    assert not executed
    assert (again.fingerprint, again.parts, again.features) == (first.fingerprint, first.parts, first.features)
    assert again.num_classes == first.num_classes
    assert again.columns == first.columns
    # `auto` takes what is there, too. Other rows, roles or classes are another source.
    source.config = StoreConfig(folder=source.config.folder)
    assert not source.build()[1]
    source.config = disk(Path(str(source.config.folder)))
    for options in ({"source_key": "two"}, {"num_classes": 5}):
        made, executed = source.build(**options)
        assert executed
        assert made.num_classes == options.get("num_classes", first.num_classes)
    assert source.build()[0].num_classes == first.num_classes
    assert source.notices == []


def test_equal_content_is_kept_and_not_rewritten(source: Source) -> None:
    folder = source.folder / "cache"
    source.build()
    before = {path: path.stat().st_ino for path in files_in(folder)}
    assert len(before) == 3
    assert source.build("another key")[1]
    assert {path: path.stat().st_ino for path in files_in(folder)} == before


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "manifest"])
def test_damaged_files_are_made_anew_with_a_warning(source: Source, harm: str) -> None:
    first, _ = source.build()
    path = files_in(source.folder / "cache")[1]
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 4
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[:-9])
    elif harm == "remove":
        path.unlink()
    else:
        (path.parent / "manifest.json").write_text("{")
    again, executed = source.build()
    assert executed
    assert again.fingerprint == first.fingerprint
    assert json.loads((path.parent / "manifest.json").read_text())["fingerprint"] == first.fingerprint
    told = "\n".join(source.notices)
    if harm in ("flip", "cut"):
        assert f"{path} was damaged (its checksum differs) and is removed" in told
    if harm != "manifest":
        assert "1 of 3 files of the stored dataset are missing: it is made again" in told
    assert not source.build()[1], "sound again"


BUILD = """
import sys, ray, ray.data
from tests.runs import COLUMNS, make_columns, make_dataset
from bss_ray.data.build import build_shards
from bss_ray.data.store import StoreConfig
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
ray.data.DataContext.get_current().enable_progress_bars = False
config = StoreConfig(kind="disk", folder=sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(3):
    shards = build_shards(make_dataset(make_columns()), COLUMNS, min_shards=3, store=config, source_key="x")
print(shards.fingerprint)
"""


def test_two_builds_at_once(tmp_path: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    other = subprocess.Popen([sys.executable, "-c", BUILD, address, str(tmp_path)], text=True, cwd=ROOT, **pipes)
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n", other.communicate()
    assert other.stdin is not None
    other.stdin.write("\n")
    other.stdin.flush()
    for _ in range(3):
        shards = build_shards(make_dataset(make_columns()), COLUMNS, min_shards=3, store=disk(tmp_path), source_key="x")
    output, errors = other.communicate(timeout=200)
    assert other.returncode == 0, errors
    assert output == f"{shards.fingerprint}\n"
    assert len(files_in(tmp_path)) == 3
    assert sorted(path.name[:4] for path in tmp_path.iterdir())[-1] == "keys"
    assert not list(tmp_path.glob(".new-*"))


# ---- Lance ------------------------------------------------------------------------------------


def in_lance(folder: Path) -> StoreConfig:
    return StoreConfig(kind="lance", folder=str(folder / "rows.lance"))


def test_lance_equals_object_store(in_memory: Shards, tmp_path: Path) -> None:
    shards = build_shards(make_dataset(all_kinds()), ROLES, min_shards=4, store=in_lance(tmp_path))
    assert_same(shards, in_memory)
    assert {part.node for part in shards.parts} == {""}
    assert not any(values.flags.writeable for values in shards.read(1).values())
    part = shards.only([1, 3])
    first = part.parts[1].first_row
    np.testing.assert_array_equal(part.gather(np.array([first]))["image"], all_kinds()["image"][[first]])
    rows = np.array([300, 5, 77, 5])
    batch = ray.get(ray.remote(lambda shards, rows: shards.gather(rows)).remote(shards, rows))
    np.testing.assert_array_equal(batch["audio"], all_kinds()["audio"][rows])


def test_lance_is_reused_and_holds_several_data_sets(source: Source, tmp_path: Path) -> None:
    source.config = in_lance(tmp_path)
    first, executed = source.build()
    assert executed
    other = build_shards(many_blocks(4), COLUMNS, store=source.config)
    again, executed = source.build()
    assert not executed
    assert again == dataclasses.replace(first, store=again.store)
    assert isinstance(again.store, LanceStore)
    assert isinstance(first.store, LanceStore)
    assert again.store.version == first.store.version
    same, executed = source.build("another key")
    assert executed
    assert isinstance(same.store, LanceStore)
    assert same.store.version == first.store.version, "equal content is kept once"
    assert other.gather(np.array([3]))["a"].shape == (1, 4096)


def test_lance_says_what_fails(tmp_path: Path) -> None:
    config = in_lance(tmp_path)
    shards = build_shards(make_dataset(make_columns()), COLUMNS, store=config)
    (tmp_path / "x").write_text("")
    with pytest.raises(StorageError, match=r"cannot write to the Lance dataset .*Check --store\.folder"):
        build_shards(make_dataset(make_columns()), COLUMNS, store=StoreConfig(kind="lance", folder=f"{tmp_path}/x/y"))
    shutil.rmtree(tmp_path / "rows.lance")
    with pytest.raises(StorageError, match=r"cannot (open|read) .*rows\.lance"):
        pickle.loads(pickle.dumps(shards)).gather(np.arange(203))
    columns: dict[str, Any] = {**all_kinds(), "note": ["text" if row < 150 else None for row in range(ROWS)]}
    with pytest.raises(DataError, match=r"column 'note' need one type in Lance; received string and"):
        build_shards(make_dataset(columns), ROLES, min_shards=3, store=config)


# ---- room -------------------------------------------------------------------------------------


def test_old_data_sets_make_room(source: Source) -> None:
    folder = source.folder / "cache"
    old = folder / ("0" * 32 + "-00000000")
    old.mkdir(parents=True)
    (old / "shard-00000.arrow").write_bytes(bytes(4 << 20))
    (old / "lock").touch()
    source.config = disk(folder)
    source.build()
    assert old.exists(), "there is plenty of room"
    os.utime(old / "lock", (1, 1))
    source.config = disk(folder, max_gib=1 / 1024)
    source.build("another")
    assert not old.exists()
    assert len(files_in(folder)) == 3


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)  # processes still hold locks there


def test_a_full_disk_leaves_what_was_there(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build_shards(make_dataset(make_columns()), COLUMNS, store=disk(small_disk), source_key="x")
    monkeypatch.setattr(build, "SHARD_BYTES", 1 << 18)
    with pytest.raises(StorageError, match=r"cannot write .*MiB needed.*No space left on device.*Make room") as caught:
        build_shards(many_blocks(), COLUMNS, store=disk(small_disk))
    assert "Traceback" not in str(caught.value)
    assert not list(small_disk.glob(".new-*"))
    notices: list[str] = []
    again = build_shards(
        make_dataset(make_columns()), COLUMNS, store=disk(small_disk), source_key="x", on_notice=notices.append
    )
    assert again.fingerprint == first.fingerprint
    assert notices == []


# ---- the command line -------------------------------------------------------------------------


def test_the_command_keeps_rows_on_disk_and_finds_them_again(tmp_path: Path) -> None:
    columns = make_columns()
    table = {name: list(values) if values.ndim > 1 else values for name, values in columns.items()}
    rows = tmp_path / "rows.parquet"
    pq.write_table(pa.table(table), rows)
    config = TrainConfig(data=str(rows), validation=str(rows), columns=COLUMNS, store=disk(tmp_path / "cache"))
    seen = []
    for kinds in ({Status, ShardsProgress}, {Status}):  # the second finds both splits: no shard is made
        told: list[Message] = []
        shards = load_shards(config, told.append)
        assert {type(message) for message in told} == kinds
        seen.append([path.stat().st_mtime_ns for path in sorted(files_in(tmp_path / "cache"))])
    assert shards.validation is not None
    assert shards.train.rows == shards.validation.rows == len(columns["label"])
    assert len(list((tmp_path / "cache" / "keys").iterdir())) == 2
    assert seen[0] == seen[1]
