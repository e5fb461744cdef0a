"""Which weights a job takes, what their run tells, and which settings may change."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bss_ray.cli import main
from bss_ray.data.columns import Columns
from bss_ray.data.shards import Feature
from bss_ray.errors import BssRayError, CheckpointError, ConfigError, DataError
from bss_ray.score.config import MAY_CHANGE, Job, ModelSpec, ScoreConfig, resolve
from bss_ray.train.checkpoint import Manifest, Position, write_manifest, write_states
from bss_ray.train.folder import RunFolder
from bss_ray.train.initial import Weights, read_weights
from tests.scoring import COLUMNS, make_recorder

FEATURES = {name: Feature((4,), "float32") for name in ("a", "b")}
SPEC = ModelSpec(class_path="tests.scoring.Recorder")
RUN = {
    "data": "rows/",
    "columns": {"modalities": ["a", "b"], "label": "label", "id": "name", "extra": ["flag"]},
    "model": {"class_path": "tests.scoring.Recorder", "init_args": {"pause": 0.5}},
    "measurer": {"fused_weight": 1.0, "unimodal_weight": 1.0},
    "mispaired": 0.4,
    "seed": 7,
    "num_classes": None,
}


def make_checkpoint(folder: Path, seed: int, position: Position) -> Path:
    folder.mkdir(parents=True)
    digests = write_states(folder, {"model": make_recorder(seed).state_dict()})
    fields: dict[str, Any] = {"fingerprint": "f", "seed": 0, "rows": 9, "num_classes": 3, "position": position}
    write_manifest(folder, Manifest(**fields, history=[], observed=[], digests=digests, scores=[]))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three epochs that has chosen epoch 1; its last checkpoint is in the middle of an epoch."""
    folder = tmp_path / "runs" / "demo"
    for name, seed, position in (("c", 2, Position(2, 0, 1)), ("b", 3, Position(3, 0, 2)), ("a", 4, Position(3, 5, 2))):
        make_checkpoint(folder / f"checkpoint_{name}", seed, position)
    (folder / "checkpoint_unfinished").mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(RUN))
    (folder / "result.json").write_text(json.dumps({"chosen_epoch": 1}))
    return folder


def seed_of(weights: Weights) -> int:
    """Which of the test's models it is."""
    return next(seed for seed in range(9) if Weights(make_recorder(seed).state_dict(), "").digest == weights.digest)


class TestReadWeights:
    def test_of_a_run_the_chosen_epoch(self, run: Path) -> None:
        for weights in (read_weights(str(run), "elsewhere"), read_weights(None, str(run.parent))):
            assert seed_of(weights) == 2
            assert weights.source == str(run / "checkpoint_c")
            assert weights.settings == {**RUN, "num_classes": 3}

    def test_of_a_run_that_has_not_ended_the_last(self, run: Path) -> None:
        (run / "result.json").unlink()
        assert seed_of(read_weights(str(run), "")) == 4

    def test_of_a_checkpoint_folder(self, run: Path) -> None:
        weights = read_weights(str(run / "checkpoint_b"), "")
        assert seed_of(weights) == 3
        assert weights.settings["seed"] == 7, "the run around it is known"

    @pytest.mark.parametrize(
        "wrap", [dict, lambda state: {"model": state, "epoch": 3}, lambda state: {"state_dict": state}]
    )
    def test_of_a_file(self, tmp_path: Path, wrap: Any) -> None:
        torch.save(wrap(make_recorder(5).state_dict()), tmp_path / "w.pt")
        weights = read_weights(str(tmp_path / "w.pt"), "")
        assert (seed_of(weights), weights.settings) == (5, {})

    def test_damage_and_absence_say_what_to_do(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "w.pt").write_text("no weights")
        torch.save([1, 2], tmp_path / "list.pt")
        with (run / "checkpoint_c" / "model.pt").open("r+b") as file:
            file.seek(300)
            file.write(b"damage")
        (tmp_path / "empty").mkdir()
        for checkpoint, said in (
            (tmp_path / "w.pt", "cannot be read as a state dict"),
            (tmp_path / "list.pt", "holds no state dict but list"),
            (run / "checkpoint_c", "damaged: model.pt"),
            (tmp_path / "gone", "gone is not there: it takes a .pt file"),
            (tmp_path / "empty", "empty is no checkpoint: it takes a .pt file"),
            (None, "bss-ray train` makes it"),
        ):
            with pytest.raises(CheckpointError, match=said):
                read_weights(None if checkpoint is None else str(checkpoint), str(tmp_path))

    def test_no_code_of_a_file_is_run(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(tmp_path / "sprung"),)

        torch.save({"a": Trap()}, tmp_path / "w.pt")
        with pytest.raises(CheckpointError):
            read_weights(str(tmp_path / "w.pt"), "")
        assert not (tmp_path / "sprung").exists()

    def test_the_digest_tells_weights_apart(self) -> None:
        state = make_recorder(0).state_dict()
        assert Weights(dict(reversed(state.items())), "x").digest == Weights(state, "y").digest
        name = next(iter(state))
        assert Weights({**state, name: state[name] + 1e-7}, "x").digest != Weights(state, "x").digest


class TestResolve:
    def test_what_the_run_knows_is_taken(self, run: Path) -> None:
        config = resolve(ScoreConfig(), read_weights(str(run), "")).config
        assert config.columns == COLUMNS
        assert config.model == replace(SPEC, init_args={"pause": 0.5})
        assert config.measurer is not None
        assert config.measurer.fused_weight == 1
        assert (config.data, config.mispaired, config.seed, config.num_classes) == ("rows/", 0.4, 7, 3)

    def test_what_is_given_wins_and_pairing_belongs_to_the_data(self, run: Path) -> None:
        given = ScoreConfig(data="av-digits", columns=Columns(modalities=("x", "y")), model=SPEC, num_classes=9)
        config = resolve(given, read_weights(str(run), "")).config
        assert (config.data, config.columns, config.model) == (given.data, given.columns, given.model)
        assert (config.mispaired, config.seed, config.num_classes) == (0.0, 0, 9)

    def test_nobody_knows_the_columns(self) -> None:
        with pytest.raises(DataError, match=r"name the columns of rows/: --columns\.modalities"):
            resolve(ScoreConfig(data="rows/"), Weights({}, "w.pt"))

    def test_the_configuration_can_be_given_again(self, run: Path, tmp_path: Path) -> None:
        from bss_ray.cli.score import score_parser

        job = resolve(ScoreConfig(), read_weights(str(run), ""))
        (tmp_path / "config.yaml").write_text(job.to_yaml())
        again = score_parser().parse_args(["--config", str(tmp_path / "config.yaml")])
        assert again.columns.modalities == ("a", "b")
        assert again.checkpoint == str(run / "checkpoint_c")

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"split": "tset"}, "did you mean 'test'"),
            ({"bad_rows": "kep"}, "did you mean 'keep'"),
            ({"precision": "fp23"}, "did you mean 'fp32'"),
            ({"normalise": "minmx"}, "did you mean 'minmax'"),
            ({"batch_size": 0}, "batch_size"),
            ({"piece_rows": 0}, "piece_rows must be at least 1; received 0"),
            ({"min_actors": 4, "max_actors": 2}, "at least min_actors=4"),
        ],
    )
    def test_wrong_settings(self, settings: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            ScoreConfig(**settings)


class TestModel:
    def job(self, state: dict[str, Any], **settings: Any) -> Job:
        return resolve(ScoreConfig(data="r/", columns=COLUMNS, model=SPEC, **settings), Weights(state, "w.pt"))

    def test_the_weights_tell_the_number_of_classes(self) -> None:
        state = make_recorder(6).state_dict()
        model = self.job(state).model(FEATURES)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())

    def test_weights_that_do_not_fit_are_named(self) -> None:
        state = make_recorder(6).state_dict()
        with pytest.raises(CheckpointError, match=r"heads\.a\.weight \(5, 4\) against \(3, 4\)"):
            self.job(state, num_classes=5).model(FEATURES)


def test_settings_that_change_results_may_not_change(tmp_path: Path) -> None:
    def job(**settings: Any) -> str:
        return resolve(ScoreConfig(data="r/", columns=COLUMNS, **settings), Weights({}, "w.pt")).to_yaml()

    folder = RunFolder(str(tmp_path), "scores", may_change=MAY_CHANGE, result_file="summary.json")
    assert folder.claim(job()) is False
    assert folder.claim(job(batch_size=8, max_actors=3, gpus_per_actor=0.5, bad_rows="keep", piece_rows=9)) is True
    for changed, said in (
        ({"normalise": "rank"}, "normalise: 'minmax' there, 'rank' now"),
        ({"precision": "bf16"}, "precision"),
    ):
        with pytest.raises(ConfigError, match=said):
            folder.claim(job(**changed))
    assert folder.result() is None
    folder.write_result({"rows": 3})
    assert json.loads((tmp_path / "scores" / "summary.json").read_text()) == folder.result() == {"rows": 3}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--chekpoint", "x"], "Did you mean 'checkpoint'?"),
        (["--split", "tset"], "tset"),
        (["--unpaired", "neutrl"], "neutrl"),
        (["--batch_size", "0"], "batch_size"),
        (["--checkpoint", "no_such.pt"], "no_such.pt is not there"),
        ([], "--checkpoint with a .pt file"),
    ],
)
def test_wrong_options_say_what_to_do(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    try:
        code = main(["score", "--storage_path", str(tmp_path), *arguments])
    except (SystemExit, BssRayError) as stop:
        code = getattr(stop, "code", 1)
    assert code not in (0, None)
    err = capsys.readouterr().err
    assert said in err
    assert "bss-ray train --help" not in err
    assert not list(tmp_path.iterdir()), "nothing may be written for a wrong option"


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["score", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for words in (
        "how balanced is each",
        "resumes after a stop",
        "--initial_scores",
        "--gpus_per_actor",
        "--model.NAME VALUE",
    ):
        assert words in out, words
