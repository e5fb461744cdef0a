"""Jobs on a cluster that somebody else started, with two raylets and a token."""

from __future__ import annotations

import csv
import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.train

from bss_ray.train.checkpoint import SavedCheckpoint
from tests.hosts import BIN, Cluster, Host, started
from tests.leftovers import RAY_DATA, left_after
from tests.processes import ROOT, command_of, marked

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_ray_session"), pytest.mark.timeout(600)]

EPOCHS = 4
# Environment variable of a job's processes, its driver and its workers.
JOB = "BSS_RAY_TEST_JOB"
# Of metrics.csv: what depends on the clock, and on which rows lie on which node.
_ELSEWHERE = re.compile("seconds|per_second|stall|moved")

CLIENT = """
import json, sys, time
from ray.job_submission import JobSubmissionClient
address, entrypoint, runtime_env = sys.argv[1:]
client = JobSubmissionClient(address)
job = client.submit_job(entrypoint=entrypoint, runtime_env=json.loads(runtime_env))
while not client.get_job_status(job).is_terminal():
    time.sleep(0.5)
print(json.dumps([client.get_job_status(job), client.get_job_logs(job), client.get_job_info(job).driver_exit_code]))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # On the head there is room for both ranks even while Ray still holds CPUs of an earlier job: apart they would have
    # other rows each, and gradients other rounding.
    with started(Cluster(Host(cpus=4), dashboard=True), Host()) as cluster:
        yield cluster


def command(storage: Path, *options: str) -> list[str]:
    settings = ("--storage_path", str(storage), "--name", "run", "--loop.epochs", str(EPOCHS), "--num_workers", "2")
    # Small batches: an epoch takes some seconds, so that a job can be stopped in the middle of one.
    # Actors score in all places; `auto` would have the ranks do so where they leave no CPUs.
    settings += ("--batch_size", "16", "--scoring.engine", "actors")
    return [str(BIN / "bss-ray"), "train", *settings, *options]


def runtime_env(mark: str) -> str:
    variables = {"PYTHONPATH": str(ROOT), "RAY_JOB_STOP_WAIT_TIME_S": "120", JOB: mark}
    return json.dumps({"env_vars": variables})


def job_command(cluster: Cluster, action: str, *options: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit` and the like."""
    return cluster.command(BIN / "ray", "job", action, "--address", cluster.dashboard_url, *options)


def submit(cluster: Cluster, argv: list[str], mark: str, *options: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit`: it follows the log."""
    return job_command(cluster, "submit", "--runtime-env-json", runtime_env(mark), *options, "--", *argv)


def by_client(cluster: Cluster, argv: list[str], mark: str) -> tuple[str, str, int]:
    """`JobSubmissionClient`: status, log and exit code."""
    done = cluster.command(sys.executable, "-c", CLIENT, cluster.dashboard_url, " ".join(argv), runtime_env(mark))
    status, log, code = json.loads(done.stdout.splitlines()[-1])
    return status, log, code


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same command on this machine alone."""
    storage = tmp_path_factory.mktemp("local")
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command(storage), env=env, check=True, capture_output=True, timeout=240)
    return storage / "run"


def figures(run: Path) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """metrics.csv and result.json."""
    with (run / "metrics.csv").open() as file:
        rows = [
            {name: float(value) for name, value in row.items() if not _ELSEWHERE.search(name)}
            for row in csv.DictReader(file)
        ]
    return rows, json.loads((run / "result.json").read_text())


def check_same(run: Path, local: Path) -> None:
    there, here = figures(run), figures(local)
    assert there == here


def check_log(log: str) -> None:
    """Nothing that only a terminal understands, and one line an epoch."""
    assert "\x1b" not in log
    assert "\r" not in log
    epochs = re.findall(r"^ +(\d+) +\d+ .*%", log, re.MULTILINE)
    assert epochs == [str(epoch) for epoch in range(EPOCHS)]


def check_nothing_left(cluster: Cluster, mark: str) -> None:
    """No actor, placement group or process, within half a minute."""
    assert cluster.run(left_after) == []
    deadline = time.monotonic() + 30
    while (left := processes_of(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left == []


def processes_of(mark: str) -> list[str]:
    """Titles of a job's processes, but for the actors that Ray Data keeps for all jobs and starts in the first."""
    titles = [" ".join(command_of(pid)) for pid in marked(JOB, mark)]
    return [title for title in titles if title.removeprefix("ray::") not in RAY_DATA]


def test_ray_job_submit(cluster: Cluster, local: Path, tmp_path: Path) -> None:
    mark = secrets.token_hex(8)
    job = submit(cluster, command(tmp_path), mark)
    assert job.returncode == 0, job.stdout
    check_same(tmp_path / "run", local)
    check_nothing_left(cluster, mark)


def test_job_client(cluster: Cluster, local: Path, tmp_path: Path) -> None:
    mark = secrets.token_hex(8)
    status, log, code = by_client(cluster, command(tmp_path), mark)
    assert (status, code) == ("SUCCEEDED", 0), log
    check_log(log)
    check_same(tmp_path / "run", local)
    check_nothing_left(cluster, mark)


def test_a_stopped_job_goes_on(cluster: Cluster, local: Path, tmp_path: Path) -> None:
    mark = secrets.token_hex(8)
    submit(cluster, command(tmp_path), mark, "--no-wait", "--submission-id", mark)
    while not (tmp_path / "run" / "metrics.csv").exists():  # after epoch 0
        time.sleep(0.1)
    stopped = job_command(cluster, "stop", mark)
    assert "was stopped" in stopped.stdout, stopped
    position = last_checkpoint(tmp_path / "run").manifest().position
    assert (0, 0) < (position.epoch, position.batch) < (EPOCHS, 0)
    assert position.batch > 0, "stopped in the middle of an epoch"
    check_nothing_left(cluster, mark)
    assert submit(cluster, command(tmp_path), mark).returncode == 0
    check_same(tmp_path / "run", local)


def last_checkpoint(run: Path) -> SavedCheckpoint:
    folder = max(path for path in run.glob("checkpoint_*") if path.is_dir())
    return SavedCheckpoint(ray.train.Checkpoint.from_directory(folder))


def test_a_failure_is_told_and_leaves_nothing(cluster: Cluster, tmp_path: Path) -> None:
    mark = secrets.token_hex(8)
    status, log, code = by_client(cluster, command(tmp_path, "--choose_by", "val_accuracy_fuse"), mark)
    assert status == "FAILED"
    assert code == 1, log
    assert "choose_by='val_accuracy_fuse' is no validation metric" in log
    check_nothing_left(cluster, mark)
