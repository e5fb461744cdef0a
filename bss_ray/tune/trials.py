"""Runs the trials of a search with Ray Tune, which only executes: the record chooses trials and ends them."""

from __future__ import annotations

import copy
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining
from ray.tune.search import Searcher

from bss_ray.errors import ConfigError, ResourceError, first_line
from bss_ray.placement.fit import check_fit, copies_that_fit
from bss_ray.placement.packing import ProcessGroup
from bss_ray.placement.resources import HOLDERS, SCORERS, SPARE, ResourceRequest, check_resources
from bss_ray.runtime.messages import OnMessage, TrialChanged
from bss_ray.runtime.wait import unwrap_ray_error
from bss_ray.tune.config import TuneConfig
from bss_ray.tune.record import SearchRecord, TrialSpec
from bss_ray.tune.trial import BurnIns, scoring_here

# For each dotted setting its range, and whether it is changed by a factor or by a step.
_FACTOR, _STEP = 1.25, 0.1
_MOMENTUM = "scoring.momentum"
_KNOBS: dict[str, tuple[float, float, bool]] = {
    "scheduler.init_args.temperature": (0.05, 2.0, True),
    "scheduler.init_args.fraction": (0.3, 1.0, False),
    _MOMENTUM: (0.0, 0.9, False),
}
_RESAMPLE = 0.25


class Explore:
    """Changes temperature, fraction and momentum, if they have an effect in a trial; Ray Tune's `custom_explore_fn`.

    Each setting becomes a step larger or smaller, or is drawn again with probability 1/4.

    Args:
        seed: Seed of the random numbers.
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        """A changed copy of `{"trial": {"settings": ...}}`."""
        config = copy.deepcopy(config)
        settings = config["trial"]["settings"]
        for name, (low, high, by_factor) in _KNOBS.items():
            value = settings.get(name)
            if value is not None and (name != _MOMENTUM or _has_memory(settings)):
                settings[name] = round(self._changed(float(value), low, high, by_factor), 6)
        return config

    def _changed(self, value: float, low: float, high: float, by_factor: bool) -> float:
        if self._random.random() < _RESAMPLE:
            drawn = self._random.random()
            return low * (high / low) ** drawn if by_factor else low + (high - low) * drawn
        sign = 1 if self._random.random() < 0.5 else -1
        changed = value * _FACTOR**sign if by_factor else value + _STEP * sign
        return min(max(changed, low), high)


def _has_memory(settings: Mapping[str, object]) -> bool:
    """Whether scores are updated by a moving average: a sum refuses a momentum."""
    return settings.get("scoring.accumulate") != "sum" and settings.get("scheduler.init_args.update_interval") != 0


# A trial without resources still needs a process.
_MOST = 64


def max_concurrent_trials(config: TuneConfig, scaling: ray.train.ScalingConfig) -> int:
    """Number of trials for which the cluster has room at a time, at most `max_concurrent`.

    Raises:
        ResourceError: The cluster never has room for a trial.
        ConfigError: There is no room for a population that must train at the same time.
    """
    request = check_resources(scaling, scoring_here(config.train).scoring, config.train.placement)
    nodes = [node for node in request.nodes if node.there]
    groups = _processes(config, scaling, request)
    try:
        check_fit(nodes, groups)
    except ResourceError as error:
        raise ResourceError(
            f"there is no room for a trial: {error}. What a trial takes: cpus_per_trial, gpus_per_trial, "
            "train.num_workers, and what scoring takes"
        ) from None
    # Trials whose processes hold all CPUs would wait forever for their own ranks and scorers.
    room = copies_that_fit(nodes, groups, at_most=_MOST)
    limited = config.max_concurrent is not None or scaling.num_workers > 1
    room = min(room, config.max_concurrent or room)
    if config.algorithm == "pbt" and limited and room < config.trials:
        raise ConfigError(
            f"algorithm=pbt trains its {config.trials} trials side by side, and there is room for {room}. Lower "
            "trials; more of them take turns only where each has one worker and max_concurrent is null"
        )
    return room


def trial_resources(config: TuneConfig, scaling: ray.train.ScalingConfig) -> dict[str, float]:
    """Resources of a trial's own process."""
    if scaling.num_workers > 1:
        # The ranks train, but Ray Tune requires some resource; a CPU would mean one rank less.
        return {"CPU": 0.0, "GPU": 0.0, "memory": 1.0}
    gpus = config.gpus_per_trial if config.gpus_per_trial is not None else float(scaling.use_gpu)
    return {"CPU": config.cpus_per_trial, "GPU": gpus}


def _processes(config: TuneConfig, scaling: ray.train.ScalingConfig, request: ResourceRequest) -> list[ProcessGroup]:
    """Processes of a trial: its own, and what its run asks for."""
    own = ProcessGroup(name="trials", count=1, each=trial_resources(config, scaling))
    if scaling.num_workers > 1:
        return [own, *(group for group in request.groups if group.name != SPARE)]
    if request.scoring.engine != "actors":
        return [own]  # which is the rank, the holder and the coordinator, too
    return [own, *(group for group in request.groups if group.name in (HOLDERS, SCORERS))]


def as_config(spec: TrialSpec) -> dict[str, object]:
    return {
        "number": spec.number,
        "settings": spec.settings,
        "folder": spec.folder,
        "earlier": spec.earlier_folders(),
    }


class _Unsaved:
    """Base of objects that are left out of Ray Tune's own state file, because the record restores them."""

    def __reduce__(self) -> tuple[object, ...]:
        return object, ()


class StudySearcher(_Unsaved, Searcher):  # type: ignore[misc]
    """Ray Tune's searcher, which asks the record for the next trial. It has no state of its own."""

    def __init__(self, record: SearchRecord) -> None:
        super().__init__()
        self._record = record

    def suggest(self, trial_id: str) -> dict[str, object] | str:
        spec = self._record.next_trial()
        return self.FINISHED if spec is None else {"trial": as_config(spec)}

    def on_trial_complete(self, trial_id: str, result: dict[str, object] | None = None, error: bool = False) -> None:
        """`StudyCallback` tells the record."""

    def save(self, checkpoint_path: str) -> None:
        """The record saves itself."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """There is nothing to restore."""


class StudyCallback(_Unsaved, ray.tune.Callback):  # type: ignore[misc]
    """Tells the record and `on_message` what happens to each trial, and cleans up after it.

    Args:
        record: Record of the search.
        burn_ins: Burn-ins of the search.
        folder: Folder of the trials.
        exchanged: Whether trials continue from each other's checkpoints, which must then stay.
        on_message: Function that is called with messages about each trial.
    """

    def __init__(
        self, record: SearchRecord, burn_ins: BurnIns, folder: Path, exchanged: bool, on_message: OnMessage
    ) -> None:
        self._record, self._burn_ins, self._on_message = record, burn_ins, on_message
        self._folder, self._exchanged = folder, exchanged
        # A trial that population-based training replaces has another trial's configuration from then on.
        self._numbers: dict[str, int] = {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        number = self._numbers.setdefault(trial.trial_id, trial.config["trial"]["number"])
        self._tell(number, "running")

    def has_reported(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        """Record a report; returns whether the trial is pruned."""
        number = self._numbers[trial_id]
        self._record.note_changes(number, result["epochs_done"], result["config"]["trial"]["settings"])
        pruned = self._record.report(number, result["epochs_done"], result["trial"])
        self._tell(number, "running", epoch=result["epochs_done"], values=result["trial"]["values"])
        return pruned

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        number = self._numbers[trial.trial_id]
        outcome = (trial.last_result or {}).get("trial", {})
        state = self._record.end(number, outcome)
        self._burn_ins.release(trial.trial_id)
        if state is not None:
            if not self._exchanged:  # nobody needs the checkpoints of a finished trial
                drop_checkpoints(self._folder, f"{number:05d}*")
            self._tell(number, state.name.lower(), values=outcome["values"])

    def on_step_end(self, iteration: int, trials: list[Trial], **info: object) -> None:
        """Release a paused trial's burn-in, for which the trial that runs instead may wait."""
        for trial in trials:
            if trial.status == Trial.PAUSED:
                self._burn_ins.release(trial.trial_id)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        number = self._numbers.setdefault(trial.trial_id, trial.config["trial"]["number"])
        self._record.fail(number, cause_of(trial))
        self._burn_ins.release(trial.trial_id)
        self._tell(number, "fail")

    def _tell(
        self, number: int, state: str, *, epoch: int | None = None, values: Sequence[float] | None = None
    ) -> None:
        trial = self._record.trial(number)
        cause = trial.user_attrs.get("cause", "")
        self._on_message(TrialChanged(number, state, trial.params, self._record.metrics, cause, values, epoch=epoch))


class PruneStopper(_Unsaved, ray.tune.Stopper):  # type: ignore[misc]
    """Ray Tune's stopper, which sees each report before any scheduler."""

    def __init__(self, desk: StudyCallback) -> None:
        self._desk = desk

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return self._desk.has_reported(trial_id, result)

    def stop_all(self) -> bool:
        return False


def drop_checkpoints(folder: Path, trials: str = "*") -> None:
    """Remove the checkpoints of trials: there are many trials, and a search is about settings."""
    for checkpoint in folder.glob(f"{trials}/checkpoint_*"):
        shutil.rmtree(checkpoint, ignore_errors=True)


def cause_of(trial: Trial) -> str:
    """The reason why a trial failed, in a line."""
    # Read from where it was written, because it reaches the storage only later.
    if trial.pickled_error_file is not None:
        return _cause(unwrap_ray_error(ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())))
    if trial.error_file is None:
        return "unknown"
    # Ray Tune keeps other errors, such as a process that was killed for its memory, only as text.
    text = Path(trial.error_file).read_text()
    if "memory" in text:
        return "its process was killed, because its node ran out of memory"
    lines = [line for line in text.splitlines() if line and not line.startswith("Failure #")]
    return lines[0] if lines else "unknown"


def _cause(error: BaseException) -> str:
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process died: it was killed, or it crashed"
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


TRIALS = "trials"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C has stopped the search in an orderly way."""


def run_trials(
    config: TuneConfig,
    record: SearchRecord,
    trainable: Callable[[dict[str, Any]], None],
    folder: Path,
    *,
    each: Mapping[str, float],
    concurrent: int,
    reuse: bool = True,
    callbacks: Sequence[ray.tune.Callback] = (),
    on_message: OnMessage,
) -> None:
    """Run trials until the search has enough of them.

    Args:
        config: Settings of the search.
        record: Record of the search.
        trainable: A trial; see `bss_ray.tune.trial.run_trial` for its arguments and reports.
        folder: Folder of the search.
        each: Resources of a trial.
        concurrent: Number of trials at a time.
        reuse: Whether a process runs one trial after another.
        callbacks: Callbacks of Ray Tune, such as loggers.
        on_message: Function that is called with messages about each trial.

    Raises:
        Interrupted: Ctrl-C was pressed; trials that were running are still running in the record.
    """
    burn_ins = BurnIns(folder)
    burn_ins.release()  # claims of trials that were killed with their driver
    exchanged = config.algorithm == "pbt"
    desk = StudyCallback(record, burn_ins, folder / TRIALS, exchanged, on_message)
    common: dict[str, Any] = {
        "reuse_actors": reuse,
        "trial_name_creator": _name,
        "trial_dirname_creator": _name,
    }
    if exchanged:
        # All trials at once, because Ray's population-based training takes no searcher.
        population = [as_config(spec) for spec in iter(record.next_trial, None)]
        scheduler = _population_based_training(config, record)
        space = {"trial": ray.tune.grid_search(population)}
        # Limited by the resources only: population-based training takes turns among waiting trials, which would not
        # exist yet under a limit of Ray Tune.
        how = ray.tune.TuneConfig(scheduler=scheduler, **common)
        if not population:
            return
    else:
        # No fixed number: the record says when there are no more trials.
        space = {}
        how = ray.tune.TuneConfig(
            search_alg=StudySearcher(record), num_samples=-1, max_concurrent_trials=concurrent, **common
        )
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trainable, {name.lower(): amount for name, amount in each.items()}),
        param_space=space,
        tune_config=how,
        run_config=ray.tune.RunConfig(
            name=TRIALS,
            storage_path=str(folder),
            callbacks=[desk, *callbacks],
            stop=PruneStopper(desk),
            # Population-based training takes another trial's checkpoint while that trial continues.
            checkpoint_config=ray.tune.CheckpointConfig(num_to_keep=3),
            verbose=0,
        ),
    )
    tuner.fit()
    if record.unfinished:
        raise Interrupted
    drop_checkpoints(folder / TRIALS)


def _population_based_training(config: TuneConfig, record: SearchRecord) -> PopulationBasedTraining:
    random.seed(config.seed)  # seed of Ray's choice among the best
    return PopulationBasedTraining(
        time_attr="epochs_done",
        metric="objective",
        mode=record.mode,
        perturbation_interval=config.population.interval,
        quantile_fraction=config.population.quantile,
        custom_explore_fn=Explore(config.seed),
        log_config=False,
    )


def _name(trial: Trial) -> str:
    folder: str = trial.config["trial"]["folder"]
    return folder
