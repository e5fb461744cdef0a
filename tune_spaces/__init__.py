"""Search spaces for `bss-ray train`: one Python function each.

    learning     BSS-L: the sampling distribution, and the momentum of the scores
    heuristic    BSS-H: the pacing, updates of the scores, and their momentum
    pacing       BSS-H: the pacing alone
    criteria     how balance is measured, under the scheduler that the base settings have
    full         which scheduler, with its settings and the criteria

A space is a function `space(trial: optuna.Trial) -> dict[str, Any]`. It asks the trial for the values of its
*knobs*, the settings that are searched, and returns dotted settings of `bss-ray train`, as on the command line:

    {"scheduler.class_path": "Learning", "scheduler.init_args.temperature": 0.25, "scoring.momentum": 0.5, ...}

All other settings stay as in the base settings. Spaces are functions, not tables, because some knobs exist
only if others have a certain value. The module of each space has `KNOWN_GOOD`: points to try first
(`study.enqueue_trial(point)`), with the names of the space's knobs.

A space of your own is a function in a module of your own, named as `my_module:my_space`:

    from tune_spaces.learning import learning

    KNOWN_GOOD = [{"lr": 2e-3, "burn_in": 1, ...}]  # optional; complete points, with all knobs of a trial

    def my_space(trial):
        return {**learning(trial), "loop.lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True)}

A name must have the same range in every trial. So if two parts share a name but not a range, give one of
them a `prefix`, as `full` does. Ask for a knob only if it has an effect; a sampler learns nothing from trials
in which a knob has no effect.
"""

# Import path of each space's function; its module has `KNOWN_GOOD`. Paths, so that listing them imports nothing.
SPACES: dict[str, str] = {
    "learning": "tune_spaces.learning:learning",
    "heuristic": "tune_spaces.heuristic:heuristic",
    "pacing": "tune_spaces.pacing:pacing",
    "criteria": "tune_spaces.criteria:criteria",
    "full": "tune_spaces.full:full",
}
