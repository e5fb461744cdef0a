"""A scoring job whose driver or actors are killed: no row is scored twice that is on the disk, and nothing is lost."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
import torch

from bss_ray.errors import ResourceError
from bss_ray.score.config import MAY_CHANGE, ModelSpec, ScoreConfig, resolve
from bss_ray.score.dataset import score_dataset
from bss_ray.score.job import SUMMARY_FILE, score
from bss_ray.score.measure_files import find_measure_files
from bss_ray.storage import StoragePath
from bss_ray.train.folder import RunFolder
from bss_ray.train.initial import Weights
from tests.commands import Command, start_command
from tests.scoring import (
    COLUMNS,
    forwarded,
    kills_in,
    make_columns,
    make_recorder,
    make_table,
    reference,
    score_options,
    write_folder,
)

pytestmark = [pytest.mark.fault, pytest.mark.slow]

ROWS, PIECE = 960, 32

CLOSE = {"rtol": 1e-5, "atol": 2e-6}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows, weights, and a place where models write down what they see."""
    write_folder(tmp_path / "rows", make_table(make_columns(ROWS)), [500], row_group=100)
    torch.save(make_recorder().state_dict(), tmp_path / "w.pt")
    (tmp_path / "log").mkdir()
    return tmp_path


def check_scores(path: Path) -> None:
    table = pq.read_table(path)
    assert table["row_id"].to_pylist() == list(range(ROWS))
    expected = reference(make_recorder(), make_columns(ROWS))["score"]
    np.testing.assert_allclose(table["score"].to_numpy(), expected, **CLOSE)


def start(folder: Path, *arguments: str) -> Command:
    options = score_options(folder) | {
        "model.log": folder / "log",
        "model.pause": "0.4",
        "piece_rows": PIECE,
        "batch_size": PIECE,
    }
    return start_command("score", *(f"--{name}={value}" for name, value in options.items()), *arguments)


def files(folder: Path) -> int:
    return len(find_measure_files(StoragePath.of(folder / "runs" / "scores" / "measures")))


def measured_already(out: str) -> int:
    """What a command that goes on says."""
    line = next(line for line in out.splitlines() if "rows are measured already" in line)
    return int(line.split()[0])


@pytest.mark.usefixtures("no_ray_session")
def test_killed_then_stopped_then_finished_scores_each_row_once(folder: Path) -> None:
    # Kill -9 of the driver.
    killed = start(folder)
    killed.wait_for(lambda: files(folder) >= 4)
    killed.kill()
    # The same command resumes; ctrl-C stops it in an orderly way.
    logs = [set((folder / "log").glob("*.log"))]
    stopped = start(folder)
    # By what its own actor does: that of the killed driver lives a little longer and goes on writing.
    stopped.wait_for(lambda: len(forwarded(folder / "log", logs[0])) > 3 * PIECE)
    out = stopped.interrupt()
    assert "the same command resumes" in out.lower()
    after_kill = measured_already(out)
    assert 4 * PIECE <= after_kill < ROWS
    seen = forwarded(folder / "log", logs[0])
    assert len(seen) == len(set(seen)), "a row was forwarded twice by one command"
    assert len(set(range(ROWS)) - set(seen)) >= after_kill, "rows on the disk were forwarded again"
    # And again, to the end, with a policy that may change.
    logs.append(set((folder / "log").glob("*.log")))
    after_stop = measured_already(start(folder, "--max_actors", "1").finish())
    seen = forwarded(folder / "log", logs[1])
    assert len(seen) == len(set(seen)) == ROWS - after_stop, "forwarded: what was missing, and once"
    assert after_stop > after_kill
    check_scores(folder / "runs" / "scores" / "scores.parquet")


def run_job(folder: Path, model: torch.nn.Module, **init_args: Any) -> Path:
    """A job in this process's Ray; the folder of its results."""
    spec = ModelSpec(class_path="tests.scoring.Recorder", init_args=init_args)
    settings: dict[str, Any] = {"piece_rows": PIECE, "batch_size": PIECE, "max_actors": 1, "name": "job"}
    config = ScoreConfig(
        data=str(folder / "rows"), columns=COLUMNS, model=spec, storage_path=str(folder / "runs"), **settings
    )
    job = resolve(config, Weights(model.state_dict(), "w.pt"))
    run = RunFolder(config.storage_path, config.name, may_change=MAY_CHANGE, result_file=SUMMARY_FILE)
    run.claim(job.to_yaml())
    score(job, run, lambda _message: None)
    return run.local


@pytest.mark.usefixtures("ray_session")
def test_a_killed_actor_costs_no_more_than_its_file(folder: Path) -> None:
    # Row 330 is in the middle of the first file's rows, which are one block: files 0 to 9 are on the disk by then.
    path = run_job(folder, make_recorder(), log=str(folder / "log"), kill_at=330)
    assert len(kills_in(folder / "log")) == 1, "the actor was never killed"
    seen = forwarded(folder / "log")
    assert sorted(seen) == list(range(ROWS)), "each row was forwarded once, but for the batch that died unrecorded"
    assert len(set((folder / "log").glob("*.log"))) >= 2, "another process went on"
    check_scores(path / "scores.parquet")


@pytest.mark.usefixtures("ray_session")
def test_score_dataset_outlives_a_killed_actor(folder: Path) -> None:
    model = make_recorder(log=str(folder / "log"), kill_at=330)
    dataset = ray.data.read_parquet(str(folder / "rows"), override_num_blocks=6)
    score_dataset(dataset, model, columns=COLUMNS, batch_size=PIECE, actors=(1, 1)).write_parquet(str(folder / "out"))
    assert len(kills_in(folder / "log")) == 1, "the actor was never killed"
    table = pq.read_table(folder / "out").sort_by("row_id")
    pq.write_table(table, folder / "sorted.parquet")
    check_scores(folder / "sorted.parquet")


@pytest.mark.usefixtures("ray_session")
def test_a_row_that_ends_every_actor_ends_the_job(folder: Path) -> None:
    with pytest.raises(ResourceError, match=r"3 actors were lost while they scored rows 320\.\.351"):
        run_job(folder, make_recorder(), log=str(folder / "log"), kill_at=330, kills=99)
    assert len(kills_in(folder / "log")) == 3
