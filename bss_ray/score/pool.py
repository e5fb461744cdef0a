"""Number and resources of scoring actors; a pool that the cluster can never run is refused at once."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import ray.data

from bss_ray.errors import ConfigError, ResourceError
from bss_ray.placement.cluster import read_nodes
from bss_ray.placement.packing import Node, ProcessGroup, most
from bss_ray.runtime.threads import ONE_ARENA
from bss_ray.runtime.wait import users_errors

# With an environment of their own, tasks read rows while actors measure others: with the same environment Ray Data
# would read inside the actors.
_OWN_STAGE = {"runtime_env": ONE_ARENA}


# More actors than any pool has.
_MANY = 10_000


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Requested number and resources of scoring actors.

    Args:
        min_actors: Number of scoring actors at the start.
        max_actors: Largest number of scoring actors; null takes as many as the cluster has room for, with one CPU left
            for reading.
        cpus_per_actor: Logical CPUs of each actor; null takes 1, or 0 if the cluster has one CPU.
        gpus_per_actor: Share of a GPU of each actor; null takes 1 if the cluster has GPUs.

    Raises:
        ConfigError: A number is out of its range.
    """

    min_actors: int = 1
    max_actors: int | None = None
    cpus_per_actor: float | None = None
    gpus_per_actor: float | None = None

    def __post_init__(self) -> None:
        if self.min_actors < 1:
            raise ConfigError(f"min_actors must be at least 1; received {self.min_actors}")
        if self.max_actors is not None and self.max_actors < self.min_actors:
            raise ConfigError(f"max_actors must be at least min_actors={self.min_actors}; received {self.max_actors}")
        for name, value in (("cpus_per_actor", self.cpus_per_actor), ("gpus_per_actor", self.gpus_per_actor)):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ConfigError(f"{name} cannot be negative; received {value}")

    def on_cluster(self) -> PoolSize:
        """This pool on the current cluster; see `fit`."""
        return self.fit([node for node in read_nodes() if node.there])

    def fit(self, nodes: Sequence[Node]) -> PoolSize:
        """This pool on these nodes.

        Raises:
            ResourceError: The nodes can never run the pool.
        """
        there = {name: sum(node.resources.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
        cpus = (1.0 if there["CPU"] >= 2 else 0.0) if self.cpus_per_actor is None else self.cpus_per_actor
        gpus = (1.0 if there["GPU"] >= 1 else 0.0) if self.gpus_per_actor is None else self.gpus_per_actor
        needs = {name: value for name, value in (("CPU", cpus), ("GPU", gpus)) if value}
        # Actors that hold every CPU would wait for rows that no task can read.
        reader = ProcessGroup(name="task that reads rows", count=1 if cpus else 0, each={"CPU": 1})
        wanted = max(self.min_actors, self.max_actors or (_MANY if needs else 1))
        room = most(nodes, [reader, ProcessGroup(name="actors", count=wanted, each=needs)], "actors")
        if room < self.min_actors:
            asked = " and ".join(f"{value:g} {name}" for name, value in needs.items())
            has = ", ".join(f"{value:g} {name}" for name, value in there.items())
            raise ResourceError(
                f"{self.min_actors} scoring actors with {asked} each, and 1 CPU to read rows with, do not fit: the "
                f"cluster has {has} and room for {max(room, 0)} of them. Lower --min_actors, --cpus_per_actor or "
                "--gpus_per_actor"
            )
        return PoolSize(min_actors=self.min_actors, max_actors=self.max_actors or room, cpus=cpus, gpus=gpus)


@dataclass(frozen=True)
class PoolSize:
    """A pool whose numbers are all known.

    Attributes:
        min_actors: Smallest number of actors.
        max_actors: Largest number of actors.
        cpus: Logical CPUs of each actor.
        gpus: Share of a GPU of each actor.
    """

    min_actors: int
    max_actors: int
    cpus: float
    gpus: float

    @property
    def options(self) -> dict[str, object]:
        """Arguments of `Dataset.map_batches`."""
        strategy = ray.data.ActorPoolStrategy(min_size=self.min_actors, max_size=self.max_actors)
        return {"compute": strategy, "num_cpus": self.cpus, "num_gpus": self.gpus, **_OWN_STAGE}


@contextlib.contextmanager
def settings_of(dataset: ray.data.Dataset) -> Iterator[None]:
    """In the block, rows keep their order and errors are raised as they are; derived datasets share these settings.

    Raises:
        BssRayError: Rows break a rule.
    """
    context = dataset.context
    before = context.execution_options.preserve_order, context.raise_original_map_exception
    context.execution_options.preserve_order = context.raise_original_map_exception = True
    try:
        with users_errors():
            yield
    finally:
        context.execution_options.preserve_order, context.raise_original_map_exception = before
