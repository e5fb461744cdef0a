"""Two plain stores through the contract: what it asks is no more than `Store.take` gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from bss_ray.data.store import Arrays, Store
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


@pytest.mark.xfail(strict=True, reason="Shards.gather checks the ends of the rows, not the gaps that `only` leaves")
def test_a_gap_between_shards_is_no_row() -> None:
    columns = make_columns()
    some = shards_over(MemoryStore(cut_columns(columns)), columns).only([1, 3])  # rows 7, and 29..40
    with pytest.raises(IndexError):
        some.gather(np.array([8]))  # comes back as row 7
