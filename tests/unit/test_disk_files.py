"""The cache folder of one node: whole files or none, checksums, locks that end with their process, cleaning by size."""

import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from bss_ray.data import cache, disk
from bss_ray.data.cache import FileEntry, to_array, to_arrays, to_batch
from bss_ray.data.disk import DiskStore, DiskWriter, NodeFile
from bss_ray.data.lance import LanceStore, LanceWriter
from bss_ray.data.sources import files_key
from bss_ray.data.store import KINDS, Arrays, StoreConfig
from bss_ray.errors import ConfigError, DataError, StorageError
from bss_ray.testing import StoreContract

NAMES = ["0" * 31 + f"{index}-00000000" for index in range(4)]


def make_columns(rows: int = 37) -> dict[str, np.ndarray]:
    """A column of each kind that data sets have."""
    rng = np.random.default_rng(0)
    return {
        "audio": rng.normal(size=(rows, 5, 7)).astype(np.float32),
        "half": rng.normal(size=(rows, 3)).astype(np.float16),
        "image": rng.integers(0, 256, (rows, 9, 9, 3), dtype=np.uint8),
        "flags": rng.random((rows, 3)) < 0.5,
        "flag": rng.random(rows) < 0.5,
        "number": rng.integers(-(2**62), 2**62, rows),
        "float": rng.normal(size=rows),
        "name": np.array([f"row é {index}" for index in range(rows)]),
        "time": np.arange(rows).astype("datetime64[ns]"),
        "big endian": np.arange(2.0 * rows).astype(">f8").reshape(rows, 2),
        "gaps": np.array([None if index % 5 == 0 else f"text {index}" for index in range(rows)], dtype=object),
    }


def make_data_set(folder: Path, name: str, rows: int = 37) -> list[FileEntry]:
    """A data set of one file, as a build publishes it."""
    entry = cache.write_shard(folder / ".new-a" / "shard-00000.arrow", make_columns(rows), {})
    cache.publish(folder / ".new-a", folder / name, [entry], {"files": [entry]}, f"key-{name}")
    return [entry]


def test_nodes_that_share_a_folder_publish_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = DiskWriter(str(tmp_path))
    made: dict[str, NodeFile] = {}
    for index, node in enumerate(("a" * 56, "b" * 56)):
        context = SimpleNamespace(get_node_id=lambda node=node: node)
        monkeypatch.setattr(disk.ray, "get_runtime_context", lambda context=context: context)
        made[node] = writer.put(index, make_columns())
    manifest = {"files": [file.entry for file in made.values()]}
    for file in made.values():
        disk._publish(writer, NAMES[0], [file], manifest, None)
    kept = cache.survey(tmp_path / NAMES[0], manifest["files"])
    assert kept == ([0, 1], [])
    assert not list(tmp_path.glob(".new-*"))


def test_columns_come_back_equal_and_without_a_copy(tmp_path: Path) -> None:
    columns = make_columns()
    entry = cache.write_shard(tmp_path / "x.arrow", columns, {"note": "1"})
    found = cache.map_shard(tmp_path / "x.arrow", entry)
    again = cache.map_shard(tmp_path / "x.arrow", entry)
    assert list(found) == list(columns)
    for name, values in columns.items():
        np.testing.assert_array_equal(found[name], values)
        assert found[name].dtype == values.dtype
        if values.dtype.kind != "O":
            assert not found[name].flags.owndata
            assert not found[name].flags.writeable
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "x.arrow" in line]
    spans = [tuple(int(edge, 16) for edge in line[0].split("-")) for line in maps]
    for arrays in (found, again):
        for name, values in arrays.items():
            address = values.__array_interface__["data"][0]
            assert values.dtype.kind == "O" or any(start <= address < stop for start, stop in spans), name
    assert not [link for link in Path("/proc/self/fd").iterdir() if "x.arrow" in os.path.realpath(link)], "8,000 shards"
    schema = pa.ipc.open_file(str(tmp_path / "x.arrow")).schema
    assert schema.field("audio").type == pa.list_(pa.float32(), 35)
    assert schema.metadata == {b"note": b"1"}


def test_slices_of_batches_are_decoded() -> None:
    columns = make_columns()
    batch = to_batch(columns).slice(5, 11)
    for field in batch.schema:
        np.testing.assert_array_equal(to_array(batch.column(field.name), field), columns[field.name][5:16])
    assert to_arrays(batch.slice(0, 0))["audio"].shape == (0, 5, 7)


def test_mixtures_are_refused_with_the_remedy() -> None:
    with pytest.raises(DataError, match=r"'x' holds Python objects.*store.kind=object"):
        to_batch({"x": np.array([1, "a", None], dtype=object)})


@pytest.mark.parametrize("harm", ["cut", "lengthen", "magic", "remove"])
def test_damage_is_a_typed_error(tmp_path: Path, harm: str) -> None:
    path = tmp_path / "x.arrow"
    entry = cache.write_shard(path, make_columns(), {})
    content = bytearray(path.read_bytes())
    if harm == "cut":
        path.write_bytes(content[:-100])
    elif harm == "lengthen":
        path.write_bytes(content + b"x")
    elif harm == "magic":
        content[-6:] = b"NOTONE"
        path.write_bytes(content)
    else:
        path.unlink()
    assert not cache.is_sound(path, entry)
    with pytest.raises(StorageError, match=r"x\.arrow.* (remove the folder|[Rr]un again)"):
        cache.map_shard(path, entry)


def test_survey_finds_a_flipped_bit_and_removes_the_file(tmp_path: Path) -> None:
    entries = make_data_set(tmp_path, NAMES[0])
    path = tmp_path / NAMES[0] / entries[0].name
    assert cache.survey(path.parent, entries) == ([0], [])
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert cache.survey(path.parent, entries) == ([], [path])
    assert not path.exists()
    assert cache.survey(path.parent, entries) == ([], [])


def test_a_store_reads_published_files(tmp_path: Path) -> None:
    entries = make_data_set(tmp_path, NAMES[0])
    store = DiskStore([NodeFile(entry, str(tmp_path / NAMES[0]), "") for entry in entries])
    np.testing.assert_array_equal(store.read(0)["image"], make_columns()["image"])
    with pytest.raises(StorageError, match=r"does not exist any more\. Run again"):
        DiskStore([NodeFile(entry, str(tmp_path / NAMES[1]), "") for entry in entries]).read(0)


def test_publishing_again_keeps_sound_files_and_replaces_others(tmp_path: Path) -> None:
    entries = make_data_set(tmp_path, NAMES[0])
    path = tmp_path / NAMES[0] / entries[0].name
    first = path.stat().st_ino
    make_data_set(tmp_path, NAMES[0])
    assert path.stat().st_ino == first
    path.write_bytes(b"damaged")
    make_data_set(tmp_path, NAMES[0])
    assert cache.is_sound(path, entries[0])
    assert sorted(file.name for file in tmp_path.iterdir()) == [NAMES[0], "keys"]


def _publish_often(folder: Path, build: str, rounds: int) -> None:
    for _ in range(rounds):
        new = folder / f".new-{build}"
        entries = [cache.write_shard(new / f"shard-{i:05d}.arrow", make_columns(20 + i), {}) for i in range(3)]
        cache.publish(new, folder / NAMES[0], entries, {"files": entries}, "key")


def test_two_processes_publish_the_same_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    builds = [context.Process(target=_publish_often, args=(tmp_path, name, 10)) for name in ("a", "b")]
    for build in builds:
        build.start()
    # A reader sees whole files or none at all times.
    seen = 0
    while any(build.is_alive() for build in builds):
        found = cache.find(tmp_path, "key")
        if found is not None:
            seen += 1
            entries = [FileEntry(*entry) for entry in found[1]["files"]]
            assert cache.survey(tmp_path / found[0], entries) == ([0, 1, 2], [])
    for build in builds:
        build.join()
        assert build.exitcode == 0
    assert seen > 0
    assert sorted(file.name for file in tmp_path.iterdir()) == [NAMES[0], "keys"]


# ---- the contract of stores -------------------------------------------------------------------


class TestDiskStore(StoreContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make(self, shards: Sequence[Arrays]) -> DiskStore:
        entries = [
            cache.write_shard(self.folder / "set" / f"shard-{index:05d}.arrow", arrays, {})
            for index, arrays in enumerate(shards)
        ]
        return DiskStore([NodeFile(entry, str(self.folder / "set"), "") for entry in entries])


class TestLanceStore(StoreContract):
    views = False

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make(self, shards: Sequence[Arrays]) -> LanceStore:
        writer = LanceWriter(str(self.folder / "rows.lance"))
        return writer.commit([writer.put(index, arrays) for index, arrays in enumerate(shards)])


# ---- cleaning ---------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from bss_ray.data import cache
from bss_ray.data import disk
cache.hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def make_old(path: Path, hours: float) -> None:
    lock = path / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 3600 * hours,) * 2)


def make_foreign(folder: Path, name: str, hours: float) -> None:
    """A data set that another process has made, and nobody holds."""
    path = folder / name
    path.mkdir()
    (path / "shard-00000.arrow").write_bytes(bytes(1000))
    (folder / "keys").mkdir(exist_ok=True)
    (folder / "keys" / f"{name}-key.json").write_text(f'{{"data_set": "{name}"}}')
    make_old(path, hours)


def test_cleaning_takes_the_least_recently_used(tmp_path: Path) -> None:
    for index, hours in enumerate((5, 9, 0.5, 7)):
        make_foreign(tmp_path, NAMES[index], hours)
    (tmp_path / "mine").mkdir()
    assert cache.clean(tmp_path, 4000) == []
    assert cache.clean(tmp_path, 2500) == [tmp_path / NAMES[1], tmp_path / NAMES[3]]
    assert cache.clean(tmp_path, 0) == [tmp_path / NAMES[0]], "what was used within the hour stays"
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAMES[2], "keys", "mine"]
    assert [path.name for path in (tmp_path / "keys").iterdir()] == [f"{NAMES[2]}-key.json"]
    assert cache.clean(tmp_path, None) == [], "half of the free space is plenty"


def test_cleaning_spares_what_a_process_uses_until_it_dies(tmp_path: Path) -> None:
    make_foreign(tmp_path, NAMES[0], 5)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / NAMES[0]], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    make_old(tmp_path / NAMES[0], 5)
    assert cache.clean(tmp_path, 0) == []
    holder.kill()
    holder.wait()
    make_old(tmp_path / NAMES[0], 5)
    assert cache.clean(tmp_path, 0) == [tmp_path / NAMES[0]]


def test_what_dead_builds_left_goes_after_a_day(tmp_path: Path) -> None:
    for name, hours in ((".new-dead", 25.0), (".old-dead", 25.0), (".new-live", 1.0), ("other", 99.0)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (time.time() - 3600 * hours,) * 2)
    cache.clean(tmp_path, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".new-live", "other"]


# ---- full and read-only disks -----------------------------------------------------------------


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    entries = make_data_set(tmp_path, NAMES[0])
    path = tmp_path / ".new-b" / "shard-00000.arrow"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # No file may grow beyond 4 kB: a real error of the kernel in the middle of a write.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot write .*\.arrow \(\d+\.\d MiB needed, .* Make room"):
            cache.write_shard(path, make_columns(), {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not path.exists()
    assert cache.survey(tmp_path / NAMES[0], entries) == ([0], [])


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*another disk with --store.folder"):
        cache.write_shard(tmp_path / "cache" / ".new-a" / "shard-00000.arrow", make_columns(), {})


# ---- settings ---------------------------------------------------------------------------------


def test_settings() -> None:
    assert StoreConfig().kind == "auto"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"kind": "disc"}, "unknown store.kind 'disc'; did you mean 'disk'"),
        ({"kind": "lance"}, "lance needs a place"),
        ({"kind": "disk", "folder": "s3://bucket/x"}, "URI s3://bucket/x"),
        ({"kind": "object", "folder": "/x"}, "no use for store.folder"),
        ({"kind": "lance", "folder": "/x", "max_gib": 3}, "max_gib is for store.kind=disk"),
        ({"max_gib": 0}, "must be positive; received 0"),
    ]
    for settings, message in wrong:
        with pytest.raises(ConfigError, match=message):
            StoreConfig(**settings)
    assert set(KINDS) == {"auto", "object", "disk", "lance"}


def test_folder_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BSS_RAY_CACHE", raising=False)
    assert cache.cache_folder(None) == Path.home() / ".cache" / "bss_ray"
    monkeypatch.setenv("BSS_RAY_CACHE", "/scratch")
    assert cache.cache_folder(None) == Path("/scratch")
    assert cache.cache_folder("~/x") == Path.home() / "x"


def test_key_of_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0.parquet").write_text("x")
    key = files_key(str(tmp_path))
    assert key == files_key(str(tmp_path))
    os.utime(tmp_path / "a" / "0.parquet", ns=(1, 1))
    changed = files_key(str(tmp_path))
    (tmp_path / "1.parquet").write_text("y")
    assert len({key, changed, files_key(str(tmp_path)), files_key(str(tmp_path / "1.parquet"))}) == 4
    assert files_key("nothing://x") is None
