"""A raylet killed -9 in the middle of an epoch, with a rank, actors and shards on its node."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import ray

from bss_ray import Scoring
from bss_ray.data.store import StoreConfig
from bss_ray.errors import StorageError
from bss_ray.testing import Fault
from tests.hosts import Cluster, Host, started
from tests.leftovers import actors_off_the_head
from tests.runs import BATCH, ROWS, Outcome, batches_of, make_spread_shards, run

pytestmark = [
    pytest.mark.fault,
    pytest.mark.slow,
    pytest.mark.outage,
    pytest.mark.usefixtures("no_ray_session"),
    pytest.mark.timeout(600),
]

EPOCHS = 3  # what the loader has made ahead of epoch 1 may hold all of its rows


@dataclass(frozen=True)
class LoseNode:
    """Keep what has been drawn so far and what is there, then kill -9 a raylet that is not the head's.

    Attributes:
        raylet: its process.
        folder: of the run.
    """

    raylet: int
    folder: Path

    def __call__(self) -> None:
        shutil.copytree(self.folder / "audit", self.folder / "before")
        (self.folder / "roles").write_text(" ".join(actors_off_the_head()))
        os.kill(self.raylet, signal.SIGKILL)


def train(folder: Path, raylet: int, *, ranks: int = 2, store: StoreConfig | None = None) -> tuple[Outcome, int]:
    """Train on both nodes and lose one; how the run ends, and how many shards were there."""
    shards = make_spread_shards(store=store)
    fault = Fault(LoseNode(raylet, folder), marker=folder / "fault", epoch=1, batch=5, rank=0)
    here = ray.get_runtime_context().get_node_id()
    scoring = Scoring(engine="actors", num_holders=2, num_scorers=2, momentum=0.5)
    outcome = run(
        folder,
        shards,
        workers=ranks,
        placement="SPREAD",
        scoring=scoring,
        failures=2,
        checkpoint_every=3,
        epochs=EPOCHS,
        fault=fault,
    )
    return outcome, sum(part.node != here for part in shards.parts)


@contextlib.contextmanager
def a_node_is_lost() -> Iterator[None]:
    """Inside; and Ray knows it afterwards. A lost node counts as alive for some seconds."""
    before = sum(node["Alive"] for node in ray.nodes())
    yield
    deadline = time.monotonic() + 60
    while sum(node["Alive"] for node in ray.nodes()) == before:
        assert time.monotonic() < deadline, f"there are still {before} nodes after 60 s"
        time.sleep(0.1)


def train_once(folder: Path, raylet: int) -> tuple[Outcome, int]:
    """With rows in the object store: how the run ends, and how many shards were on the node."""
    with a_node_is_lost():
        return train(folder, raylet)


def train_twice(folder: Path, raylet: int) -> tuple[str, Outcome]:
    """With rows on the nodes' disks: how the run ends, and how the same one does that goes on."""
    store = StoreConfig(kind="disk", folder=str(folder / "cache"))
    with (
        a_node_is_lost(),
        pytest.raises(StorageError, match="a node is gone, and with it the shards on its disk") as caught,
    ):
        train(folder, raylet, ranks=1, store=store)
    return str(caught.value), train(folder, raylet, ranks=1, store=store)[0]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with started(Cluster(), Host()) as cluster:
        yield cluster


def check_rows(folder: Path, outcome: Outcome) -> None:
    """Each planned row came exactly once in each epoch, and what came twice was the same."""
    assert outcome.resumed
    outcome.check_rows(ROWS, *[round(0.9 * ROWS)] * (EPOCHS - 1))
    # Global batches 3 and 4 of epoch 1 came after the checkpoint, and again in the next attempt. Of batch 5 not all
    # ranks need have written what they got.
    before = {key: rows for key, rows in batches_of(folder / "before").items() if key < (1, 5)}
    assert len(before) == -(-ROWS // BATCH) + 5
    assert before == {key: outcome.batches[key] for key in before}


def test_training_goes_on_without_the_node(cluster: Cluster, tmp_path: Path) -> None:
    outcome, shards_there = cluster.run(train_once, tmp_path, cluster.nodes[1].raylet)
    assert {"RayTrainWorker", "ScorerActor"} <= set((tmp_path / "roles").read_text().split())
    assert shards_there
    check_rows(tmp_path, outcome)
    assert outcome.metrics["moved_share"] == 0, "shards belong to the node where they were made again"


def test_rows_on_the_disk_of_the_node(cluster: Cluster, tmp_path: Path) -> None:
    node = cluster.add_node(Host())
    error, outcome = cluster.run(train_twice, tmp_path, node.raylet)
    assert "Run again" in error
    check_rows(tmp_path, outcome)
