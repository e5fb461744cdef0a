"""Commands whose data, weights, run folders and results lie in an S3 bucket, served on this machine."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bss_ray.cli import main
from bss_ray.score.measure_files import find_measure_files
from bss_ray.storage import StoragePath
from bss_ray.train.initial import read_weights
from tests.commands import Command, epochs_of, start_command
from tests.s3 import KEYS, Server, s3_server
from tests.scoring import make_columns, make_recorder, make_table, reference, write_folder

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.usefixtures("no_ray_session"),
    pytest.mark.timeout(600),
]

ROWS, PIECE, EPOCHS = 480, 32, 3

CLOSE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    kept = {name: os.environ.get(name) for name in KEYS}
    os.environ.update(KEYS)
    with s3_server() as server:
        server.make_bucket("bucket")
        yield server
    for name, value in kept.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(scope="module")
def bucket(server: Server, tmp_path_factory: pytest.TempPathFactory) -> StoragePath:
    """Rows of three splits, and weights."""
    bucket, here = StoragePath.of(server.uri("bucket")), tmp_path_factory.mktemp("rows")
    for split, rows in (("train", ROWS), ("validation", 60), ("test", 60)):
        write_folder(here / split, make_table(make_columns(rows)), [rows // 2], row_group=100)
        for path in (here / split).iterdir():
            (bucket / "pairs" / split / path.name).write_bytes(path.read_bytes())
    (bucket / "w.pt").write(lambda stream: torch.save(make_recorder().state_dict(), stream))
    return bucket


def start(command: str, bucket: StoragePath, here: Path, **options: object) -> Command:
    """The command in the folder `here`."""
    given = {
        "data": bucket / "pairs",
        "storage_path": bucket / "runs",
        "columns.modalities": "[a, b]",
        "columns.id": "name",
        "model.class_path": "tests.scoring.Recorder",
        **options,
    }
    return start_command(command, *(f"--{name}={value}" for name, value in given.items()), cwd=here)


@pytest.fixture(scope="module")
def scores(bucket: StoragePath, tmp_path_factory: pytest.TempPathFactory) -> StoragePath:
    """The folder of a scoring job that was killed in the middle and went on."""
    here, folder = tmp_path_factory.mktemp("here"), bucket / "runs" / "scores"
    options = {
        "checkpoint": bucket / "w.pt",
        "piece_rows": PIECE,
        "batch_size": PIECE,
        "model.log": here,
        "model.pause": 0.4,
    }
    killed = start("score", bucket, here, **options)
    killed.wait_for(lambda: len(find_measure_files(folder / "measures")) >= 3)
    killed.kill()
    done = sum(piece.rows for piece in find_measure_files(folder / "measures"))
    assert done < ROWS
    out = start("score", bucket, here, **options).finish()
    already = next(int(line.split()[0]) for line in out.splitlines() if "rows are measured already" in line)
    assert done <= already < ROWS
    assert str(folder / "summary.json") in out
    assert all(name.endswith(".log") for name in os.listdir(here)), "nothing else lies in the working directory"
    return folder


def test_a_scoring_job_goes_on_after_a_kill(bucket: StoragePath, scores: StoragePath) -> None:
    table = (scores / "scores.parquet").read_table()
    assert table["row_id"].to_pylist() == list(range(ROWS))
    expected = reference(make_recorder(), make_columns(ROWS))["score"]
    np.testing.assert_allclose(table["score"].to_numpy(), expected, **CLOSE)
    assert json.loads((scores / "summary.json").read_text())["rows"] == ROWS
    names = ["config.yaml", "plan.json", "report.html", "scores.parquet", "summary.json"]
    assert [path.name for path in scores.glob()] == names


@pytest.fixture(scope="module")
def run(bucket: StoragePath, scores: StoragePath, tmp_path_factory: pytest.TempPathFactory) -> StoragePath:
    """The folder of a run that begins with those scores, was stopped in the middle and went on."""
    here, folder = tmp_path_factory.mktemp("here"), bucket / "runs" / "mine"
    options: dict[str, Any] = {
        "name": "mine",
        "initial_scores": scores / "scores.parquet",
        "num_workers": 1,
        "loop.epochs": EPOCHS,
        "loop.checkpoint_every": 3,
        "model.pause": 0.3,
        "model.log": here,  # without it there are no pauses
    }
    stopped = start("train", bucket, here, **options)
    stopped.wait_for(lambda: len(epochs_of(folder)) >= 1)
    assert "the same command resumes" in stopped.interrupt().lower()
    before = epochs_of(folder)
    assert 1 <= len(before) < EPOCHS
    assert not (folder / "result.json").exists()
    out = start("train", bucket, here, **options).finish()
    assert "(resumed)" in out
    assert epochs_of(folder)[: len(before)] == before
    assert str(folder / "report.html") in out
    assert all(name.endswith(".log") for name in os.listdir(here)), "nothing else lies in the working directory"
    return folder


def test_a_training_run_goes_on_after_a_stop(run: StoragePath) -> None:
    assert [row["epoch"] for row in epochs_of(run)] == [str(epoch) for epoch in range(EPOCHS)]
    result = json.loads((run / "result.json").read_text())
    assert set(result["test"]) >= {"test_accuracy_fused"}, "the test task has read the chosen checkpoint"
    table = (run / "scores.parquet").read_table()
    assert table["row_id"].to_pylist() == list(range(ROWS))
    assert np.isfinite(table["score"].to_numpy()).all()
    events = (run / "tensorboard").glob()
    assert len(events) == 2, "a file for each command"
    assert all(len(path.read_bytes()) > 500 for path in events)


def test_weights_of_a_run_and_its_report(run: StoragePath, capsys: pytest.CaptureFixture[str]) -> None:
    weights = read_weights(str(run))
    assert weights.settings["num_classes"] == 3
    assert weights.source.startswith(f"{str(run).partition('?')[0]}/checkpoint_")
    (run / "report.html").remove()
    assert main(["report", str(run)]) == 0
    assert "Validation accuracy" in (run / "report.html").read_text()
    assert f"wrote {run / 'report.html'}" in capsys.readouterr().out


def test_what_is_not_there_is_told_at_once(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    started = time.monotonic()
    assert main(["train", "--storage_path", server.uri("nowhere/runs")]) == 1
    assert "nowhere/runs/demo" in (error := capsys.readouterr().err)
    assert "Bucket 'nowhere' not found" in error
    assert "AWS_ACCESS_KEY_ID" in error
    assert main(["train", "--storage_path", "s3://bucket/runs?endpoint_override=127.0.0.1:1&scheme=http"]) == 1
    assert "Could not connect" in capsys.readouterr().err
    assert main(["report", server.uri("bucket/runs/gone")]) == 1
    assert "it has no config.yaml" in capsys.readouterr().err
    assert time.monotonic() - started < 150
