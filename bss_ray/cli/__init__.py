"""The command line: `bss-ray COMMAND`. Each command has a module in this package.

Settings come from YAML files (`--config`), dotted options (`--scheduler.temperature 0.25`) and classes
by import path (`--model.class_path my.Model`), see `bss_ray.train.settings`.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence

from bss_ray.cli.ray_start import STOPPED
from bss_ray.errors import BssRayError
from bss_ray.names import import_name

# Import path of each command's function of its arguments, which returns the exit code; imported when it is called.
COMMANDS: dict[str, str] = {
    "train": "bss_ray.cli.train:train_command",
    "score": "bss_ray.cli.score:score_command",
    "tune": "bss_ray.cli.tune:tune_command",
    "report": "bss_ray.cli.report:report_command",
    "submit": "bss_ray.cli.submit:submit_command",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `bss-ray`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--version"]:
        from bss_ray import __version__

        print(f"bss-ray {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if words[0] not in COMMANDS:
        close = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Choose from: {', '.join(COMMANDS)}"
        print(f"bss-ray: unknown command {words[0]!r}. {hint}", file=sys.stderr)
        return 2
    sys.path.insert(0, os.getcwd())
    try:
        code: int = import_name(COMMANDS[words[0]])([_underscored(word) for word in words[1:]])
        return code
    except BssRayError as error:
        print(f"bss-ray: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED


def _underscored(word: str) -> str:
    """`--initial-scores=FILE` is `--initial_scores=FILE`."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


_USAGE = """usage: bss-ray COMMAND [options]

  train    train a multi-modal model with balance-aware sampling; without options, a demo
  score    score the rows of any dataset with a model and its weights; without options, the demo's
  tune     search the sampler's settings, and compare the best with uniform sampling; without options, a demo
  report   write report.html of a search, run or job again, and print the most important results
  submit   run one of the first three on an existing Ray cluster, and follow it

bss-ray COMMAND --help shows a command's options. Settings come from YAML (--config FILE) and dotted
options (--scheduler.temperature 0.25); --print_config prints all of them. The same command resumes a
stopped run."""
