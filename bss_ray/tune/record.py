"""The record of a search: an Optuna study. It alone outlives the driver, and the next trial is chosen from it.

Ray Tune only executes trials. Trials are requested from the record and their ends are told to the record, so that a
killed search is resumed from the study: finished trials are kept, and running trials start from their checkpoints.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from bss_ray.errors import ConfigError, StorageError, first_line
from bss_ray.tune.config import TuneConfig
from bss_ray.tune.objective import Objective
from bss_ray.tune.space import SearchSpace

JOURNAL = "study.journal"
_FIRST_BYTES = b'{"op_code":'  # name of a journal
# Attribute of a study: everything that belongs to its beginning is written.
_BEGUN = "begun"
# A search whose first trials all fail has a fault that more trials do not repair.
HOPELESS = 10

warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


@dataclass(frozen=True)
class TrialSpec:
    """A trial to run.

    Attributes:
        number: Number of the trial in the study.
        settings: Dotted settings of `bss-ray train`.
        attempt: Number of earlier starts of the trial.
    """

    number: int
    settings: dict[str, Any]
    attempt: int = 0

    @property
    def folder(self) -> str:
        """Name of this attempt's folder."""
        return _folder(self.number, self.attempt)

    def earlier_folders(self) -> list[str]:
        """Names of the folders of earlier attempts, the last attempt first."""
        return [_folder(self.number, attempt) for attempt in reversed(range(self.attempt))]


def _folder(number: int, attempt: int) -> str:
    return f"{number:05d}" if attempt == 0 else f"{number:05d}-again-{attempt}"


def open_storage(storage: str | None, folder: Path) -> BaseStorage:
    """The storage of studies.

    Args:
        storage: URL or journal file; None takes the journal in the folder of the search.
        folder: Folder of the search.

    Raises:
        StorageError: The storage cannot be opened.
    """
    place = storage or str(folder / JOURNAL)
    another = "Give a URL such as sqlite:///study.db, or the path of a journal file, or leave --storage away"
    if place in ("sqlite://", "sqlite:///") or place.endswith(":memory:"):
        raise StorageError(f"the storage {place} ends with this command, and the search could not resume. {another}")
    is_url = "://" in place
    try:
        return optuna.storages.get_storage(place) if is_url else _open_journal(Path(place).absolute())
    except Exception as error:  # any error of the database's driver
        text = first_line(error)
        if not is_url and not isinstance(error, OSError):
            text = f"it is no journal of Optuna, or it is damaged ({text})"
        remedy = another if storage else "Move it away, and the search starts from scratch"
        raise StorageError(f"the storage {place} cannot be opened: {text}. {remedy}") from error


def _open_journal(path: Path) -> JournalStorage:
    lock = JournalFileSymlinkLock(str(path))  # absolute: it waits forever for a killed owner otherwise
    if path.exists() and _end_of_whole_lines(path.read_bytes()) is not None:
        lock.acquire()  # other processes may be writing to this journal
        try:
            _drop_torn_line(path)
        finally:
            lock.release()
    return JournalStorage(JournalFileBackend(str(path), lock))


def _drop_torn_line(path: Path) -> None:
    """Remove a last line that was not written completely.

    Optuna ignores such a line, but writes the next line right after it, and can then never read the journal again.
    """
    with path.open("r+b") as file:
        end = _end_of_whole_lines(file.read())
        if end is not None:
            file.truncate(end)


def _end_of_whole_lines(journal: bytes) -> int | None:
    """Position at which an incomplete last line begins; None if there is no such line.

    Raises:
        ValueError: This is no journal, which Optuna would notice only after writing to it.
    """
    if not journal:
        return None
    if not (journal.startswith(_FIRST_BYTES) or _FIRST_BYTES.startswith(journal)):
        raise ValueError(f"it begins with {journal[:20]!r}")
    last = journal.rfind(b"\n", 0, -1) + 1
    try:
        json.loads(journal[last:])
    except ValueError:
        return last
    return None if journal.endswith(b"\n") else last


def load_study(storage: str | None, name: str, folder: Path) -> optuna.Study:
    """The study of an existing search; arguments are those of `open_storage`.

    Raises:
        StorageError: The storage cannot be opened, or the study does not exist.
    """
    try:
        return optuna.load_study(study_name=name, storage=open_storage(storage, folder))
    except KeyError as error:
        raise StorageError(f"there is no study {name!r} in {storage or folder / JOURNAL}") from error


class SearchRecord:
    """A search and its study.

    Args:
        storage: Storage of studies; the study is made if it does not exist.
        config: Settings of the search.
        space: Search space.
        objective: What is optimised.
        data: Fingerprints of the data by split.

    Raises:
        ConfigError: The study has another space, objective or data.
        StorageError: The study cannot be read.
    """

    def __init__(
        self,
        storage: BaseStorage,
        config: TuneConfig,
        space: SearchSpace,
        objective: Objective,
        data: Mapping[str, str | None],
    ) -> None:
        self._config, self._space = config, space
        self.metrics = list(objective.metrics)
        self.mode = objective.mode
        attributes = {
            "space": config.space,
            "metrics": self.metrics,
            "directions": list(objective.directions),
            "seeds": config.seeds,
            "data": dict(data),
            "algorithm": config.algorithm,
        }
        pruner = optuna.pruners.SuccessiveHalvingPruner(
            min_resource=config.pruning.grace_epochs, reduction_factor=config.pruning.reduction
        )
        try:
            self.study = optuna.create_study(
                study_name=config.name,
                storage=storage,
                pruner=pruner if config.prunes else optuna.pruners.NopPruner(),
                directions=objective.directions,
                load_if_exists=True,
            )
            self._storage, self._study_id = storage, storage.get_study_id_from_name(config.name)
            there = self.study.user_attrs
        except optuna.exceptions.OptunaError as error:
            raise StorageError(f"the study {config.name} cannot be read: {error}") from error
        there["directions"] = [direction.name.lower() for direction in self.study.directions]
        # A study without trials may be from a driver that was killed before it had written everything.
        _check_owner(config, attributes, there if self._trials() else {**attributes, **there})
        if not there.get(_BEGUN):
            self._begin(attributes)
        self._interrupted = self._trials(TrialState.RUNNING)
        self._pruned: set[int] = set()

    def _begin(self, attributes: dict[str, object]) -> None:
        """Write everything that belongs to the beginning of a search, or the missing part of it."""
        for name, value in attributes.items():
            self.study.set_user_attr(name, value)
        self.study.set_metric_names(self.metrics)
        for point in self._space.known_good:
            self.study.enqueue_trial(point, skip_if_exists=True)
        self.study.set_user_attr(_BEGUN, True)

    # ---- before a trial -----------------------------------------------------------------------

    @property
    def finished(self) -> list[FrozenTrial]:
        """Trials that are complete, pruned or failed."""
        return [trial for trial in self._trials() if trial.state.is_finished()]

    @property
    def complete(self) -> list[FrozenTrial]:
        """Trials that are complete."""
        return self._trials(TrialState.COMPLETE)

    @property
    def hopeless(self) -> bool:
        """Whether there are many trials and all of them failed."""
        finished = self.finished
        return len(finished) >= HOPELESS and all(trial.state == TrialState.FAIL for trial in finished)

    @property
    def first_cause(self) -> str:
        """Reason why the first of the failed trials failed."""
        failed = self._trials(TrialState.FAIL)
        return f"trial {failed[0].number}: {failed[0].user_attrs.get('cause', 'unknown')}" if failed else ""

    def trial(self, number: int) -> FrozenTrial:
        """The current state of the trial of this number."""
        return self._storage.get_trial(self._id(number))

    def next_trial(self) -> TrialSpec | None:
        """The trial to run next: an interrupted trial, else a new trial; None if the search has enough trials.

        A trial with impossible settings counts as failed.
        """
        while self._interrupted:
            stopped = self._interrupted.pop(0)
            attempt = stopped.user_attrs.get("attempt", 0) + 1
            self._note(stopped.number, attempt=attempt)
            self.study.sampler = self._sampler(stopped.number)
            if spec := self._spec(optuna.Trial(self.study, self._id(stopped.number)), attempt):
                return spec
        while self._wants_more():
            # From the seed and the number only, so that a resumed search does not draw its first trials again.
            self.study.sampler = self._sampler(self._started())
            if spec := self._spec(self.study.ask()):
                return spec
        return None

    def _spec(self, trial: optuna.Trial, attempt: int = 0) -> TrialSpec | None:
        """The trial with its settings; None if the settings are impossible, which fails the trial."""
        settings = trial.user_attrs.get("settings")
        if settings is None:  # knobs that were drawn before the driver was killed keep their values
            try:
                settings = self._space.settings(trial)
                self._space.config(settings, trial.params)
            except ConfigError as error:
                self.fail(trial.number, str(error))
                return None
            self._note(trial.number, settings=settings)
        return TrialSpec(trial.number, settings, attempt)

    @property
    def unfinished(self) -> bool:
        """Whether trials are running, or still to come."""
        return bool(self._trials(TrialState.RUNNING)) or self._wants_more()

    def _wants_more(self) -> bool:
        return not self.hopeless and self._started() < self._config.trials

    def _started(self) -> int:
        """Trials that were started; not known points that still wait."""
        return sum(trial.state != TrialState.WAITING for trial in self._trials())

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        seed = int(np.random.SeedSequence([self._config.seed, number]).generate_state(1)[0])
        if self._config.algorithm == "tpe":
            return make_tpe(seed)
        return optuna.samplers.RandomSampler(seed=seed)

    # ---- during and after a trial -------------------------------------------------------------

    def report(self, number: int, step: int, outcome: Mapping[str, Any]) -> bool:
        """Record the value of a trial after a number of epochs.

        Args:
            number: Number of the trial.
            step: Number of finished epochs, over all seeds of the trial.
            outcome: See `bss_ray.tune.trial`.

        Returns:
            Whether the trial is pruned, because it does not pass the rung that it has reached.
        """
        if len(outcome["values"]) > 1:
            return False  # Optuna keeps no intermediate values for several objectives
        if step not in self.trial(number).intermediate_values:
            self._storage.set_trial_intermediate_value(self._id(number), step, float(outcome["values"][0]))
        # A trial that has reached its end is complete, even if there is a rung.
        if outcome["finished"] or not self.study.pruner.prune(self.study, self.trial(number)):
            return False
        self._pruned.add(number)
        return True

    def note_changes(self, number: int, step: int, settings: dict[str, object]) -> None:
        """Record that a trial continues with other settings."""
        attributes = self.trial(number).user_attrs
        before = attributes["settings"]
        changed = {name: value for name, value in settings.items() if before.get(name) != value}
        if changed:
            self._note(number, settings=settings, changes=[*attributes.get("changes", []), [step, changed]])

    def end(self, number: int, outcome: Mapping[str, Any]) -> TrialState | None:
        """Record how a stopped trial has ended.

        Args:
            number: Number of the trial.
            outcome: Last report of the trial, see `bss_ray.tune.trial`; empty if it never reported.

        Returns:
            The state of the trial; None if it was interrupted and waits until the search is resumed.
        """
        if number in self._pruned:
            self._note(number, seed_values=outcome["seed_values"], epoch=outcome["epoch"], seconds=outcome["seconds"])
            self.study.tell(number, state=TrialState.PRUNED)
            return TrialState.PRUNED
        if not outcome.get("finished"):
            return None
        values = outcome["values"]
        for name, value in zip(self.metrics, values, strict=True):
            if not math.isfinite(value):
                self.fail(number, f"{name} is {value}")
                return TrialState.FAIL
        self._note(number, seed_values=outcome["seed_values"], epoch=outcome["epoch"], seconds=outcome["seconds"])
        self.study.tell(number, values)
        return TrialState.COMPLETE

    def fail(self, number: int, cause: str) -> None:
        """Record that a trial failed, and why."""
        self._note(number, cause=cause)
        self.study.tell(number, state=TrialState.FAIL)

    # ---- internals ----------------------------------------------------------------------------

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Trials in these states, without a copy, which would take most of the time with hundreds of trials."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _note(self, number: int, **attributes: object) -> None:
        for name, value in attributes.items():
            self._storage.set_trial_user_attr(self._id(number), name, value)


def make_tpe(seed: int) -> optuna.samplers.TPESampler:
    """TPE for trials that run at the same time, over spaces whose knobs depend on each other.

    It draws at random until 6 trials are done, known points among them, instead of Optuna's 10, which would be most of
    a search of 16 trials. On two noisy objectives over the space `learning`, with two trials at a time and 400 seeds,
    this brought the best of 16 trials 7 and 8 % nearer to the optimum, the best of 24 trials 3 and 8 %, and the best of
    48 equally near. Modelling each knob alone (multivariate=False) was a little worse for 24 trials, better for 48.
    """
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=6, multivariate=True, group=True, constant_liar=True)


def _check_owner(config: TuneConfig, here: Mapping[str, object], there: Mapping[str, object]) -> None:
    changed = [
        f"{name}: {there.get(name)!r} there, {value!r} now" for name, value in here.items() if there.get(name) != value
    ]
    if changed:
        where = config.storage or "its journal"
        raise ConfigError(
            f"the study {config.name!r} in {where} is of another search, with other settings.\n  "
            + "\n  ".join(changed)
            + "\nChoose another --name or --storage"
        )
