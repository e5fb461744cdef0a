"""A node that its cloud takes back: a checkpoint is written first, training goes on elsewhere, and it is no failure."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
from ray.cluster_utils import Cluster

from bss_ray import Scoring
from bss_ray.runtime.messages import Notice
from bss_ray.testing import Fault
from bss_ray.train.checkpoint import SavedCheckpoint
from tests.runs import ROWS, make_shards, run

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.outage, pytest.mark.usefixtures("no_ray_session")]

EPOCHS = 6
DRAWN = round(0.9 * ROWS)


@dataclass(frozen=True)
class TakeNode:
    """Tell Ray as `cluster/launcher/spot-notice.sh` does that this rank's node goes, and kill its raylet later."""

    notice_s: int

    def __call__(self) -> None:
        context = ray.get_runtime_context()
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", context.gcs_address]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test takes it back"]
        node = ["--node-id", context.get_node_id(), "--deadline-remaining-seconds", str(self.notice_s)]
        subprocess.run([*command, *reason, *node], check=True, capture_output=True)
        raylet = os.getppid()
        subprocess.Popen(f"sleep {self.notice_s}; kill -9 {raylet}", shell=True, start_new_session=True)


@dataclass(frozen=True)
class Slowly:
    """Half a second a batch, so that the notice comes in the middle of the run; and a fault."""

    fault: Fault

    def reached(self, epoch: int, batch: int, **where: Any) -> None:
        time.sleep(0.5)
        self.fault.reached(epoch, batch, **where)


@pytest.fixture
def two_workers() -> Iterator[Cluster]:
    """A head without CPUs, as in `cluster/`, and two nodes that each have room for the whole run."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_taken_node_is_saved_for_and_no_failure(two_workers: Cluster, tmp_path: Path) -> None:
    fault = Fault(TakeNode(notice_s=15), marker=tmp_path / "fault", epoch=1, batch=1)
    notices: list[str] = []
    outcome = run(
        tmp_path,
        make_shards(3),
        workers=1,
        scoring=Scoring(engine="workers"),
        failures=0,  # without the notice this run would end with one
        epochs=EPOCHS,
        fault=Slowly(fault),
        on_message=lambda message: notices.append(message.text if isinstance(message, Notice) else ""),
    )
    assert fault.happened()
    saved = re.search(r"about to be taken away: saved at epoch (\d+), batch (\d+)", "\n".join(notices))
    assert saved is not None, notices
    positions = [
        SavedCheckpoint(ray.train.Checkpoint.from_directory(path)).manifest().position
        for path in (tmp_path / "run").glob("checkpoint_*")
        if path.is_dir()
    ]
    assert tuple(map(int, saved.groups())) in [(position.epoch, position.batch) for position in positions]
    assert outcome.resumed
    outcome.check_rows(ROWS, *[DRAWN] * (EPOCHS - 1))
    deadline = time.monotonic() + 60  # the run may well end before the notice does
    while (nodes := sum(node["Alive"] for node in ray.nodes())) != 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert nodes == 2
