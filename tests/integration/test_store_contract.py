"""This project's stores through the contract that it ships for everybody's.

A new store is a class here with a `make`; one that keeps files gets its folder from `tmp_path`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import pytest
import ray

from bss_ray.data.store import Arrays, ObjectStore, Store
from bss_ray.testing import StoreContract

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

P = ParamSpec("P")
T = TypeVar("T")


class TestObjectStore(StoreContract):
    def make(self, shards: Sequence[Arrays]) -> ObjectStore:
        return ObjectStore([ray.put(arrays) for arrays in shards])

    def elsewhere(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        # Objects of Ray's store are read by processes of its cluster.
        answer: T = ray.get(ray.remote(num_cpus=0)(function).remote(*args, **kwargs))
        return answer

    def packed(self, store: Store) -> bytes:
        packed: bytes = ray.cloudpickle.dumps(store)
        return packed
