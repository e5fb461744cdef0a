"""Four hosts, each with an address of its own: ranks and scorers on different ones, rows read where they lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import ray
import ray.train
from ray._private.state import actors

import bss_ray
from bss_ray import Scoring
from bss_ray.train.checkpoint import SavedCheckpoint
from tests.hosts import Cluster, started
from tests.leftovers import left_after
from tests.namespaces import ENVIRONMENT, network
from tests.runs import SEED, Outcome, make_spread_shards, run

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.usefixtures("no_ray_session")]

ROWS, BATCH, WORKERS = 960, 96, 3


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head that does no work, and three workers."""
    with network(1 + WORKERS) as net:
        head, *workers = net.hosts
        with started(Cluster(head=replace(head, cpus=0), variables=ENVIRONMENT), *workers) as cluster:
            yield cluster


@dataclass
class Seen:
    """A run, and where its actors were."""

    outcome: Outcome
    hosts: dict[str, set[str]]
    left: list[str]


def train(folder: Path) -> Seen:
    shards = make_spread_shards(ROWS)
    scoring = Scoring(engine="actors", num_holders=WORKERS, num_scorers=WORKERS)
    outcome = run(
        folder,
        shards,
        workers=WORKERS,
        placement="STRICT_SPREAD",
        scoring=scoring,
        update_interval=1,
        batch_size=BATCH,
        epochs=2,
    )
    address = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    hosts: dict[str, set[str]] = {"shards": {address[part.node] for part in shards.parts}}
    for actor in actors().values():
        hosts.setdefault(actor["ActorClassName"], set()).add(actor["Address"]["IPAddress"])
    return Seen(outcome, hosts, left_after())


def test_ranks_and_scorers_on_different_hosts(cluster: Cluster, tmp_path: Path) -> None:
    seen = cluster.run(train, tmp_path)
    workers = {node.host.address for node in cluster.nodes[1:]}
    for what in ("shards", "RayTrainWorker", "ScorerActor"):
        assert seen.hosts[what] == workers, what
    # Of 96 rows that three hosts hold about alike some 6 % are more than a third on one of them.
    assert 0 < seen.outcome.metrics["moved_share"] < 0.15
    assert seen.left == []
    seen.outcome.check_rows(ROWS, round(0.9 * ROWS), batch_size=BATCH)
    check_order(seen.outcome, tmp_path)


def check_order(outcome: Outcome, folder: Path) -> None:
    """Every global batch is what the plain functions of one process make of the same scores."""
    first = min(path for path in (folder / "run").glob("checkpoint_*") if path.is_dir())
    saved = SavedCheckpoint(ray.train.Checkpoint.from_directory(first))
    score = np.concatenate([part.score for part in saved.scores(0, ROWS)])
    weights = (np.ones(ROWS), bss_ray.Learning(temperature=0.3).weights(score))
    for epoch, size in enumerate((ROWS, round(0.9 * ROWS))):
        order = bss_ray.weighted_permutation(weights[epoch], seed=SEED, epoch=epoch, size=size)
        batches = [order[start : start + BATCH] for start in range(0, size, BATCH)]
        assert [outcome.batches[epoch, number] for number in range(len(batches))] == [
            sorted(batch.tolist()) for batch in batches
        ]
