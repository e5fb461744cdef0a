"""`bss-ray tune` killed, stopped, given again and finished: nothing is lost, nothing counts twice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState

from bss_ray.tune.record import load_study

pytestmark = [pytest.mark.fault, pytest.mark.usefixtures("no_ray_session")]

TRIALS, EPOCHS = 3, 5
SETTINGS: dict[str, Any] = {
    "space": "tests.searches:temperatures",
    "trials": TRIALS,
    "compare_seeds": 0,
    "pruning": {"enabled": False},
    "train": {
        "data": "tests.searches:data",
        "columns": {"modalities": ["a", "b"], "label": "label"},
        "model": {"class_path": "tests.searches.Slow"},
        "loop": {"epochs": EPOCHS, "lr": 0.02},
        "batch_size": 16,
    },
}


def start(folder: Path, command: str, *arguments: str) -> subprocess.Popen[str]:
    """The command in a process group of its own, so that a test stops what it started and nothing else."""
    return subprocess.Popen(
        [sys.executable, "-m", "bss_ray.cli", command, *arguments, "--storage_path", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def search(folder: Path) -> subprocess.Popen[str]:
    (folder / "search.yaml").write_text(yaml.safe_dump(SETTINGS))
    return start(folder, "tune", "--config", str(folder / "search.yaml"))


def trials_of(folder: Path) -> list[FrozenTrial]:
    if not (folder / "tune" / "study.journal").exists():
        return []
    try:
        return load_study(None, "tune", folder / "tune").trials
    except OSError:
        return []  # the study is just being made


def wait(folder: Path, process: subprocess.Popen[str], finished: int, epochs: int) -> None:
    """Until so many trials are finished and a running one has done so many epochs."""
    deadline = time.monotonic() + 200
    while True:
        trials = trials_of(folder)
        running = [len(trial.intermediate_values) for trial in trials if trial.state == TrialState.RUNNING]
        if sum(trial.state.is_finished() for trial in trials) >= finished and max(running, default=0) >= epochs:
            return
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the search does not get on"
        time.sleep(0.05)


def test_a_search_killed_then_stopped_then_given_again(tmp_path: Path) -> None:
    killed = search(tmp_path)
    wait(tmp_path, killed, finished=0, epochs=3)
    killed.kill()
    killed.communicate()
    before = trials_of(tmp_path)

    stopped = search(tmp_path)
    wait(tmp_path, stopped, finished=1, epochs=1)
    os.killpg(stopped.pid, signal.SIGINT)
    out, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 130, out
    assert "the same command resumes" in out.lower()

    again = search(tmp_path)
    out, _ = again.communicate(timeout=240)
    assert again.returncode == 0, out
    assert "\x1b" not in out, "no cursor tricks off a terminal"
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
