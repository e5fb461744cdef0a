"""Between Ray Tune, which executes trials, and the record, which knows them: asks for trials and tells their ends."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.tune
from ray.tune.experiment import Trial
from ray.tune.search import Searcher

from bss_ray.train.supervise import OnMessage
from bss_ray.train.trainer import user_error
from bss_ray.tune.burn_in import BurnIns
from bss_ray.tune.record import SearchRecord, TrialSpec


def as_config(spec: TrialSpec) -> dict[str, Any]:
    return {
        "number": spec.number,
        "settings": spec.settings,
        "folder": spec.folder,
        "earlier": spec.earlier_folders(),
    }


class _Unsaved:
    """Ray Tune writes itself to a file, to restore a search from; ours are restored from the record."""

    def __reduce__(self) -> tuple[Any, ...]:
        return object, ()


class Asking(_Unsaved, Searcher):  # type: ignore[misc]
    """Ray Tune's searcher: asks the record for the next trial. It has no state of its own."""

    def __init__(self, record: SearchRecord) -> None:
        super().__init__()
        self._record = record

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        spec = self._record.next_trial()
        return self.FINISHED if spec is None else {"trial": as_config(spec)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The desk tells the record."""

    def save(self, checkpoint_path: str) -> None:
        """The record is saved anyway."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class Desk(_Unsaved, ray.tune.Callback):  # type: ignore[misc]
    """Tells the record, and whoever looks on, what becomes of each trial; tidies up after it.

    Args:
        record: of the search.
        burn_ins: of the search.
        folder: of the trials.
        exchanged: whether trials go on from each other's checkpoints, which must stay.
        on_message: told what becomes of each trial.
    """

    def __init__(
        self, record: SearchRecord, burn_ins: BurnIns, folder: Path, exchanged: bool, on_message: OnMessage
    ) -> None:
        self._record, self._burn_ins, self._on_message = record, burn_ins, on_message
        self._folder, self._exchanged = folder, exchanged
        # A trial that population-based training replaces has another's configuration from then on.
        self._numbers: dict[str, int] = {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        number = self._numbers.setdefault(trial.trial_id, trial.config["trial"]["number"])
        self._tell(number, "running")

    def has_reported(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Note a report; whether the trial is pruned."""
        number = self._numbers[trial_id]
        self._record.note_changes(number, result["epochs_done"], result["config"]["trial"]["settings"])
        pruned = self._record.report(number, result["epochs_done"], result["trial"])
        self._tell(number, "running", epoch=result["epochs_done"], values=result["trial"]["values"])
        return pruned

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        number = self._numbers[trial.trial_id]
        outcome = (trial.last_result or {}).get("trial", {})
        state = self._record.end(number, outcome)
        self._burn_ins.release(trial.trial_id)
        if state is not None:
            if not self._exchanged:  # a finished trial's checkpoints are for nobody
                drop_checkpoints(self._folder, f"{number:05d}*")
            self._tell(number, state.name.lower(), values=outcome["values"])

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """A trial that is paused for another must not have that one wait for its burn-in."""
        for trial in trials:
            if trial.status == Trial.PAUSED:
                self._burn_ins.release(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        number = self._numbers.setdefault(trial.trial_id, trial.config["trial"]["number"])
        self._record.fail(number, cause_of(trial))
        self._burn_ins.release(trial.trial_id)
        self._tell(number, "fail")

    def _tell(self, number: int, state: str, **more: Any) -> None:
        trial = self._record.trial(number)
        message = {
            "kind": "trial",
            "number": number,
            "state": state,
            "params": trial.params,
            "metrics": self._record.metrics,
            "cause": trial.user_attrs.get("cause", ""),
        }
        self._on_message({**message, **more})


class Pruning(_Unsaved, ray.tune.Stopper):  # type: ignore[misc]
    """Ray Tune's stopper: sees each report before any scheduler."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return self._desk.has_reported(trial_id, result)

    def stop_all(self) -> bool:
        return False


def drop_checkpoints(folder: Path, trials: str = "*") -> None:
    """Remove the checkpoints of trials: there are many trials, and settings are what a search is after."""
    for checkpoint in folder.glob(f"{trials}/checkpoint_*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def cause_of(trial: Trial) -> str:
    """Why a trial failed, in a line."""
    # From where it was written: it reaches the storage only later.
    if trial.pickled_error_file is not None:
        return _cause(user_error(ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())))
    if trial.error_file is None:
        return "unknown"
    # Ray Tune keeps errors of other kinds, such as a process killed for its memory, as text alone.
    text = Path(trial.error_file).read_text()
    if "memory" in text:
        return "its process was killed, because its node ran out of memory"
    lines = [line for line in text.splitlines() if line and not line.startswith("Failure #")]
    return lines[0] if lines else "unknown"


def _cause(error: BaseException) -> str:
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process died: it was killed, or it crashed"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
