"""Faults for train loops: kill, fail, hang or fill the disk, once in a run, at a given global batch.

    fault = Fault(KillRank(), marker=folder / "fault", epoch=1, batch=5)
    ...
    for batch in sampler.batches():
        ...
        fault.reached(epoch, sampler.position.batch - 1, rank=rank, ranks=ranks)
    ...
    assert fault.happened()

Every rank calls `reached`, and one rank acts. A fault can be pickled into `train_loop_config`.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong once in a run, after a given global batch.

    Attributes:
        action: What happens: one of the classes below, or any function of your own.
        marker: File that records that the fault has happened, so that a restarted process does not repeat it; in a
            folder that all ranks and the test see.
        epoch: Epoch, from 0.
        batch: Global batch of the epoch, from 0.
        rank: Rank on which the fault happens; negative numbers count from the last rank.
    """

    action: Callable[[], None]
    marker: Path
    epoch: int = 0
    batch: int = 0
    rank: int = -1

    def reached(self, epoch: int, batch: int, *, rank: int = 0, ranks: int = 1) -> None:
        """Inject the fault if this is its place and it has not happened yet."""
        if (epoch, batch) != (self.epoch, self.batch) or rank != self.rank % ranks:
            return
        try:
            with self.marker.open("x") as file:
                file.write(f"{self.action} after epoch {epoch}, global batch {batch}, on rank {rank} of {ranks}\n")
        except FileExistsError:
            return
        self.action()

    def happened(self) -> bool:
        """Whether the fault was really injected."""
        return self.marker.exists()


@dataclass(frozen=True)
class KillRank:
    """Kill -9 the process that the train loop runs in."""

    def __call__(self) -> None:
        if (local := _local()) is not None and local.current_cluster() is not None:
            raise local.Killed
        os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class KillActor:
    """Kill -9 an actor of this run, from inside its train loop; Ray restarts it empty.

    Attributes:
        role: Role of the actor: `coordinator`, `holder-0`, ..., or `scorer-0`, ... of the engine `actors`.
    """

    role: str

    def __call__(self) -> None:
        if (local := _local()) is not None and (cluster := local.current_cluster()) is not None:
            cluster.kill(self.role)
        else:
            _kill_actor(_actor_of_this_run(self.role), self.role)


@dataclass(frozen=True)
class KillController:
    """Kill -9 Ray Train's controller; the ranks, which it has started, end with it."""

    def __call__(self) -> None:
        if (local := _local()) is not None and local.current_cluster() is not None:
            raise local.Killed
        from bss_ray.runtime.ray_internals import train_parts

        _kill_actor(train_parts().controller(), "the controller")


@dataclass(frozen=True)
class Raise:
    """Raise an exception, e.g. a programming error in the loop."""

    error: Exception

    def __call__(self) -> None:
        raise self.error


@dataclass(frozen=True)
class Hang:
    """Sleep for some seconds, as a slow or stuck rank."""

    seconds: float

    def __call__(self) -> None:
        time.sleep(self.seconds)


@dataclass(frozen=True)
class FullDisk:
    """Make each write of this process to a file an OSError, until the process ends.

    It stands for a full disk without filling one (`RLIMIT_FSIZE`; the error is EFBIG, not ENOSPC).

    Attributes:
        file_bytes: Size up to which files may still grow.
    """

    file_bytes: int = 0

    def __call__(self) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_bytes, hard))


def _local() -> ModuleType | None:
    """The module of `LocalCluster`, if this process has such clusters."""
    return sys.modules.get("bss_ray.testing.cluster")


def _actor_of_this_run(role: str) -> Any:
    """The actor of this role. Others of the role may exist: of another run, or of a run that is ending."""
    import ray

    from bss_ray.train.sampler import get_sampler

    return ray.get_actor(get_sampler()._context.prefix + role)


def _kill_actor(actor: Any, role: str) -> None:
    import ray  # a fault of a plain process does not need Ray

    from bss_ray.runtime.ray_internals import run_in_actor

    try:
        ray.get(run_in_actor(actor, _kill))
    except ray.exceptions.RayActorError:
        return
    raise AssertionError(f"{role} answered, although it was killed")


def _kill(_actor: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
