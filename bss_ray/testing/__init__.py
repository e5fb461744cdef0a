"""Tests that any sampler or store can be run through, faults to inject into a train loop, and a cluster to run it in.

    class TestMySampler(SamplerContract):
        def make(self, setup: Setup) -> GlobalSampler: ...

    class TestMyStore(StoreContract):
        def make(self, shards: Sequence[Arrays]) -> Store: ...

    LocalCluster(shards, folder, ranks=2, max_failures=1).run(train_loop)

The contracts need pytest, which bss_ray itself does not; faults and `LocalCluster` do not. See docs/testing.md.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

_WHERE = {
    "Fault": "faults",
    "FullDisk": "faults",
    "GlobalSampler": "sampler",
    "Hang": "faults",
    "KillActor": "faults",
    "KillController": "faults",
    "KillRank": "faults",
    "LocalCluster": "cluster",
    "LocalResult": "cluster",
    "Raise": "faults",
    "RankLostError": "thread_ranks",
    "SamplerContract": "sampler",
    "Setup": "sampler",
    "SlicedSampler": "sampler",
    "StoreContract": "store",
}

__all__ = [
    "Fault",
    "FullDisk",
    "GlobalSampler",
    "Hang",
    "KillActor",
    "KillController",
    "KillRank",
    "LocalCluster",
    "LocalResult",
    "Raise",
    "RankLostError",
    "SamplerContract",
    "Setup",
    "SlicedSampler",
    "StoreContract",
]

if TYPE_CHECKING:
    from bss_ray.testing.cluster import LocalCluster, LocalResult
    from bss_ray.testing.faults import Fault, FullDisk, Hang, KillActor, KillController, KillRank, Raise
    from bss_ray.testing.sampler import GlobalSampler, SamplerContract, Setup, SlicedSampler
    from bss_ray.testing.store import StoreContract
    from bss_ray.testing.thread_ranks import RankLostError

if "pytest" in sys.modules:  # otherwise a failed assert in here would not show its values
    sys.modules["pytest"].register_assert_rewrite(f"{__name__}.sampler", f"{__name__}.store")


def __getattr__(name: str) -> Any:
    # Late, so that a rank that injects a fault needs no pytest.
    if name not in _WHERE:
        raise AttributeError(f"module 'bss_ray.testing' has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
