"""Killed processes and a full disk: training goes on from the last checkpoint and ends as if nothing had happened."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bss_ray.data.shards import Shards
from bss_ray.errors import StorageError
from bss_ray.testing import Fault, FullDisk, KillActor, KillRank
from tests.runs import Outcome, make_shards, run

pytestmark = [pytest.mark.fault, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def shards(ray_session: None) -> Shards:
    return make_shards(3)


@pytest.fixture(scope="module")
def undisturbed(shards: Shards, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run(tmp_path_factory.mktemp("undisturbed"), shards)


FAULTS: dict[str, Callable[[], None]] = {
    "killed rank": KillRank(),
    "killed scorer": KillActor("scorer-0"),  # it comes back without its scores, which must be noticed
    "killed coordinator": KillActor("coordinator"),  # it comes back without a score version: no error of the user's
}


@pytest.mark.parametrize("name", FAULTS)
def test_same_rows_and_metrics_as_undisturbed(name: str, shards: Shards, undisturbed: Outcome, tmp_path: Path) -> None:
    fault = Fault(FAULTS[name], marker=tmp_path / "fault", epoch=1, batch=5)
    # A checkpoint every 3 batches: the run resumes in the middle of an epoch.
    outcome = run(tmp_path, shards, failures=3, checkpoint_every=3, fault=fault)
    assert fault.happened(), "the fault was never injected"
    assert outcome.resumed
    assert outcome.batches == undisturbed.batches
    assert outcome.figures == undisturbed.figures


def test_a_full_disk_ends_the_run_and_the_next_goes_on(shards: Shards, undisturbed: Outcome, tmp_path: Path) -> None:
    fault = Fault(FullDisk(), marker=tmp_path / "fault", epoch=1, batch=5)
    with pytest.raises(StorageError, match="cannot be written"):
        run(tmp_path, shards, failures=3, checkpoint_every=3, fault=fault)
    assert fault.happened()
    outcome = run(tmp_path, shards, checkpoint_every=3, fault=fault)  # the same run, with space again
    assert outcome.resumed
    assert outcome.batches == undisturbed.batches
    assert outcome.figures == undisturbed.figures
