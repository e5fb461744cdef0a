"""Runs the trials of a search with Ray Tune, which only executes: the record says which trials, and when one ends."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray.tune
from ray.tune.schedulers import PopulationBasedTraining

from bss_ray.train.supervise import OnMessage
from bss_ray.tune.burn_in import BurnIns
from bss_ray.tune.config import TuneConfig
from bss_ray.tune.desk import Asking, Desk, Pruning, as_config, drop_checkpoints
from bss_ray.tune.explore import Explore
from bss_ray.tune.record import SearchRecord

TRIALS = "trials"


class Interrupted(KeyboardInterrupt):
    """The search was stopped by ctrl-C, in an orderly way."""


def run_trials(
    config: TuneConfig,
    record: SearchRecord,
    trainable: Callable[[dict[str, Any]], None],
    folder: Path,
    *,
    each: Mapping[str, float],
    seats: int,
    reuse: bool = True,
    callbacks: Sequence[ray.tune.Callback] = (),
    on_message: OnMessage,
) -> None:
    """Run trials until there are as many as wanted.

    Args:
        config: of the search.
        record: of the search.
        trainable: a trial, see `bss_ray.tune.trial.run_trial` for what it is given and reports.
        folder: of the search.
        each: resources of a trial.
        seats: trials at a time.
        reuse: let a process run one trial after another.
        callbacks: of Ray Tune, such as loggers.
        on_message: told what becomes of each trial.

    Raises:
        Interrupted: ctrl-C; trials that were running are still so in the record.
    """
    burn_ins = BurnIns(folder)
    burn_ins.release()  # of trials that were killed with their driver
    exchanged = config.algorithm == "pbt"
    desk = Desk(record, burn_ins, folder / TRIALS, exchanged, on_message)
    common: dict[str, Any] = {
        "reuse_actors": reuse,
        "trial_name_creator": _name,
        "trial_dirname_creator": _name,
    }
    if exchanged:
        # All at once: Ray's population-based training takes no searcher.
        population = [as_config(spec) for spec in iter(record.next_trial, None)]
        scheduler = _population_based_training(config, record)
        space = {"trial": ray.tune.grid_search(population)}
        # Without a limit but that of the resources: it takes turns among trials that wait, and under a limit of Tune's
        # they would not be there yet.
        how = ray.tune.TuneConfig(scheduler=scheduler, **common)
        if not population:
            return
    else:
        # As many as the record has: it says when there are no more.
        space = {}
        how = ray.tune.TuneConfig(search_alg=Asking(record), num_samples=-1, max_concurrent_trials=seats, **common)
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trainable, {name.lower(): amount for name, amount in each.items()}),
        param_space=space,
        tune_config=how,
        run_config=ray.tune.RunConfig(
            name=TRIALS,
            storage_path=str(folder),
            callbacks=[desk, *callbacks],
            stop=Pruning(desk),
            # Population-based training takes another trial's checkpoint while that one goes on.
            checkpoint_config=ray.tune.CheckpointConfig(num_to_keep=3),
            verbose=0,
        ),
    )
    tuner.fit()
    if record.unfinished:
        raise Interrupted
    drop_checkpoints(folder / TRIALS)


def _population_based_training(config: TuneConfig, record: SearchRecord) -> PopulationBasedTraining:
    random.seed(config.seed)  # of Ray's choice among the best
    return PopulationBasedTraining(
        time_attr="epochs_done",
        metric="objective",
        mode=record.mode,
        perturbation_interval=config.population.interval,
        quantile_fraction=config.population.quantile,
        custom_explore_fn=Explore(config.seed),
        log_config=False,
    )


def _name(trial: Any) -> str:
    folder: str = trial.config["trial"]["folder"]
    return folder
