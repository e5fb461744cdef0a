"""The command line of a search without Ray: wrong options, help, and settings that can be given again."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bss_ray.cli import main
from bss_ray.cli.tune import tune_parser
from bss_ray.train.run import TrainConfig
from bss_ray.train.settings import instantiate, make
from bss_ray.tune.config import TuneConfig


def say(arguments: list[str]) -> int:
    try:
        return main(["tune", *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(autouse=True)
def no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def begun(*_: Any) -> None:
        raise AssertionError("a search is begun")

    monkeypatch.setattr("bss_ray.cli.tune._start_ray", begun)
    monkeypatch.setattr("bss_ray.tune.space._DRAWS", 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--space", "learnin"], "unknown space 'learnin'; did you mean 'learning'?"),
        (["--space", "no_such_module:space"], "No module named 'no_such_module'"),
        (["--algorithm", "tpee"], "tpee"),
        (["--trials", "0"], "trials must be at least 1; received 0"),
        (["--trails", "8"], "Did you mean 'trials'?"),
        (["--pruning.reduction", "1"], "pruning.reduction must be at least 2; received 1"),
        (["--population.quantile", "0.9"], "must lie in (0, 0.5]; received 0.9"),
        (["--aggregate", "lower"], "needs at least two; received seeds=1"),
        (["--algorithm", "pbt", "--seeds", "3"], "received seeds=3"),
        (["--loggers", "[mlflo]"], "did you mean 'mlflow'?"),
        (["--train.loop.epochs", "0"], "epochs must be at least 1; received 0"),
        (["--train.loop.epohcs", "3"], "Did you mean 'train.loop.epochs'?"),
        (["--train.batchsize", "3"], "Did you mean 'train.batch_size'?"),
        (["--train.scheduler", "Learnin"], "Did you mean 'Learning'?"),
        (["--train.name", "other"], "train.name"),
        (["--train.scoring.accumulate", "sum"], "space learning asks for a run that is impossible"),
        (["--config", "no_such.yaml"], "no_such.yaml"),
        (["--storage_path", "s3://bucket"], "must be a folder that all nodes share"),
        (["--name", "a/b"], "name of one folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_options_say_what_to_do(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert say(arguments) != 0
    out, error = capsys.readouterr()
    assert error.startswith("bss-ray: ")
    assert said in error
    assert "Traceback" not in error + out
    assert not list(tmp_path.iterdir()), "nothing may be written for a wrong option"


def test_a_space_of_the_folder_that_one_is_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "own_space.py").write_text(
        "def space(trial):\n    return {'loop.lr': trial.suggest_float('lr', -2, -1)}\n"
    )
    assert say(["--space", "own_space:space"]) == 1
    error = capsys.readouterr().err
    assert "space own_space:space asks for a run that is impossible: loop.lr must be a positive number" in error
    assert "the trial's values: lr=-1." in error
    assert os.listdir(tmp_path) == ["own_space.py"]


def test_help_teaches_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert say(["--help"]) == 0
    out = capsys.readouterr().out
    words = " ".join(out.split())
    for taught in (
        "judged on validation, never on test",
        "The same command resumes after a stop or a kill",
        "your own `module:function`",
        "population-based training",
        "Optuna storage: a URL, or a journal file",
        "--pruning.grace_epochs",
        "--train.loop.epochs",
        "model.NAME VALUE",
    ):
        assert taught in words, taught
    assert len(out.splitlines()) < 500, "torch's own modules are no choices"
    for of_the_search in ("--train.name", "--train.storage_path", "--train.verbose"):
        assert of_the_search not in out


def read(arguments: list[str]) -> TuneConfig:
    parser = tune_parser(arguments)
    made = instantiate(parser, parser.parse_args(arguments))
    return make(TuneConfig, made, train=make(TrainConfig, made.train))


def test_what_is_printed_can_be_given_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--space=full", "--trials=5", "--metrics=[val_f1_weaker, seconds]", "--pruning.grace-epochs=2"]
    arguments += ["--train.scheduler=Heuristic", "--train.scheduler.initial=0.3", "--train.loop.lr=0.1"]
    assert say([*arguments, "--print_config"]) == 0
    text = capsys.readouterr().out
    tree = yaml.safe_load(text)
    assert tree["metrics"] == ["val_f1_weaker", "seconds"]
    assert tree["pruning"]["grace_epochs"] == 2
    assert tree["train"]["scheduler"]["init_args"]["initial"] == 0.3
    file = tmp_path / "search.yaml"
    file.write_text(text)
    again = read(["--config", str(file)])
    assert again == read([word.replace("grace-epochs", "grace_epochs") for word in arguments])
    assert (again.trials, again.train.loop.lr, again.train.scheduler.update_interval) == (5, 0.1, 0)
    assert say(["--config", str(file), "--print_config"]) == 0
    assert capsys.readouterr().out == text


def test_nothing_said_is_the_demo() -> None:
    config = read([])
    assert (config.space, config.algorithm, config.trials, config.prunes) == ("learning", "tpe", 16, True)
    assert config.train.scheduler == TrainConfig().scheduler
    assert config.train.data == "av-digits"
