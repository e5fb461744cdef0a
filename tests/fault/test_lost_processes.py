"""Killed processes: training goes on from the last checkpoint and ends as if nothing had happened."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from bss_ray.data.shards import Shards
from tests.runs import Outcome, kill_self, make_shards, run

pytestmark = [pytest.mark.fault, pytest.mark.usefixtures("ray_session")]
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def shards(ray_session: None) -> Shards:
    return make_shards(3)


@pytest.fixture(scope="module")
def undisturbed(shards: Shards, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(tmp_path_factory.mktemp("undisturbed"), shards)


def _kill_actor(name_part: str) -> None:
    name = next(name for name in ray.util.list_named_actors() if name_part in name)
    actor = ray.get_actor(name)
    os.kill(ray.get(actor.__ray_call__.remote(lambda _self: os.getpid())), signal.SIGKILL)


def kill_scorer() -> None:
    """Kill -9 one scorer: Ray restarts it without its scores, which must be noticed."""
    _kill_actor("-scorer-0")


def kill_coordinator() -> None:
    """Kill -9 the coordinator: it comes back without a score version, which is no error of the user's."""
    _kill_actor("-coordinator")


FAULTS = [kill_self, kill_scorer, kill_coordinator]


@pytest.mark.parametrize("fault", FAULTS, ids=["rank", "scorer", "coordinator"])
def test_same_rows_and_metrics_as_undisturbed(
    fault: Callable[[], None], shards: Shards, undisturbed: Outcome, tmp_path: Path
) -> None:
    # A checkpoint every 3 batches: the run resumes in the middle of an epoch.
    outcome = run(tmp_path, shards, failures=3, checkpoint_every=3, fault=fault)
    assert (tmp_path / "audit" / "failed").exists(), "the fault was never injected"
    assert outcome.batches == undisturbed.batches
    assert outcome.figures == undisturbed.figures
