"""A store in plain memory through the contract: what the contract asks is no more than `Store.take` gives."""

from __future__ import annotations

from collections.abc import Sequence

from bss_ray.data.store import Arrays, Store
from bss_ray.testing import StoreContract


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
