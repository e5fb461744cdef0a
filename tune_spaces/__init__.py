"""Search spaces for `bss-ray train`: one Python function per scheduler.

A space is a function `space(trial: optuna.Trial) -> dict[str, Any]`. It asks the trial for its knobs and
returns dotted settings of `bss-ray train`, ready for the command line:

    {"scheduler.class_path": "Learning", "scheduler.init_args.temperature": 0.25, "scoring.momentum": 0.5, ...}

Functions, not tables, because some knobs exist only where others have a certain value. Beside each space
stands `KNOWN_GOOD`: points to try first (`study.enqueue_trial(point)`), named as the space names its knobs.

    tune_spaces.learning.learning      BSS-L
    tune_spaces.heuristic.heuristic    BSS-H

Copy one of them to make a space of your own.
"""
