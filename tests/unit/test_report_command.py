"""`bss-ray report`: finds out what a folder is of."""

import json
from pathlib import Path

import optuna
import pytest

from bss_ray.cli import main
from bss_ray.tune.record import open_storage


def search(folder: Path, trials: int) -> Path:
    """The folder of a search with so many finished trials."""
    folder.mkdir()
    (folder / "config.yaml").write_text("space: learning\nname: mine\nstorage: null\n")
    study = optuna.create_study(storage=open_storage(None, folder), study_name="mine", direction="maximize")
    study.set_metric_names(["val_accuracy_fused"])
    study.set_user_attr("space", "learning")
    for number in range(trials):
        trial = study.ask()
        trial.suggest_float("temperature", 0.1, 1.0)
        trial.set_user_attr("settings", {"scheduler.init_args.temperature": trial.params["temperature"]})
        trial.set_user_attr("seed_values", [[0.5 + number / 100]])
        study.tell(trial, 0.5 + number / 100)
    return folder


def test_a_search_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(search(tmp_path / "mine", 9))]) == 0
    assert "temperature" in (tmp_path / "mine" / "report.html").read_text()
    assert "9 trials finished" in capsys.readouterr().out


def test_a_search_that_is_complete_has_its_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = search(tmp_path / "mine", 3)
    side = {"validation": {"val_accuracy_fused": [0.9, 0.91]}, "test": {}}
    comparison = {"metric": "val_accuracy_fused", "seeds": [1, 2], "best": side, "uniform": side}
    (folder / "result.json").write_text(json.dumps({"comparison": comparison}))
    assert main(["report", str(folder)]) == 0
    assert "uniform" in capsys.readouterr().out


def test_a_training_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("data: av-digits\n")
    names = "epoch,rows,eligible_rows,effective_sample_size,train_loss,val_accuracy_fused,seconds_training"
    (folder / "metrics.csv").write_text(f"{names}\n0,10,10,10,0.5,0.9,1\n")
    assert main(["report", str(folder)]) == 0
    assert "Validation accuracy" in (folder / "report.html").read_text()


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search(tmp_path / "mine", 1)
    assert main(["report", str(tmp_path / "mind")]) == 1
    assert "it has no config.yaml" in (error := capsys.readouterr().err)
    assert "has mine" in error
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("data: av-digits\n")
    assert main(["report", str(tmp_path / "new")]) == 1
    assert "nothing to report yet" in capsys.readouterr().err
