"""Why a trial failed, as Ray Tune leaves it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.tune.experiment import Trial

from bss_ray.errors import ModelOutputError
from bss_ray.tune.trials import cause_of, drop_checkpoints


def failed(folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> Trial:
    """A trial with this error, written by Ray Tune itself."""
    trial = Trial("func", stub=True)
    trial.storage = SimpleNamespace(trial_driver_staging_path=str(folder))
    monkeypatch.setattr(Trial, "local_path", property(lambda self: str(folder)))
    trial.handle_error(error)
    return trial


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (
            ray.exceptions.RayTaskError("f", "Traceback", ModelOutputError("the loss is nan")),
            "ModelOutputError: the loss",
        ),
        (ray.exceptions.RayTaskError("f", "Traceback", MemoryError()), "MemoryError"),
        (ray.exceptions.ActorDiedError(), "its process died: it was killed, or it crashed"),
        (
            ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on"),
            "its process was killed, because its node ran out of memory",
        ),
        (ray.exceptions.RuntimeEnvSetupError("no such package"), "Failed to set up runtime environment."),
    ],
)
def test_causes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, cause: str) -> None:
    assert cause_of(failed(tmp_path, monkeypatch, error)).startswith(cause)


def test_checkpoints_of_one_trial_are_dropped_with_those_of_its_attempts(tmp_path: Path) -> None:
    for name in ("00001", "00001-again-1", "00002"):
        (tmp_path / name / "checkpoint_000003").mkdir(parents=True)
        (tmp_path / name / "progress.csv").touch()
    drop_checkpoints(tmp_path, "00001*")
    assert [path.parent.name for path in tmp_path.glob("*/checkpoint_*")] == ["00002"]
    assert len(list(tmp_path.glob("*/progress.csv"))) == 3
