"""The command line without Ray: wrong options, defaults, and the run folder's rules."""

import contextlib
import gc
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from bss_ray.cli import _init_ray, main
from bss_ray.data.columns import Columns
from bss_ray.errors import ConfigError, StorageError
from bss_ray.train.folder import RunFolder
from bss_ray.train.run import check_choice
from bss_ray.train.settings import train_parser


def wrong(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `bss-ray train` says to wrong arguments."""
    try:
        code = main(["train", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code != 0
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scheduler", "Learnin"], "Did you mean 'Learning'?"),
        (["--scheduler.temperatur", "0.5"], "Did you mean 'temperature'?"),
        (["--lop.epochs", "3"], "Did you mean 'loop.epochs'?"),
        (["--loop.epochs", "many"], "many"),
        (["--loop.epochs", "0"], "epochs must be at least 1; received 0"),
        (["--scheduler.temperature", "0"], "temperature must be at least 0.01"),
        (["--scheduler", "Heuristic", "--scheduler.initial", "1.5"], "(0, 1]; received 1.5"),
        (["--measurer.similarity", "predicton"], "did you mean 'prediction'?"),
        (["--columns.modalities", "[audio]"], "at least two input columns; received ['audio']"),
        (["--scoring.momentum", "1"], "momentum must lie in [0, 1)"),
        (["--config", "no_such.yaml"], "no_such.yaml"),
    ],
)
def test_wrong_options_say_what_to_do(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert said in wrong(["--storage_path", str(tmp_path), *arguments], capsys)
    assert not list(tmp_path.iterdir()), "nothing may be written for a wrong option"


def test_help_teaches_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    out = capsys.readouterr().out
    for words in ("Learning", "--loop.epochs", "rows of a global batch", "--model.NAME VALUE", "is resumed"):
        assert words in " ".join(out.split()), words
    assert len(out.splitlines()) < 420, "torch's own modules are no choices"


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err


def test_a_scheduler_starts_from_its_own_defaults(tmp_path: Path) -> None:
    # Heuristic never refreshes its scores by default; Learning's interval of 1 must not leak into it.
    def settings(arguments: list[str]) -> dict[str, object]:
        return dict(train_parser(arguments).parse_args(arguments).scheduler.init_args.as_dict())

    assert settings(["--scheduler", "Heuristic"])["update_interval"] == 0
    assert settings(["--scheduler.temperature", "0.5"]) == {**settings([]), "temperature": 0.5}
    config = tmp_path / "config.yaml"
    config.write_text("scheduler: {class_path: Heuristic, init_args: {initial: 0.2}}\n")
    chosen = settings(["--config", str(config), "--scheduler.power", "1"])
    assert (chosen["initial"], chosen["power"], chosen["update_interval"]) == (0.2, 1.0, 0)


def test_the_metric_to_choose_by_must_exist() -> None:
    columns = Columns(modalities=("audio", "image"))
    check_choice("val_f1_audio", columns)
    with pytest.raises(ConfigError, match="did you mean 'val_accuracy_fused'"):
        check_choice("val_acuracy_fused", columns)


class TestRunFolder:
    def test_same_configuration_goes_on_and_another_is_refused(self, tmp_path: Path) -> None:
        folder = RunFolder(str(tmp_path), "run")
        assert folder.claim("seed: 1\nloop: {lr: 0.1}\nnum_workers: 1\n") is False
        assert folder.claim("seed: 1\nloop: {lr: 0.1}\nnum_workers: 4\n") is True
        with pytest.raises(ConfigError, match=r"loop\.lr: 0\.1 there, 0\.2 now"):
            folder.claim("seed: 1\nloop: {lr: 0.2}\nnum_workers: 1\n")
        assert "0.1" in (folder.path / "config.yaml").read_text(), "what is there must stay"

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match=r"cannot be written.*--storage_path"):
            RunFolder(str(tmp_path / "file"), "run")
        if os.geteuid() != 0:  # root may write anywhere
            tmp_path.chmod(0o500)
            with pytest.raises(StorageError, match="cannot be written"):
                RunFolder(str(tmp_path), "run")

    @pytest.mark.parametrize("name", ["", "..", "a/b"])
    def test_names_that_are_no_folder(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ConfigError, match="name of one folder"):
            RunFolder(str(tmp_path), name)

    def test_metrics_are_rewritten_whole(self, tmp_path: Path) -> None:
        folder = RunFolder(str(tmp_path), "run")
        folder.write_metrics([{"epoch": 0, "loss": 1.0}])
        folder.write_metrics([{"epoch": 0, "loss": 1.0}, {"epoch": 1, "loss": 0.5, "val": 0.9}])
        lines = (folder.path / "metrics.csv").read_text().splitlines()
        assert lines == ["epoch,loss,val", "0,1.0,", "1,0.5,0.9"]


def test_a_run_that_fails_before_its_first_checkpoint_leaves_its_name_free(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "mine")
    assert not folder.claim("seed: 0")
    folder.release()
    assert not folder.claim("seed: 1")
    (folder.path / "checkpoint_1").mkdir()
    folder.release()
    with pytest.raises(ConfigError, match="seed: 1 there, 2 now"):
        folder.claim("seed: 2")


def test_hyphens_in_options_are_underscores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ["--initial-scores=my-scores.parquet", "--initial-checkpoint", "a-b.pt"]
    error = wrong([*both, "--storage_path", str(tmp_path)], capsys)
    assert "initial_scores and initial_checkpoint both say" in error
    with pytest.raises(SystemExit):
        main(["train", "--initial-scores", "a-b.parquet", "--print-config"])
    assert "initial_scores: a-b.parquet" in capsys.readouterr().out


def test_ray_may_take_longer_than_its_limit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, object]] = []

    def busy(**options: object) -> None:
        started.append(options)
        if len(started) == 1:
            raise Exception("The current node timed out during startup. This could happen because ...")

    said: list[str] = []
    monkeypatch.setattr("ray.init", busy)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    _init_ray(SimpleNamespace(say=said.append), address="local")  # type: ignore[arg-type]
    assert started == [{"address": "local"}] * 2
    assert "once more" in said[0]

    monkeypatch.setattr("ray.init", lambda **_options: (_ for _ in ()).throw(ConnectionError("nobody there")))
    with pytest.raises(ConnectionError):
        _init_ray(SimpleNamespace(say=said.append), address="local")  # type: ignore[arg-type]
    assert len(said) == 1


def test_a_command_leaves_the_garbage_collector_as_it_was(tmp_path: Path) -> None:
    words = ["train", "--storage_path", str(tmp_path), "--batch_size", "0.5"]
    for collecting in (True, False):
        (gc.enable if collecting else gc.disable)()
        try:
            with contextlib.suppress(SystemExit):
                main(words)
            assert gc.isenabled() == collecting
        finally:
            gc.enable()
