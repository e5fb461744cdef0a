"""Search spaces for `bss-ray train`: one Python function each.

    learning     BSS-L: the sampling distribution, and the memory of the scores
    heuristic    BSS-H: pace, refreshed scores, and their memory
    pacing       BSS-H: the pace alone
    criteria     how balance is measured, under the scheduler that the base settings have
    full         which scheduler, with its knobs and the criteria

A space is a function `space(trial: optuna.Trial) -> dict[str, Any]`. It asks the trial for its knobs and
returns dotted settings of `bss-ray train`, ready for the command line:

    {"scheduler.class_path": "Learning", "scheduler.init_args.temperature": 0.25, "scoring.momentum": 0.5, ...}

What it does not return stays as the base settings have it. Functions, not tables, because some knobs exist
only where others have a certain value. Beside each space stands `KNOWN_GOOD`: points to try first
(`study.enqueue_trial(point)`), named as the space names its knobs.

One of your own is a function in a module of yours, named as `my_module:my_space`:

    from tune_spaces.learning import learning

    KNOWN_GOOD = [{"lr": 2e-3, "burn_in": 1, ...}]  # optional; whole points, all knobs of a trial

    def my_space(trial):
        return {**learning(trial), "loop.lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True)}

A name must have the same range in every trial, so where two parts share a name but not a range, give one of
them a `prefix`, as `full` does. Ask for a knob only where it has an effect; a sampler learns nothing from the
other trials.
"""

# By name: where the function is. Its module has `KNOWN_GOOD`. Names, so that listing them imports nothing.
SPACES: dict[str, str] = {
    "learning": "tune_spaces.learning:learning",
    "heuristic": "tune_spaces.heuristic:heuristic",
    "pacing": "tune_spaces.pacing:pacing",
    "criteria": "tune_spaces.criteria:criteria",
    "full": "tune_spaces.full:full",
}
