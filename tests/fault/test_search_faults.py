"""`bss-ray tune` killed, stopped, given again and finished: nothing is lost, nothing counts twice."""

import json
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState

from bss_ray.tune.record import load_study
from tests.commands import Command, start_command
from tests.searches import by_command

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.usefixtures("no_ray_session")]

TRIALS, EPOCHS = 3, 5


def search(folder: Path) -> Command:
    return start_command(*by_command(folder, TRIALS, EPOCHS, "Slow", compare_seeds=0))


def trials_of(folder: Path) -> list[FrozenTrial]:
    if not (folder / "tune" / "study.journal").exists():
        return []
    try:
        return load_study(None, "tune", folder / "tune").trials
    except OSError:
        return []  # the study is just being made


def got_on(folder: Path, finished: int, epochs: int) -> bool:
    """Whether so many trials are finished and a running one has done so many epochs."""
    trials = trials_of(folder)
    running = [len(trial.intermediate_values) for trial in trials if trial.state == TrialState.RUNNING]
    return sum(trial.state.is_finished() for trial in trials) >= finished and max(running, default=0) >= epochs


def test_a_search_killed_then_stopped_then_given_again(tmp_path: Path) -> None:
    killed = search(tmp_path)
    killed.wait_for(lambda: got_on(tmp_path, finished=0, epochs=3))
    killed.kill()
    before = trials_of(tmp_path)

    stopped = search(tmp_path)
    stopped.wait_for(lambda: got_on(tmp_path, finished=1, epochs=1))
    assert "the same command resumes" in stopped.interrupt().lower()

    assert "\x1b" not in search(tmp_path).finish(), "no cursor tricks off a terminal"
    trials = trials_of(tmp_path)
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert all(trial.state == TrialState.COMPLETE for trial in trials)
    assert all(list(trial.intermediate_values) == list(range(1, EPOCHS + 1)) for trial in trials)
    for trial in before:
        if trial.state.is_finished():  # kept, not run again
            assert trials[trial.number].datetime_complete == trial.datetime_complete
        elif len(trial.intermediate_values) >= 3:  # went on from its checkpoint
            log = (tmp_path / "tune" / "trials" / f"{trial.number:05d}-again-1" / "result.json").read_text()
            assert json.loads(log.splitlines()[0])["epochs_done"] >= 3
    result = json.loads((tmp_path / "tune" / "result.json").read_text())
    assert result["trials"] == {"complete": TRIALS, "pruned": 0, "fail": 0}
    assert (tmp_path / "tune" / "report.html").exists()
