"""The store of arrays, and two plain ones: what the contract asks is no more than `Store.take` gives."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bss_ray.data.arrays import ArrayStore
from bss_ray.data.span import Span
from bss_ray.data.store import Arrays, MappedStore, Store
from bss_ray.testing import StoreContract
from bss_ray.testing.store import cut_columns, make_columns, shards_over


class MemoryStore(Store):
    """Shards as read-only arrays of this process; they travel with it."""

    def __init__(self, shards: Sequence[Arrays]) -> None:
        self._shards = [{name: values.view() for name, values in arrays.items()} for arrays in shards]
        for arrays in self._shards:
            for values in arrays.values():
                values.flags.writeable = False

    def __reduce__(self) -> tuple[type[MemoryStore], tuple[Sequence[Arrays]]]:
        return MemoryStore, (self._shards,)  # arrays forget on the way that they are read-only

    def read(self, shard: int) -> Arrays:
        return self._shards[shard]

    def only(self, shards: Sequence[int]) -> MemoryStore:
        return MemoryStore([self._shards[shard] for shard in shards])


class TestMemoryStore(StoreContract):
    def make(self, shards: Sequence[Arrays]) -> MemoryStore:
        return MemoryStore(shards)


class TestArrayStore(StoreContract):
    def make(self, shards: Sequence[Arrays]) -> ArrayStore:
        return ArrayStore(shards)


class FileStore(Store):
    """A memory-mapped .npy file per column of a shard.

    Args:
        folders: of each shard.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = list(folders)
        self._opened: dict[int, Arrays] = {}

    def __reduce__(self) -> tuple[type[FileStore], tuple[Sequence[Path]]]:
        return FileStore, (self._folders,)

    def read(self, shard: int) -> Arrays:
        if shard not in self._opened:
            files = sorted(self._folders[shard].iterdir())
            self._opened[shard] = {file.stem: np.load(file, mmap_mode="r") for file in files}
        return self._opened[shard]

    def only(self, shards: Sequence[int]) -> FileStore:
        return FileStore([self._folders[shard] for shard in shards])


def write_files(folder: Path, shards: Sequence[Arrays]) -> list[Path]:
    """The columns of each shard as files; returns the shards' folders."""
    folders = [folder / str(index) for index in range(len(shards))]
    for place, arrays in zip(folders, shards, strict=True):
        place.mkdir()
        for name, values in arrays.items():
            np.save(place / f"{name}.npy", values)
    return folders


class TestFileStore(StoreContract):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def make(self, shards: Sequence[Arrays]) -> FileStore:
        return FileStore(write_files(self.folder, shards))


def test_a_gap_between_shards_is_no_row() -> None:
    columns = make_columns()
    some = shards_over(MemoryStore(cut_columns(columns)), columns).only([1, 3])  # rows 7, and 29..40
    assert some.gather(np.array([40, 7]))["label"].tolist() == columns["label"][[40, 7]].tolist()
    with pytest.raises(IndexError, match=r"no shard holds row 8 \(1 of 3 rows\)"):
        some.gather(np.array([29, 8, 7]))


class TestMappedStore(StoreContract):
    """`MappedStore`, which copies rows of all shards at once."""

    def make(self, shards: Sequence[Arrays]) -> MappedMemory:
        return MappedMemory(shards)


class MappedMemory(MappedStore):
    def __init__(self, shards: Sequence[Arrays]) -> None:
        super().__init__(len(shards))
        self._memory = MemoryStore(shards)

    def __reduce__(self) -> tuple[type[MappedMemory], tuple[Sequence[Arrays]]]:
        return MappedMemory, (self._memory._shards,)

    def open(self, shard: int) -> Arrays:
        return self._memory.read(shard)

    def only(self, shards: Sequence[int]) -> MappedMemory:
        return MappedMemory([self._memory.read(shard) for shard in shards])


class TestSpan:
    @pytest.mark.parametrize(
        ("dtype", "shape"),
        [
            ("f4", (512,)),
            ("i8", ()),
            ("u1", (3, 5)),
            ("?", ()),
            ("f2", (7,)),
            ("S3", ()),
            ("M8[s]", ()),
            ("f8", (2, 3)),
        ],
    )
    def test_rows_of_all_arrays(self, dtype: str, shape: tuple[int, ...]) -> None:
        rng = np.random.default_rng(0)
        raw = [rng.integers(0, 256, (rows, 4096), dtype=np.uint8) for rows in (5, 1, 300, 77)]
        size = int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize
        kind = (
            "u1" if dtype in ("?", "f2", "f4", "f8") else dtype
        )  # any bits, and none that compare unequal to themselves
        width = size // np.dtype(kind).itemsize
        arrays = [np.ascontiguousarray(block[:, :size]).view(kind).reshape(len(block), width) for block in raw]
        span = Span.over(arrays)
        assert span is not None
        which = rng.integers(0, 4, 500)
        rows = rng.integers(0, [len(arrays[array]) for array in which])
        out = np.zeros((500, width), kind)
        span.take(which, rows, out)
        assert out.tobytes() == b"".join(arrays[array][row].tobytes() for array, row in zip(which, rows, strict=True))

    def test_arrays_at_odd_addresses(self) -> None:
        memory = np.random.default_rng(1).integers(0, 256, 10_000, dtype=np.uint8)
        arrays = [memory[start : start + 40 * 8].view(np.float64).reshape(10, 4) for start in (3, 1001, 5000)]
        span = Span.over(arrays)
        assert span is not None
        out = np.empty((4, 4))
        span.take(np.array([2, 0, 1, 0]), np.array([9, 0, 5, 9]), out)
        expected = [arrays[2][9], arrays[0][0], arrays[1][5], arrays[0][9]]
        assert out.tobytes() == b"".join(row.tobytes() for row in expected)

    def test_none_where_arrays_differ_or_hold_objects(self) -> None:
        assert Span.over([np.array(["a"]), np.array(["bb"])]) is None
        assert Span.over([np.zeros((2, 3)), np.zeros((2, 4))]) is None
        assert Span.over([np.array([object()])]) is None
        assert Span.over([np.zeros((4, 6)).T]) is None
        assert Span.over([np.zeros((4, 0))]) is None

    def test_it_keeps_the_memory(self) -> None:
        span = Span.over([np.full((1000, 64), value) for value in (1.0, 2.0)])
        assert span is not None
        gc.collect()
        out = np.empty((2, 64))
        span.take(np.array([1, 0]), np.array([999, 999]), out)
        assert out[:, 0].tolist() == [2.0, 1.0]
