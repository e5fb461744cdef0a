"""Relative paths: the driver makes them absolute, as processes elsewhere have another working folder."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.train

from bss_ray.cli.score import score_parser
from bss_ray.data import build
from bss_ray.data.columns import Columns
from bss_ray.data.sources import absolute_source
from bss_ray.data.store import StoreConfig
from bss_ray.errors import ConfigError, DataError
from bss_ray.score.read_tasks import parquet_tasks
from bss_ray.train.folder import RunFolder
from bss_ray.train.settings import Parser, add_training_arguments, resolved, train_parser
from bss_ray.train.trainer import BalancedTrainer

COLUMNS = Columns(modalities=("a", "b"), label="label")


@pytest.mark.parametrize("source", ["av-digits", "package.module:rows", "s3://bucket/rows", "/data/rows"])
def test_what_is_no_relative_path_stays(source: str) -> None:
    assert absolute_source(source) == source


def test_commands_make_paths_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["--data", "rows", "--validation", "v.parquet", "--test", "~/t.parquet", "--initial_scores", "scores"]
    parser = train_parser(words)
    told = resolved(parser, parser.parse_args(words))
    for name, path in (
        ("data", tmp_path / "rows"),
        ("validation", tmp_path / "v.parquet"),
        ("initial_scores", tmp_path / "scores"),
    ):
        assert f"{name}: {path}\n" in told
    assert f"test: {Path.home() / 't.parquet'}\n" in told
    assert train_parser([]).parse_args(["--initial_checkpoint", "w.pt"]).initial_checkpoint == str(tmp_path / "w.pt")
    score = score_parser().parse_args(["--checkpoint", "w.pt", "--data", "av-digits"])
    assert (score.checkpoint, score.data) == (str(tmp_path / "w.pt"), "av-digits")
    search = Parser()
    add_training_arguments(search, None, prefix="train.")
    assert search.parse_args(["--train.initial_scores", "scores"])["train.initial_scores"] == str(tmp_path / "scores")


def test_a_run_of_an_earlier_version_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    RunFolder("runs", "old").claim("data: rows.parquet\ntest: null\nseed: 1")
    again = RunFolder("runs", "old")
    assert again.claim(f"data: {tmp_path}/rows.parquet\ntest: null\nseed: 1")
    with pytest.raises(ConfigError, match=r"data: 'rows\.parquet' there, '/other/rows\.parquet' now"):
        again.claim("data: /other/rows.parquet\ntest: null\nseed: 1")
    with pytest.raises(ConfigError, match=r"test: None there, '/t\.parquet' now"):
        again.claim(f"data: {tmp_path}/rows.parquet\ntest: /t.parquet\nseed: 1")


def test_the_storage_of_a_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def storage(path: str | None) -> str:
        trainer = BalancedTrainer(
            lambda: None,
            dataset=lambda: pytest.fail("rows are read"),
            columns=COLUMNS,
            run_config=ray.train.RunConfig(name="run", storage_path=path),
        )
        return str(trainer._run_config.storage_path)

    assert storage("runs") == str(tmp_path / "runs")
    assert storage("s3://bucket/runs") == "s3://bucket/runs"
    assert storage(None) == storage("~/ray_results")


def test_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("bss_ray.data.lance._lance", lambda: None)
    assert vars(build._writer(StoreConfig(kind="lance", folder="rows")))["uri"] == str(tmp_path / "rows")
    assert vars(build._writer(StoreConfig(kind="lance", folder="s3://bucket/rows")))["uri"] == "s3://bucket/rows"
    assert vars(build._writer(StoreConfig(kind="disk", folder="rows")))["folder"] == str(tmp_path / "rows")
    assert vars(build._writer(StoreConfig(kind="disk", folder="~/rows")))["folder"] == "~/rows"  # of each node


def test_a_file_that_another_node_does_not_see_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"a": [[1.0]], "b": [[1.0]], "label": [0]}), "rows.parquet")
    (task,) = parquet_tasks("rows.parquet", COLUMNS)
    monkeypatch.chdir("/")
    assert len(list(task.read(COLUMNS, {}, [(0, 1)], finite=True))) == 1
    (tmp_path / "rows.parquet").unlink()
    with pytest.raises(
        DataError, match=rf"{tmp_path}/rows.parquet is not there on the node .* that all nodes can read"
    ):
        list(task.read(COLUMNS, {}, [(0, 1)], finite=True))
