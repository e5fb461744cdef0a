"""`bss-ray train` as a user runs it: real processes, real signals, real files."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray.train
from sklearn.metrics import roc_auc_score

from bss_ray.names import CLOCKED
from bss_ray.train.checkpoint import SavedCheckpoint

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_ray_session")]

EPOCHS = 4
COMMAND = [sys.executable, "-m", "bss_ray.cli", "train", "--loop.epochs", str(EPOCHS), "--loop.checkpoint_every", "40"]
# Small batches, so that an epoch is long enough to be stopped in.
COMMAND += ["--batch_size", "16"]
# Starting several ranks takes 12 to 26 s, five times here; what several do is tested elsewhere.
COMMAND += ["--num_workers", "1"]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """The command in a process group of its own, so that a test stops what it started and nothing else."""
    return subprocess.Popen(
        [*COMMAND, "--storage_path", str(folder), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    return out


def metrics(folder: Path) -> list[dict[str, str]]:
    """The epochs of `metrics.csv`, without the clock's columns."""
    path = folder / "demo" / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if not name.startswith(CLOCKED)} for row in rows]


def wait_for_epochs(folder: Path, epochs: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while len(metrics(folder)) < epochs:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"no epoch {epochs} within 200 s"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, finish(start(folder))


def test_what_a_run_prints_and_writes(undisturbed: tuple[Path, str]) -> None:
    folder, out = undisturbed
    run = folder / "demo"
    header = next(line for line in out.splitlines() if "epoch" in line and "val fused" in line)
    for column in ("rows", "eff. size", "loss", "val audio", "val image", "scoring s", "planning s", "training s"):
        assert column in header
    assert "\x1b" not in out, "no cursor tricks off a terminal"
    for name in ("config.yaml", "metrics.csv", "scores.parquet", "result.json", "report.html", "tensorboard"):
        assert (run / name).exists(), name
        assert str(run / name) in out, name
    assert len(metrics(folder)) == EPOCHS
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    best = max(range(EPOCHS), key=lambda epoch: float(metrics(folder)[epoch]["val_accuracy_fused"]))
    assert float(metrics(folder)[result["chosen_epoch"]]["val_accuracy_fused"]) == pytest.approx(
        float(metrics(folder)[best]["val_accuracy_fused"])
    )
    assert result["test"]["test_accuracy_fused"] > 0.8


def test_mispaired_rows_get_lower_scores(undisturbed: tuple[Path, str]) -> None:
    folder, _ = undisturbed
    table = pq.read_table(folder / "demo" / "scores.parquet")
    assert table["row_id"].to_pylist() == list(range(len(table)))
    truth = table["mispaired"].to_numpy()
    assert truth.mean() == pytest.approx(0.4, abs=1e-3)
    area = roc_auc_score(truth, -table["score"].to_numpy())
    # Seen over 5 seeds: 0.922 to 0.949 after these 4 epochs, 0.978 to 0.984 after the demo's 15.
    assert area > 0.9
    result = json.loads((folder / "demo" / "result.json").read_text())
    assert result["score_roc_area"]["mispaired"] == pytest.approx(area, abs=1e-6)
    assert np.isfinite(table["score"].to_numpy()).all()


def test_killed_then_stopped_then_finished_equals_undisturbed(undisturbed: tuple[Path, str], tmp_path: Path) -> None:
    # Kill -9 of the driver.
    killed = start(tmp_path)
    wait_for_epochs(tmp_path, 1, killed)
    killed.kill()
    killed.communicate()
    done = len(metrics(tmp_path))
    assert done < EPOCHS
    # The same command goes on; ctrl-C stops it in an orderly way.
    stopped = start(tmp_path)
    wait_for_epochs(tmp_path, done + 1, stopped)
    os.killpg(stopped.pid, signal.SIGINT)
    out, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 130, out
    saved = re.search(r"the run is to stop: saved at epoch (\d+), batch (\d+)", out)
    assert saved is not None, out
    last = max(path for path in (tmp_path / "demo").glob("checkpoint_*") if path.is_dir())
    position = SavedCheckpoint(ray.train.Checkpoint.from_directory(last)).manifest().position
    assert (position.epoch, position.batch) == tuple(map(int, saved.groups()))
    assert "the same command resumes" in out.lower()
    assert not (tmp_path / "demo" / "result.json").exists()
    # And again, to the end: the same figures as a run that was never disturbed.
    finish(start(tmp_path))
    assert metrics(tmp_path) == metrics(undisturbed[0])
    # A complete run is shown, not repeated; another configuration is refused and harms nothing.
    assert "this run is complete" in finish(start(tmp_path))
    other = start(tmp_path, "--seed", "1")
    out, _ = other.communicate(timeout=60)
    assert other.returncode == 1
    assert "seed: 0 there, 1 now" in out
    assert metrics(tmp_path) == metrics(undisturbed[0])
