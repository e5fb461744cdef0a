"""What a search logs to MLflow and to Weights & Biases, read back as these packages keep it."""

import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.tune

from bss_ray import errors
from bss_ray.errors import ConfigError, MissingDependencyError
from bss_ray.tune.tuner import make_loggers

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.integration

RATES = [0.1, 0.2]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever runs the tests may use these trackers."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("API_KEY", "MODE", "DIR", "PROJECT", "RUN_GROUP", "PROJECT_NAME", "GROUP_NAME"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def trial(config: dict[str, Any]) -> None:
    for epoch in range(3):
        ray.tune.report({"epoch": epoch, "loss": config["settings"]["lr"] * epoch})


def search(folder: Path, loggers: list[Any]) -> None:
    results = ray.tune.Tuner(
        trial,
        param_space={"settings": {"lr": ray.tune.grid_search(RATES), "model": {"width": 8}}},
        run_config=ray.tune.RunConfig(name="trials", storage_path=str(folder), verbose=0, callbacks=loggers),
    ).fit()
    assert not results.errors


def test_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown logger 'mlfow'; did you mean 'mlflow'\? Choose from: mlflow, wandb"
    ):
        make_loggers(["mlfow"], study="s", folder=tmp_path)


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_package_not_installed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(module: str) -> None:
        raise ImportError(module)

    monkeypatch.setattr(errors.importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=rf"needs the package '{name}'.*pip install 'bss_ray\[{name}\]'"):
        make_loggers([name], study="s", folder=tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow-skinny is not installed (extra mlflow)")
    from mlflow.tracking import MlflowClient

    for name in ("first", "second"):  # in one process, and each to its own folder
        (tmp_path / name).mkdir()
        search(tmp_path / name, make_loggers(["mlflow"], study=name, folder=tmp_path / name))
        client = MlflowClient(f"sqlite:///{tmp_path / name / 'mlflow.db'}")
        assert {found.name for found in client.search_experiments()} == {"Default", name}
        experiment = client.get_experiment_by_name(name)
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        assert {float(run.data.params["settings/lr"]) for run in runs} == set(RATES)
        for run in runs:
            assert run.info.status == "FINISHED"
            assert run.data.params["settings/model/width"] == "8"
            losses = client.get_metric_history(run.info.run_id, "loss")
            rate = float(run.data.params["settings/lr"])
            assert [(loss.step, loss.value) for loss in losses] == [(step + 1, rate * step) for step in range(3)]

    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", elsewhere)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "ours")
    (tmp_path / "third").mkdir()
    search(tmp_path / "third", make_loggers(["mlflow"], study="third", folder=tmp_path / "third"))
    client = MlflowClient(elsewhere)
    assert len(client.search_runs([client.get_experiment_by_name("ours").experiment_id])) == 2
    assert not (tmp_path / "third" / "mlflow.db").exists()


def records(path: Path) -> Iterator[Any]:
    """What W&B has written to a run's file: a header of 7 bytes, then records in blocks as of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        _checksum, size, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""
        left = -at % 32768
        at += left if left < 7 else 0


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_wandb_without_a_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (extra wandb)")
    loggers = make_loggers(["wandb"], study="mine", folder=tmp_path)
    assert f"wandb sync {tmp_path / 'wandb' / 'offline-run-*'}" in caplog.text
    search(tmp_path, loggers)

    rates = set()
    for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb"):
        found = list(records(path))
        run = next(record.run for record in found if record.HasField("run"))
        assert (run.project, run.run_group) == ("mine", "mine")
        settings = {item.key: item.value_json for item in run.config.update}["settings"]
        rows = [
            {item.nested_key[0] if item.nested_key else item.key: item.value_json for item in record.history.item}
            for record in found
            if record.HasField("history")
        ]
        rate = next(rate for rate in RATES if f'"lr": {rate}' in settings or f'"lr":{rate}' in settings)
        assert [float(row["loss"]) for row in rows] == [rate * epoch for epoch in range(3)]
        rates.add(rate)
    assert rates == set(RATES)
