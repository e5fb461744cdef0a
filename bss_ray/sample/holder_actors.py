"""The Ray actors around `Holder`, all of them together, and how results stay with them. A thin shell, no decisions.

Nothing here imports torch: a run may have many holders, and each would take a second longer to start and 120 MB more.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import ray

from bss_ray.runtime.wait import DEFAULT_LIMIT_S, set_wait_limit, wait_for
from bss_ray.sample.coordinator import Holders
from bss_ray.sample.holder import Holder
from bss_ray.sample.state import MeasureBatch, ScoreBlock

EVERY = slice(None)


class SavedScores(Protocol):
    """Saved scores that every node can read, such as a checkpoint."""

    def scores(self, start: int, stop: int) -> list[ScoreBlock]:
        """Saved scores that overlap rows [start, stop)."""
        ...


class Named:
    """An actor that Ray's logs and `ray list actors` show by its name."""

    def __repr__(self) -> str:
        return ray.get_runtime_context().get_actor_name() or type(self).__name__


class HolderActor(Named):
    """A `Holder` of rows of the run."""

    def __init__(self, spans: list[tuple[int, int]], wait_limit_s: float = DEFAULT_LIMIT_S) -> None:
        set_wait_limit(wait_limit_s)
        self._spans = spans
        self._holder = Holder(spans)

    def load(self, saved: SavedScores, version: int, attempt: str) -> int:
        """`Holder.load`, reading only what overlaps the own rows, straight from where it is saved."""
        first, stop = self._spans[0][0], sum(self._spans[-1])
        return self._holder.load(saved.scores(first, stop), version, attempt)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Any other method of the holder."""
        return getattr(self._holder, method)(*args, **kwargs)


class StartedHolders(Holders, Protocol):
    """Holders that can also leave their results where they are."""

    @property
    def prefix(self) -> str:
        """Of the names of all actors of the run."""
        ...

    def start(self, method: str, *args: Any, of: slice = EVERY) -> list[Any]:
        """References to the results of all holders, or of some."""
        ...

    def deliver(self, delivery: MeasureBatch, *, epoch: int, version: int, attempt: str) -> None:
        """Bring measures to those who hold their rows; returns when they have them."""
        ...


class ActorHolders:
    """`Holders` that are actors; all of them work at the same time. It travels to whoever delivers measures.

    Args:
        names: of the actors, in the order of their rows. Names, since Ray cannot promise to restart an actor
            whose constructor was given references.
        first_rows: row id of the first row of each.
    """

    def __init__(self, names: Sequence[str], first_rows: Sequence[int]) -> None:
        self.names = tuple(names)
        self._first_rows = tuple(first_rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return ActorHolders, (self.names, self._first_rows)

    @property
    def prefix(self) -> str:
        """Of the names of all actors of the run."""
        return self.names[0].removesuffix("holder-0")

    @cached_property
    def _actors(self) -> list[Any]:
        return [ray.get_actor(name) for name in self.names]

    def start(self, method: str, *args: Any, of: slice = EVERY) -> list[Any]:
        """References to the results of all holders, or of some."""
        if method == "load":
            return [actor.load.remote(*args) for actor in self._actors[of]]
        return [actor.call.options(name=f"holder.{method}").remote(method, *args) for actor in self._actors[of]]

    def map(self, method: str, *args: Any) -> list[Any]:
        return list(wait_for(self.start(method, *args), f"the holders' {method}"))

    def deliver(self, delivery: MeasureBatch, *, epoch: int, version: int, attempt: str) -> None:
        """Bring measures to those who hold their rows; returns when they have them.

        Raises:
            ray.exceptions.RayActorError: a holder is lost.
        """
        edges = itertools.pairwise([*self._first_rows, np.iinfo(np.int64).max])
        parts = [delivery.within(*edge) for edge in edges]
        call = {"epoch": epoch, "version": version, "attempt": attempt}
        sent = [
            actor.call.options(name="holder.receive").remote("receive", part, **call)
            for actor, part in zip(self._actors, parts, strict=True)
            if len(part.rows)
        ]
        wait_for(sent, "the holders to take measures")
