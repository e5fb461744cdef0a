"""Settings as a tree: changed by dotted names, turned into a run's settings, and written for the command line."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from bss_ray.errors import BssRayError, ConfigError, DataError, ScheduleError
from bss_ray.schedule import Heuristic, Learning, Uniform
from bss_ray.train.loop import ModelSpec
from bss_ray.train.run import TrainConfig
from bss_ray.train.settings import instantiate, make, overlay, train_parser, training_config

LEARNING: dict[str, Any] = {"scheduler": {"class_path": "Learning", "init_args": {"temperature": 0.5, "fraction": 0.7}}}


class TestOverlay:
    def test_changes_what_it_names_and_nothing_else(self) -> None:
        base = {**LEARNING, "loop": {"epochs": 3, "lr": 0.1}, "seed": 1}
        before = copy.deepcopy(base)
        changed = overlay(base, {"loop.lr": 0.2, "scheduler.init_args.fraction": 0.5, "batch_size": 8})
        assert changed == {
            "scheduler": {"class_path": "Learning", "init_args": {"temperature": 0.5, "fraction": 0.5}},
            "loop": {"epochs": 3, "lr": 0.2},
            "seed": 1,
            "batch_size": 8,
        }
        changed["scheduler"]["init_args"]["temperature"] = 9
        assert base == before, "the base is of all trials"

    def test_short_names_are_those_of_the_command_line(self) -> None:
        assert overlay(LEARNING, {"scheduler.fraction": 0.5}) == overlay(
            LEARNING, {"scheduler.init_args.fraction": 0.5}
        )
        assert overlay({}, {"model.width": 8}) == {"model": {"init_args": {"width": 8}}}

    @pytest.mark.parametrize("first", [True, False], ids=["class first", "class last"])
    def test_another_class_starts_from_its_own_defaults(self, first: bool) -> None:
        settings = {"scheduler.class_path": "Heuristic", "scheduler.initial": 0.3}
        if not first:
            settings = dict(reversed(settings.items()))
        assert overlay(LEARNING, settings) == {"scheduler": {"class_path": "Heuristic", "init_args": {"initial": 0.3}}}

    @pytest.mark.parametrize("path", ["Learning", "bss_ray.Learning", "bss_ray.schedule.schedulers.Learning"])
    def test_the_same_class_keeps_its_settings(self, path: str) -> None:
        scheduler = overlay(LEARNING, {"scheduler.class_path": path})["scheduler"]
        assert scheduler == {"class_path": path, "init_args": LEARNING["scheduler"]["init_args"]}

    def test_groups_that_are_not_there_or_no_groups_are_made(self) -> None:
        assert overlay({"scheduler": "Learning", "loop": None}, {"loop.lr": 0.1, "scheduler.fraction": 0.5}) == {
            "scheduler": {"init_args": {"fraction": 0.5}},
            "loop": {"lr": 0.1},
        }


class TestTrainingConfig:
    def test_nothing_said_is_the_demo(self) -> None:
        config = training_config({})[0]
        assert config.model.init_args, "the model's defaults are said, too"
        assert replace(config, model=ModelSpec()) == TrainConfig()

    def test_one_leaves_nothing_behind_for_the_next(self) -> None:
        trees: list[dict[str, Any]] = [
            {"loop": {"epochs": 3}, "model": {"init_args": {"width": 8}}},
            LEARNING,
            {"scheduler": {"class_path": "Learning", "init_args": {"burn_in": 3}}},
            {"scheduler": {"class_path": "Heuristic", "init_args": {"burn_in": 3}}},
            {},
        ]
        alone = [training_config(copy.deepcopy(tree)) for tree in trees]
        for _ in range(2):
            assert [training_config(tree) for tree in reversed(trees)] == alone[::-1]
        assert alone[2][0].scheduler == Learning(burn_in=3), "not the temperature of the one before"

    def test_a_named_scheduler_has_its_own_defaults(self) -> None:
        for kind in (Uniform, Heuristic, Learning):
            assert training_config({"scheduler": {"class_path": kind.__name__}})[0].scheduler == kind()

    @pytest.mark.parametrize(
        ("settings", "kind", "said"),
        [
            ({"scheduler.class_path": "Learnin"}, ConfigError, "Did you mean 'Learning'"),
            ({"scheduler.temperatur": 0.5}, ConfigError, "Did you mean 'temperature'"),
            ({"loop.epoch": 3}, ConfigError, "Group 'loop' does not accept option 'epoch'. Did you mean 'epochs'"),
            ({"batch_siz": 3}, ConfigError, "'batch_siz' is not accepted. Did you mean 'batch_size'"),
            ({"loop.epochs": "many"}, ConfigError, "\"loop.epochs\": Expected a <class 'int'>. Got value: many"),
            ({"tail": "cut"}, ConfigError, "Got value: cut"),
            ({"loop.epochs": 0}, ConfigError, "epochs must be at least 1; received 0"),
            ({"scheduler.temperature": 0}, ScheduleError, "temperature must be at least 0.01"),
            ({"scoring.momentum": 1}, ConfigError, "momentum must lie in [0, 1)"),
            ({"measurer.similarity": "predicton"}, ConfigError, "did you mean 'prediction'"),
            ({"columns.modalities": ["audio"]}, DataError, "at least two input columns; received ['audio']"),
            ({"model.class_path": "no.such.Model"}, ConfigError, "No module named 'no'"),
            ({"initial_scores": "a", "initial_checkpoint": "b"}, ConfigError, "both say"),
        ],
    )
    def test_errors_say_what_to_do(self, settings: dict[str, Any], kind: type[BssRayError], said: str) -> None:
        with pytest.raises(kind) as raised:
            training_config(overlay(LEARNING, settings))
        assert said in str(raised.value)
        assert type(raised.value) is kind

    def test_an_error_is_an_exception_and_says_nothing_on_the_terminal(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(ConfigError):
            training_config({"lop": {"epochs": 3}})
        assert capsys.readouterr() == ("", "")

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"scheduler.class_path": "Heuristic", "scheduler.shape": "step", "scheduler.steps": 3},
            {"scheduler.class_path": "Uniform", "scheduler.update_interval": 2},
            {"scheduler.temperature": None, "scheduler.grow_epochs": 7, "loop.clip_norm": None},
            {"measurer.similarity": "feature", "scoring.accumulate": "sum", "loop.lr": 1e-5},
            {"columns.modalities": ["a", "b"], "columns.label": "y", "data": "/rows", "model.width": 8},
        ],
    )
    def test_the_command_line_takes_what_it_returns(self, settings: dict[str, Any], tmp_path: Path) -> None:
        config, text = training_config(overlay(LEARNING, settings))
        file = tmp_path / "best.yaml"
        file.write_text(text)
        words = ["--config", str(file)]
        parser = train_parser(words)
        assert make(TrainConfig, instantiate(parser, parser.parse_args(words))) == config
        assert training_config(yaml.safe_load(text)) == (config, text)


def test_a_switch_needs_no_value() -> None:
    settings = train_parser([]).parse_args(["--profile", "--scoring.overlap", "--verbose", "false"])
    assert (settings.profile, settings.scoring.overlap, settings.verbose) == (True, True, False)
    with pytest.raises(SystemExit):
        train_parser([]).parse_args(["--profile", "maybe"])
