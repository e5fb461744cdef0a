"""`bss-ray train` as a job whose logs a program reads, and which profiles itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bss_ray.runtime.profiling import SCORING, STEP
from tests.commands import start_command
from tests.processes import short_folder

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_ray_session")]

EPOCHS = 2


@dataclass
class Job:
    lines: list[dict[str, Any]]
    folder: Path
    ray_logs: Path

    @property
    def profile(self) -> Path:
        return self.folder / "profile"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    runs = tmp_path_factory.mktemp("runs")
    ray_folder = short_folder()
    words = ["train", "--loop.epochs", EPOCHS, "--num_workers", 1, "--log_format", "json", "--profile", "true"]
    words += ["--scoring.engine", "actors", "--storage_path", runs]
    command = start_command(*words, env={**os.environ, "RAY_TMPDIR": str(ray_folder)}, errors=subprocess.PIPE)
    try:
        out, errors = command.process.communicate(timeout=280)
        assert command.process.returncode == 0, out + errors
        lines = [json.loads(line) for line in out.splitlines()]  # and nothing else
        (logs,) = ray_folder.rglob("session_latest/logs")
        yield Job(lines, runs / "demo", logs)
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)


def test_standard_output_is_json_lines_up_to_the_result(job: Job) -> None:
    events = [line["event"] for line in job.lines]
    assert [line["epoch"] for line in job.lines if line["event"] == "epoch"] == list(range(EPOCHS))
    assert {"status", "begin", "batch", "notice"} <= set(events)
    assert events[-1] == "result"
    assert job.lines[-1]["test"] == json.loads((job.folder / "result.json").read_text())["test"]
    epoch = next(line for line in job.lines if line["event"] == "epoch")
    assert (epoch["version"], epoch["rank"], epoch["run"]) == (1, 0, "demo")
    assert 0 < epoch["loader_stall_share"] < 1
    assert epoch["scoring_rows_per_second"] > 0


def records(job: Job) -> list[dict[str, Any]]:
    """What the run's processes have logged: ranks where Ray Train wants it, others on their standard error."""
    paths = [*job.ray_logs.glob("worker-*.err"), *job.ray_logs.glob("train/ray-train-app-worker-*.log")]
    lines = [line for path in paths for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.startswith("{") and '"role"' in line]


def test_logs_of_the_processes_are_json_with_epoch_version_rank_and_rays_ids(job: Job) -> None:
    found = records(job)
    by_role = {record["role"]: record for record in found}
    assert set(by_role) == {"rank", "scorer", "coordinator"}
    for record in by_role.values():
        assert {"job_id", "worker_id", "node_id", "actor_id", "epoch", "version", "rank"} <= set(record)
    assert (by_role["rank"]["rank"], by_role["rank"]["run"]) == (0, "demo")
    saved = [record["epoch"] for record in found if record["message"].startswith("saved a checkpoint")]
    assert sorted(saved) == list(range(EPOCHS))


def test_ray_starts_no_process_that_only_watches_others(job: Job) -> None:
    names = {path.name.rpartition(".")[0] for path in job.ray_logs.iterdir()}
    assert {"gcs_server", "raylet"} <= names
    assert not {"monitor", "log_monitor", "dashboard"} & names


def operators(job: Job, file: str) -> list[dict[str, Any]]:
    trace = json.loads((job.profile / file).read_text())
    events: list[dict[str, Any]] = trace["traceEvents"]
    return [event for event in events if event.get("cat") == "cpu_op" and event["ph"] == "X"]


def test_one_step_is_profiled_forwards_and_backwards(job: Job) -> None:
    found = operators(job, STEP)
    names = [event["name"] for event in found]
    assert {"aten::convolution", "aten::convolution_backward", "aten::linear"} <= set(names)
    assert names.count("aten::log_softmax") <= 20  # one step, not an epoch
    assert all(event["dur"] >= 0 and event["ts"] > 0 for event in found)


def test_one_scoring_pass_is_profiled_without_gradients(job: Job) -> None:
    names = {event["name"] for event in operators(job, SCORING)}
    assert "aten::convolution" in names
    assert not {name for name in names if "backward" in name}


def test_the_timeline_shows_what_processes_did(job: Job) -> None:
    events = json.loads((job.profile / "timeline.json").read_text())
    assert {event["ph"] for event in events} == {"X"}
    names = {event["name"] for event in events}
    assert {"__init__", "measure"} <= names
    assert min(event["ts"] for event in events) > 1e6 * (job.folder / "config.yaml").stat().st_mtime


def test_the_summary_names_the_largest_operators(job: Job) -> None:
    step, scoring = (job.profile / "summary.txt").read_text().split(SCORING)
    assert step.startswith(STEP)
    for part in (step, scoring):
        assert "Self CPU" in part
        assert "aten::" in part
