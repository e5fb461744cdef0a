"""A cluster whose nodes come and go: global batches stay the same, rows and scorers of a lost node come back."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.train
from ray.cluster_utils import Cluster

from bss_ray import Scoring
from bss_ray.errors import ResourceError
from bss_ray.placement.resources import Placement, check_resources
from bss_ray.runtime.messages import Message, PlacementMap
from bss_ray.testing import Fault, Hang
from tests.runs import Faults, Outcome, make_shards, run

pytestmark = [
    pytest.mark.fault,
    pytest.mark.slow,
    pytest.mark.outage,
    pytest.mark.usefixtures("no_ray_session"),
    pytest.mark.timeout(900),
]

SCORING = Scoring(engine="actors", momentum=0.5)


def node_args(zone: str) -> dict[str, Any]:
    return {"num_cpus": 1, "object_store_memory": 100 << 20, "labels": {"zone": zone}}


@pytest.fixture(scope="module")
def cluster(no_ray_session: None) -> Iterator[Cluster]:
    """A head whose CPU ranks and scorers may not use, and a node for them."""
    cluster = Cluster(initialize_head=True, head_node_args={**node_args("head"), "include_dashboard": False})
    cluster.add_node(**node_args("work"))
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def wait_for_fault(fault: Fault, running: Future[Outcome]) -> None:
    while not fault.happened():
        assert not running.done(), running.result()
        time.sleep(0.1)


def batches_by_world(audit: Path) -> dict[tuple[int, int, int], list[int]]:
    """Sorted row ids of every global batch: (epoch, number, number of ranks that trained it)."""
    found: dict[tuple[int, int, int], list[int]] = {}
    for path in audit.glob("*-of-*.npy"):
        epoch, number, _, _, world = path.stem.split("-")
        rows = found.setdefault((int(epoch), int(number), int(world)), [])
        rows += [int(row) for row in np.load(path) if row >= 0]
    return {key: sorted(rows) for key, rows in found.items()}


def test_a_label_that_no_node_has_is_refused_at_once(cluster: Cluster) -> None:
    scaling = ray.train.ScalingConfig(num_workers=1, label_selector={"zone": "elsewhere"})
    with pytest.raises(
        ResourceError, match=r"zone=elsewhere, and no node has it\. .* zone=head \(1\), zone=work \(1\)"
    ):
        check_resources(scaling, SCORING, Placement())


def test_a_node_comes_and_another_goes(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")
    first = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)
    shards = make_shards(6)
    # The last rank hangs until Ray Train ends it: for a new number of ranks, or because another rank is lost.
    joins, leaves = (
        Fault(Hang(3600), marker=tmp_path / name, epoch=epoch, batch=7) for name, epoch in (("joins", 0), ("leaves", 1))
    )
    messages: list[Message] = []
    with ThreadPoolExecutor(1) as other_thread:
        running = other_thread.submit(
            run,
            tmp_path / "elastic",
            shards,
            workers=(1, 2),
            scaling={"label_selector": {"zone": "work"}, "elastic_resize_monitor_interval_s": 1},
            scoring=SCORING,
            failures=3,
            checkpoint_every=3,
            fault=Faults((joins, leaves)),
            dropout=0.0,
            on_message=messages.append,
        )
        wait_for_fault(joins, running)
        cluster.add_node(**node_args("work"))
        wait_for_fault(leaves, running)
        cluster.remove_node(first, allow_graceful=False)
        elastic = running.result()

    # With one rank, and nothing happens: the same global batches, those that were trained again included.
    undisturbed = run(tmp_path / "undisturbed", shards, workers=1, scoring=SCORING, dropout=0.0)
    trained = batches_by_world(tmp_path / "elastic" / "audit")
    assert {world for _, _, world in trained} == {1, 2}
    assert {(epoch, number) for epoch, number, _ in trained} == undisturbed.batches.keys()
    for (epoch, number, world), rows in trained.items():
        assert rows == undisturbed.batches[epoch, number], (epoch, number, world)
    for epoch in range(2):
        again = [number for number in range(13) if {(epoch, number, 1), (epoch, number, 2)} <= trained.keys()]
        # Only what came after the last checkpoint. That of batch 6 may not have reached the controller yet.
        assert again in ([6, 7], [3, 4, 5, 6, 7])
    assert elastic.metrics["weight"] == pytest.approx(undisturbed.metrics["weight"], rel=1e-4)

    # What ran where: one rank, two, one again; and the scorers have left the lost node.
    placed = [message for message in messages if isinstance(message, PlacementMap)]
    ranks = [sum(row.processes.get("ranks", 0) for row in message.rows) for message in placed]
    assert [number for number, _ in itertools.groupby(ranks)] == [1, 2, 1]
    scorers = [{row.node: row.processes.get("scorers", 0) for row in message.rows} for message in placed]
    assert sum(scorers[0].values()) == sum(scorers[-1].values()) == 2
    lost = f"/{first.node_id[:6]}"
    assert any(name.endswith(lost) and count == 2 for name, count in scorers[0].items())
    assert not any(name.endswith(lost) for name in scorers[-1])
