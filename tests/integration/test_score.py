"""score_dataset and the scoring job on a real Ray: scores that do not depend on actors, blocks or files."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.data
import torch

from bss_ray.data.build import build_shards
from bss_ray.errors import CheckpointError, DataError, ModelOutputError, ResourceError
from bss_ray.measure.measurer import Measurer
from bss_ray.runtime.messages import Message, Notice, RowsProgress
from bss_ray.runtime.wait import DEFAULT_LIMIT_S, WaitError, set_wait_limit
from bss_ray.score.config import MAY_CHANGE, ModelSpec, ScoreConfig, resolve
from bss_ray.score.dataset import score_dataset
from bss_ray.score.job import SUMMARY_FILE, score
from bss_ray.scoring.scorer import Scorer
from bss_ray.train.folder import RunFolder
from bss_ray.train.initial import Weights
from tests.commands import run_here
from tests.scoring import (
    COLUMNS,
    forwarded,
    make_columns,
    make_recorder,
    make_table,
    reference,
    score_options,
    write_folder,
)
from tests.support import join_calls

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

ROWS = 300
SPEC = ModelSpec(class_path="tests.scoring.Recorder")

# What a float32 forward pass is from one in float64.
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def read(dataset: ray.data.Dataset) -> dict[str, np.ndarray]:
    return as_arrays(pa.concat_tables(ray.get(dataset.to_arrow_refs())))


def as_arrays(table: pa.Table) -> dict[str, np.ndarray]:
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


@pytest.fixture(scope="module")
def columns() -> dict[str, Any]:
    return make_columns(ROWS)


@pytest.fixture(scope="module")
def gone() -> dict[str, np.ndarray]:
    """Which rows lack which modality; the first rows of all lack `a`."""
    rng = np.random.default_rng(8)
    lacking = rng.integers(0, 8, ROWS)
    lacking[:40] = 0
    return {"a": lacking == 0, "b": lacking == 1}


@pytest.fixture(scope="module")
def scored(ray_session: None, columns: dict[str, Any]) -> dict[str, np.ndarray]:
    """With one actor, over blocks of other sizes than batches."""
    dataset = ray.data.from_arrow(make_table(columns)).repartition(4)
    return read(score_dataset(dataset, make_recorder(), columns=COLUMNS, batch_size=64, actors=(1, 1)))


def config_of(tmp_path: Path, data: Path, **settings: Any) -> ScoreConfig:
    given: dict[str, Any] = {
        "piece_rows": 32,
        "max_actors": 1,
        "batch_size": 64,
        "storage_path": str(tmp_path),
        **settings,
    }
    return ScoreConfig(data=str(data), columns=COLUMNS, model=SPEC, **given)


def run_job(config: ScoreConfig, model: torch.nn.Module) -> tuple[dict[str, Any], Path, list[Message]]:
    """Summary, folder and messages of a job."""
    job = resolve(config, Weights(model.state_dict(), "w.pt"))
    folder = RunFolder(config.storage_path, config.name, may_change=MAY_CHANGE, result_file=SUMMARY_FILE)
    folder.claim(job.to_yaml())
    messages: list[Message] = []
    return score(job, folder, messages.append), folder.local, messages


def test_scores_are_those_of_the_formulas(columns: dict[str, Any], scored: dict[str, np.ndarray]) -> None:
    assert list(scored) == [
        "row_id", "name", "label", "flag", "similarity", "information", "loss_a", "loss_b", "score",
    ]  # fmt: skip
    assert scored["row_id"].tolist() == list(range(ROWS))
    assert scored["name"].tolist() == columns["name"]
    np.testing.assert_array_equal(scored["flag"], columns["flag"])
    for name, values in reference(make_recorder(), columns).items():
        assert scored[name].dtype == np.float32
        np.testing.assert_allclose(scored[name], values, **CLOSE, err_msg=name)


def test_actors_and_blocks_do_not_matter(columns: dict[str, Any], scored: dict[str, np.ndarray]) -> None:
    dataset = ray.data.from_arrow(make_table(columns)).repartition(11)
    other = read(score_dataset(dataset, make_recorder(), columns=COLUMNS, batch_size=17, actors=(3, 3)))
    assert other["row_id"].tolist() == list(range(ROWS))
    assert other["name"].tolist() == columns["name"]
    np.testing.assert_allclose(other["score"], scored["score"], **CLOSE)
    assert not dataset.context.execution_options.preserve_order, "the caller's dataset keeps its settings"


def test_measures_are_those_of_training(columns: dict[str, Any], scored: dict[str, np.ndarray]) -> None:
    # A scorer over a shard is what every engine of training uses.
    shards = build_shards(ray.data.from_arrow(make_table(columns)), COLUMNS)
    scorer = Scorer(Measurer(), "label", model=make_recorder(), losses=True)
    arrays = shards.read(0)
    measures = scorer.measure({name: arrays[name] for name in shards.features}, 0)
    np.testing.assert_allclose(scored["similarity"], measures.similarity, **CLOSE)
    np.testing.assert_allclose(scored["information"], measures.information, **CLOSE)
    np.testing.assert_allclose(scored["loss_a"], measures.losses["loss_a"], **CLOSE)


def test_a_job_numbers_rows_as_training_does_and_scores_them_alike(
    columns: dict[str, Any], gone: dict[str, np.ndarray], tmp_path: Path
) -> None:
    table = make_table(columns, gone)
    # Ray Data sorts by whole path: the file of the sub-folder comes between those of the folder.
    write_folder(tmp_path / "data" / "train", table.slice(0, 100), [], row_group=30)
    (tmp_path / "data" / "train" / "later").mkdir()
    pq.write_table(table.slice(100, 90), tmp_path / "data" / "train" / "later" / "0.parquet", row_group_size=50)
    pq.write_table(table.slice(190), tmp_path / "data" / "train" / "x.parquet")
    model = make_recorder()
    summary, folder, messages = run_job(config_of(tmp_path, tmp_path / "data"), model)

    found = as_arrays(pq.read_table(folder / "scores.parquet"))
    shards = build_shards(ray.data.read_parquet(str(tmp_path / "data" / "train")), COLUMNS)
    order = shards.gather(np.arange(ROWS), ("name",))["name"].tolist()
    assert found["row_id"].tolist() == list(range(ROWS))
    assert found["name"].tolist() == order == columns["name"]
    expected = reference(model, columns, gone)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, **CLOSE, err_msg=name)
    again = read(score_dataset(ray.data.from_arrow(table), model, columns=COLUMNS, actors=(1, 1)))
    np.testing.assert_allclose(found["score"], again["score"], **CLOSE)

    alone = (gone["a"] ^ gone["b"]).sum()
    assert (summary["rows"], summary["bad_rows"], summary["unpaired_rows"]) == (ROWS, 0, alone)
    assert summary["modalities"][0]["rows"] == (~gone["a"]).sum()
    assert summary["score"] == pytest.approx(np.mean(expected["score"]), abs=1e-6)
    assert summary["lowest"][0]["row_id"] == np.argmin(expected["score"])
    assert set(summary["score_roc_area"]) == {"flag"}
    assert summary == json.loads((folder / SUMMARY_FILE).read_text())
    assert not (folder / "measures").exists(), "all of it is in the scores"
    rows = [message for message in messages if isinstance(message, RowsProgress)]
    assert rows[-1].done == rows[-1].of == ROWS


def test_bad_rows_are_named_or_kept_and_a_job_goes_on_with_the_other_policy(
    columns: dict[str, Any], tmp_path: Path
) -> None:
    views = columns["a"].copy()
    views[[250, 251]] = 1e38  # too much for the heads
    broken = {**columns, "a": views}
    model = make_recorder(log=str(tmp_path / "log"))
    (tmp_path / "log").mkdir()
    dataset = ray.data.from_arrow(make_table(broken)).repartition(3)
    with pytest.raises(ModelOutputError, match=r"2 rows; first row ids 250, 251\)"):
        score_dataset(dataset, make_recorder(), columns=COLUMNS, actors=(1, 1))
    kept = read(score_dataset(dataset, make_recorder(), columns=COLUMNS, bad_rows="keep", actors=(1, 1)))
    assert np.flatnonzero(np.isnan(kept["score"])).tolist() == [250, 251]

    write_folder(tmp_path / "rows", make_table(broken), [], row_group=50)
    spec = replace(SPEC, init_args={"log": str(tmp_path / "log")})
    config = replace(config_of(tmp_path, tmp_path / "rows"), model=spec)
    with pytest.raises(ModelOutputError, match=r"row ids 250, 251\).*") as caught:
        run_job(config, model)
    assert "bad_rows=keep" in str(caught.value)
    assert "Failed to apply UDF" not in str(caught.value), "Ray Data's advice is for others"
    before = set((tmp_path / "log").glob("*.log"))
    summary, folder, messages = run_job(replace(config, bad_rows="keep"), model)
    again = forwarded(tmp_path / "log", before)
    assert again == [row for row in range(ROWS) if row >= 224], "files before the bad one are not measured again"
    assert (summary["bad_rows"], summary["measured_earlier"]) == (2, 224)
    found = as_arrays(pq.read_table(folder / "scores.parquet"))
    np.testing.assert_allclose(found["score"], kept["score"], **CLOSE)
    assert any(isinstance(message, Notice) and "written without measures" in message.text for message in messages)


def written(folder: Path) -> dict[Path, int]:
    """When each file was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_what_the_command_prints_and_writes(columns: dict[str, Any], tmp_path: Path) -> None:
    write_folder(tmp_path / "rows", make_table(columns), [100], row_group=50)
    model = make_recorder()
    torch.save(model.state_dict(), tmp_path / "w.pt")
    words = ["score", *(f"--{name}={value}" for name, value in score_options(tmp_path).items())]
    out, job = run_here(*words), tmp_path / "runs" / "scores"
    for name in ("summary.json", "report.html", "scores.parquet"):
        assert (job / name).exists()
        assert str(job / name) in out
    before = written(job)
    found = as_arrays(pq.read_table(job / "scores.parquet"))
    np.testing.assert_allclose(found["score"], reference(model, columns)["score"], **CLOSE)
    # A complete job is shown, not repeated; another configuration is refused and harms nothing.
    assert "this job is complete" in run_here(*words)
    assert "normalise: 'minmax' there, 'rank' now" in run_here(*words, "--normalise=rank", code=1)
    assert written(job) == before


def test_wrong_rows_are_named_by_row_id(columns: dict[str, Any], tmp_path: Path) -> None:
    label = columns["label"].copy()
    label[[7, 290]] = 12
    table = make_table({**columns, "label": label})
    dataset = ray.data.from_arrow(table).repartition(5)
    with pytest.raises(DataError, match=r"labels must lie in 0\.\.2.*row ids 7"):
        score_dataset(dataset, make_recorder(), columns=COLUMNS, actors=(1, 1))
    write_folder(tmp_path / "rows", table.slice(8), [100], row_group=50)
    with pytest.raises(DataError, match=r"labels must lie in 0\.\.2.*row ids 282\)"):
        run_job(config_of(tmp_path, tmp_path / "rows"), make_recorder())


def test_other_rows_or_weights_of_the_same_names_are_refused(columns: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "scores" / "measures").mkdir(parents=True)
    write_folder(tmp_path / "rows", make_table(columns), [], row_group=50)
    config = config_of(tmp_path, tmp_path / "rows")
    plan = {"rows": ROWS, "data": "other", "weights": "others"}
    (tmp_path / "scores" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(CheckpointError, match=r"data: 'other' there, '[0-9a-f]+' now\n  weights: 'others' there"):
        run_job(config, make_recorder())


def test_what_the_cluster_can_never_give_is_refused_at_once(columns: dict[str, Any]) -> None:
    dataset = ray.data.from_arrow(make_table(columns))
    with pytest.raises(ResourceError, match="1 GPU each, and 1 CPU to read rows with, do not fit"):
        score_dataset(dataset, make_recorder(), columns=COLUMNS, num_gpus=1)


@pytest.mark.slow
def test_measures_that_do_not_come_are_not_waited_for_without_end(tmp_path: Path) -> None:
    write_folder(tmp_path / "rows", make_table(make_columns(50)), [], row_group=50)  # one forward pass
    slow = replace(SPEC, init_args={"log": str(tmp_path), "pause": 12.0})
    config = replace(config_of(tmp_path, tmp_path / "rows", wait_limit_s=6), model=slow)
    try:
        with pytest.raises(WaitError, match="waited 6 s for the next rows to be measured"):
            run_job(config, make_recorder())
    finally:
        set_wait_limit(DEFAULT_LIMIT_S)
        join_calls()
