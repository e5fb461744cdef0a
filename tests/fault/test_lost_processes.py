"""Killed processes and a full disk: training goes on from the last checkpoint and ends as if nothing had happened."""

from collections.abc import Callable
from pathlib import Path

import pytest
import ray.train

from bss_ray import Scoring
from bss_ray.data.shards import Shards
from bss_ray.errors import StorageError
from bss_ray.testing import Fault, FullDisk, KillActor, KillRank
from bss_ray.train.checkpoint import SavedCheckpoint
from tests.runs import Faults, make_shards, run

pytestmark = [pytest.mark.fault, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def shards(ray_session: None) -> Shards:
    return make_shards(3)


# Each with the engine whose state is the hardest to bring back: measures of the unfinished epoch are on the ranks and
# the holders, or scores are being made beside it.
ONLINE = Scoring(engine="online", momentum=0.5)
OVERLAPPED = Scoring(engine="actors", overlap=True, momentum=0.5)

# (engine, ranks, what happens: action, epoch, global batch)
FAULTS: dict[str, tuple[Scoring, int, list[tuple[Callable[[], None], int, int]]]] = {
    "killed rank": (ONLINE, 2, [(KillRank(), 1, 5)]),
    # A holder comes back without its scores, the coordinator without a score version: both must be noticed, and neither
    # is an error of the user's. In epoch 2 scores of the model after epoch 1 are being made.
    "killed holder, then coordinator": (
        OVERLAPPED,
        1,  # the second start of several ranks would add 20 s and nothing
        [(KillActor("holder-0"), 2, 5), (KillActor("coordinator"), 3, 4)],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_same_rows_and_metrics_as_undisturbed(name: str, shards: Shards, tmp_path: Path) -> None:
    scoring, workers, actions = FAULTS[name]
    settings = {"scoring": scoring, "workers": workers, "update_interval": 1, "epochs": 4}
    undisturbed = run(tmp_path / "undisturbed", shards, **settings)  # type: ignore[arg-type]
    faults = Faults(
        tuple(
            Fault(action, marker=tmp_path / f"fault-{epoch}", epoch=epoch, batch=batch)
            for action, epoch, batch in actions
        )
    )
    # A checkpoint every 3 batches: the run resumes in the middle of an epoch.
    outcome = run(tmp_path, shards, failures=3, checkpoint_every=3, fault=faults, **settings)  # type: ignore[arg-type]
    assert faults.happened(), "a fault was never injected"
    assert outcome.resumed
    assert outcome.batches == undisturbed.batches
    assert outcome.figures == undisturbed.figures


def test_a_full_disk_ends_the_run_and_leaves_the_last_good_state(shards: Shards, tmp_path: Path) -> None:
    fault = Fault(FullDisk(), marker=tmp_path / "fault", epoch=1, batch=5)
    with pytest.raises(StorageError, match="cannot be written"):
        run(tmp_path, shards, workers=1, failures=3, checkpoint_every=3, fault=fault)
    assert fault.happened()
    last = max(path for path in (tmp_path / "run").glob("checkpoint_*") if path.is_dir())
    saved = SavedCheckpoint(ray.train.Checkpoint.from_directory(last))
    position = saved.manifest_for(fingerprint=shards.fingerprint, seed=7).position
    assert (position.epoch, position.batch) == (1, 3)
    assert sum(len(part.score) for part in saved.scores(0, shards.rows)) == shards.rows
    assert saved.state("model").keys()
