"""Jobs on a cluster that somebody else started, with two nodes and a token: `cluster/submit.sh` and Ray's client."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray.train
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

from bss_ray.train.checkpoint import SavedCheckpoint
from tests.commands import run_here
from tests.demo import EPOCHS, SETTINGS, figures, undisturbed
from tests.hosts import Cluster
from tests.leftovers import RAY_DATA, left_after
from tests.processes import ROOT, command_of, free_ports, marked

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("two_nodes"), pytest.mark.timeout(600)]

SUBMIT = ROOT / "cluster" / "submit.sh"
# Environment variable of a job's processes, its driver and its workers.
JOB = "BSS_RAY_TEST_JOB"
# The demo's model under another name; with a pause there is time to stop a run in the middle of an epoch.
MODEL = """
import time

from bss_ray.models import LateFusion

class Mine(LateFusion):
    def __init__(self, shapes, num_classes, pause: float = 0.0):
        super().__init__(shapes, num_classes)
        self.pause = pause

    def forward(self, batch):
        time.sleep(self.pause if self.training else 0)
        return super().forward(batch)
"""


@pytest.fixture
def client(two_nodes: Cluster) -> JobSubmissionClient:
    return JobSubmissionClient(two_nodes.dashboard_url)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder: settings, a model of their own, and results that must not be sent."""
    folder = tmp_path / "project"
    (folder / "runs").mkdir(parents=True)
    (folder / "my_model.py").write_text(MODEL)
    settings: dict[str, Any] = {
        "name": "mine",
        "storage_path": str(tmp_path / "shared"),
        "model": {"class_path": "my_model.Mine"},
    }
    for name, value in SETTINGS.items():
        group, _, key = name.rpartition(".")
        (settings.setdefault(group, {}) if group else settings)[key] = value
    (folder / "my.yaml").write_text(yaml.safe_dump(settings))
    return folder


def submit(cluster: Cluster, *words: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """Start `cluster/submit.sh` in a folder."""
    return subprocess.Popen(
        [SUBMIT, "--address", cluster.dashboard_url, *words],
        cwd=cwd,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output."""
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def wait_for_end(client: JobSubmissionClient, job: str) -> JobStatus:
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.2)
    return status


def check_same_as_undisturbed(run: Path) -> None:
    """All but what depends on the clock, and on which rows lie on which node."""
    assert len(figures(run)) == EPOCHS
    assert figures(run) == figures(undisturbed().folder)
    there, here = (json.loads((folder / "result.json").read_text()) for folder in (run, undisturbed().folder))
    assert there == here


def check_nothing_left(mark: str) -> None:
    """No actor, placement group or process, within half a minute."""
    assert left_after() == []
    deadline = time.monotonic() + 30
    while (left := processes_of(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def processes_of(mark: str) -> list[str]:
    """Titles of a job's processes, but for the actors that Ray Data keeps for all jobs and starts in the first."""
    titles = [" ".join(command_of(pid)) for pid in marked(JOB, mark)]
    return [title for title in titles if title and title.removeprefix("ray::") not in RAY_DATA]


def test_a_job_runs_to_its_end_as_the_command_does_here(two_nodes: Cluster, project: Path, tmp_path: Path) -> None:
    mark = secrets.token_hex(8)
    code, output = ended(submit(two_nodes, "--env", f"{JOB}={mark}", "train", "--config", "my.yaml", cwd=project))
    assert code == 0, output
    assert "submitted train-mine-" in output
    assert "succeeded" in output
    # The job's own log: nothing that only a terminal understands, and one line an epoch.
    assert "val fused" in output
    assert "\x1b" not in output
    assert "\r" not in output
    assert re.findall(r"^ +(\d+) +\d+ .*%", output, re.MULTILINE) == [str(epoch) for epoch in range(EPOCHS)]
    check_same_as_undisturbed(tmp_path / "shared" / "mine")
    check_nothing_left(mark)


@pytest.mark.slow
def test_a_job_outlives_who_follows_it_and_resumes_after_a_stop(
    two_nodes: Cluster, client: JobSubmissionClient, project: Path, tmp_path: Path
) -> None:
    mark, run = secrets.token_hex(8), tmp_path / "shared" / "long"
    options = ["--config", "my.yaml", "--name", "long", "--model.pause", "0.03"]
    followed = submit(two_nodes, "--env", f"{JOB}={mark}", "--id", f"long-{mark}", "train", *options, cwd=project)
    assert followed.stdout is not None
    for line in followed.stdout:
        if line.split()[:2] == ["0", "2156"]:  # the first epoch
            break
    followed.send_signal(signal.SIGINT)
    code, output = ended(followed)
    assert code == 130, output
    assert f"long-{mark} continues without being followed" in output
    assert client.get_job_status(f"long-{mark}") == JobStatus.RUNNING

    assert client.stop_job(f"long-{mark}")
    assert wait_for_end(client, f"long-{mark}") == JobStatus.STOPPED
    last = max(path for path in run.glob("checkpoint_*") if path.is_dir())
    position = SavedCheckpoint(ray.train.Checkpoint.from_directory(last)).manifest().position
    assert (0, 0) < (position.epoch, position.batch) < (EPOCHS, 0)
    assert position.batch > 0, "stopped in the middle of an epoch"
    check_nothing_left(mark)

    words = [sys.executable, "-m", "bss_ray.cli", "train", *options]
    environment = {"working_dir": str(project), "env_vars": {JOB: mark}}
    job = client.submit_job(entrypoint=shlex.join(words), runtime_env=environment)
    assert wait_for_end(client, job) == JobStatus.SUCCEEDED, client.get_job_logs(job)
    check_same_as_undisturbed(run)
    check_nothing_left(mark)


def test_a_failure_is_told_and_leaves_nothing(client: JobSubmissionClient, tmp_path: Path) -> None:
    mark = secrets.token_hex(8)
    words = ["train", "--storage_path", str(tmp_path), "--choose_by", "val_accuracy_fuse"]
    job = client.submit_job(
        entrypoint=shlex.join([sys.executable, "-m", "bss_ray.cli", *words]), runtime_env={"env_vars": {JOB: mark}}
    )
    assert wait_for_end(client, job) == JobStatus.FAILED
    assert client.get_job_info(job).driver_exit_code == 1
    assert "choose_by='val_accuracy_fuse' is no validation metric" in client.get_job_logs(job)
    check_nothing_left(mark)


def test_the_exit_code_is_passed_on(two_nodes: Cluster, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    words = ["--address", two_nodes.dashboard_url, "train", "--config", "my.yaml", "--loop.epoch", "2"]
    assert "Did you mean" in run_here("submit", *words, code=2)


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"RAY_AUTH_TOKEN": "f" * 64}, "Forbidden: Invalid authentication token"),
        ({"RAY_AUTH_MODE": "disabled"}, "Unauthorized: Missing authentication token"),
    ],
)
def test_a_wrong_or_missing_token_is_told(two_nodes: Cluster, project: Path, env: dict[str, str], told: str) -> None:
    code, output = ended(submit(two_nodes, "train", "--config", "my.yaml", cwd=project, **env))
    assert code == 1
    assert "wants its token and did not get it" in output
    assert told in output
    assert "Traceback" not in output


def test_nobody_at_the_address(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    [port] = free_ports(1)
    words = ["--address", f"http://127.0.0.1:{port}", "train", "--config", "my.yaml"]
    assert f"no Ray job server answers at http://127.0.0.1:{port}" in run_here("submit", *words, code=1)
