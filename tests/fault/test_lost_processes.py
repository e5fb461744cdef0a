"""Killed processes and a full disk: training goes on from the last checkpoint and ends as if nothing had happened."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray.train

from bss_ray import Scoring
from bss_ray.data.shards import Shards
from bss_ray.errors import StorageError
from bss_ray.testing import Fault, FullDisk, Hang, KillActor, KillController, KillRank
from bss_ray.train.checkpoint import SavedCheckpoint
from tests.driver import start_driver
from tests.leftovers import address, left_after
from tests.runs import Faults, Outcome, make_shards, run

pytestmark = [pytest.mark.fault, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def shards(ray_session: None) -> Shards:
    return make_shards(3)


# Each with the engine whose state is the hardest to bring back: measures of the unfinished epoch are on the ranks and
# the holders, or scores are being made beside it.
ONLINE = Scoring(engine="online", momentum=0.5)
OVERLAPPED = Scoring(engine="actors", overlap=True, momentum=0.5)

Undisturbed = Callable[[Scoring, int], Outcome]


@pytest.fixture(scope="module")
def undisturbed(shards: Shards, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """How a run ends that nothing happens to; one for each engine."""
    known: dict[Scoring, Outcome] = {}

    def outcome(scoring: Scoring, ranks: int) -> Outcome:
        if scoring not in known:
            known[scoring] = train(tmp_path_factory.mktemp("undisturbed"), shards, scoring, ranks)
        return known[scoring]

    return outcome


def train(folder: Path, shards: Shards, scoring: Scoring, ranks: int, *faults: Fault) -> Outcome:
    """With a checkpoint every 3 batches: a run that goes on does so in the middle of an epoch."""
    return run(
        folder,
        shards,
        scoring=scoring,
        workers=ranks,
        update_interval=1,
        epochs=4,
        failures=3 if faults else 0,
        checkpoint_every=3,
        fault=Faults(faults) if faults else None,
    )


# (engine, ranks, what happens: action, epoch, global batch). The second start of several ranks costs 20 s, so there is
# one where it adds nothing.
FAULTS: dict[str, tuple[Scoring, int, list[tuple[Callable[[], None], int, int]]]] = {
    "killed rank": (ONLINE, 2, [(KillRank(), 1, 5)]),
    # A holder comes back without its scores, the coordinator without a score version: both must be noticed, and neither
    # is an error of the user's. In epoch 1 and 2 scores of the model after the epoch before are being made.
    "killed scorer, holder and coordinator": (
        OVERLAPPED,
        1,
        [(KillActor("scorer-0"), 1, 0), (KillActor("holder-0"), 2, 5), (KillActor("coordinator"), 3, 4)],
    ),
    "killed controller": (OVERLAPPED, 1, [(KillController(), 2, 5)]),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "killed rank" else pytest.mark.slow) for name in FAULTS]
)
def test_same_rows_and_metrics_as_undisturbed(
    name: str, shards: Shards, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    scoring, ranks, actions = FAULTS[name]
    faults = [
        Fault(action, marker=tmp_path / f"fault-{epoch}", epoch=epoch, batch=batch) for action, epoch, batch in actions
    ]
    outcome = train(tmp_path, shards, scoring, ranks, *faults)
    assert all(fault.happened() for fault in faults), "a fault was never injected"
    check(outcome, undisturbed(scoring, ranks))


def drive(folder: Path, *faults: Fault) -> Outcome:
    """A driver's whole work; the same command is the same call."""
    return train(folder, make_shards(3), OVERLAPPED, 1, *faults)


@pytest.mark.slow
def test_the_same_command_after_its_driver_was_killed(undisturbed: Undisturbed, tmp_path: Path) -> None:
    env = {**os.environ, "RAY_ADDRESS": address()}
    stuck = Fault(Hang(600), marker=tmp_path / "fault", epoch=2, batch=5)
    driver = start_driver(tmp_path, env, [], drive, tmp_path, stuck)
    while not stuck.happened():
        assert driver.process.poll() is None, driver.log
        time.sleep(0.1)
    driver.process.kill()
    assert left_after() == []
    outcome = start_driver(tmp_path, env, [], drive, tmp_path, stuck).result(200)
    check(outcome, undisturbed(OVERLAPPED, 1))


def check(outcome: Outcome, undisturbed: Outcome) -> None:
    assert outcome.resumed
    assert outcome.batches == undisturbed.batches
    assert outcome.figures == undisturbed.figures
    assert left_after() == []


@pytest.mark.slow
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
    assert left_after() == []
