"""A run's holder and coordinator in the process that trains, for runs of one rank that need no other process."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from typing import Any

import ray

from bss_ray.data.shards import Shards
from bss_ray.runtime.wait import wait_limit
from bss_ray.sample.coordinator_actor import CoordinatorActor
from bss_ray.sample.holder_actors import EVERY, HolderActor
from bss_ray.sample.start import coordinator_settings
from bss_ray.sample.state import MeasureBatch


class InProcess:
    """An object that is called as an actor's handle is: `handle.method.remote(...)` returns a reference.

    Args:
        target: whose methods are called, at once and in the calling thread.
    """

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self._target, name))


class _Method:
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def remote(self, *args: Any) -> Any:
        return ray.put(self._function(*args))


class InProcessHolder:
    """All rows' scores in one holder, as `Holders` of the coordinator and of whoever delivers measures.

    The coordinator's thread plans ahead while the rank delivers, so they take turns.
    """

    def __init__(self, spans: list[tuple[int, int]]) -> None:
        self._holder = HolderActor(spans, wait_limit())
        self._turn = threading.RLock()
        self.prefix = f"bss_ray-{uuid.uuid4().hex[:8]}-"

    def start(self, method: str, *args: Any, of: slice = EVERY) -> list[Any]:
        """References to the holder's result, if it is one `of` those that are meant."""
        return [ray.put(result) for _ in [self][of] for result in self.map(method, *args)]

    def map(self, method: str, *args: Any) -> list[Any]:
        with self._turn:
            return [self._holder.load(*args) if method == "load" else self._holder.call(method, *args)]

    def deliver(self, delivery: MeasureBatch, *, epoch: int, version: int, attempt: str) -> None:
        """Bring measures to the holder."""
        with self._turn:
            self._holder.call("receive", delivery, epoch=epoch, version=version, attempt=attempt)


def start_here(shards: Shards, *, run: str = "run", **settings: Any) -> tuple[InProcessHolder, InProcess]:
    """Holder and coordinator in this process; settings as of `start_coordinator`, but for the rows."""
    holder = InProcessHolder([(part.first_row, part.rows) for part in shards.parts])
    made = coordinator_settings(rows=shards.rows, **settings)
    return holder, InProcess(CoordinatorActor(holder, None, made, run=run, wait_limit_s=wait_limit()))
