"""The command line: `bss-ray COMMAND`. Each command has a module in this package.

Settings come from YAML files (`--config`), dotted options (`--scheduler.temperature 0.25`) and classes
by import path (`--model.class_path my.Model`), see `bss_ray.train.settings`.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from bss_ray.errors import BssRayError
from bss_ray.names import import_name
from bss_ray.runtime.logs import CommandConfig, ray_logging

if TYPE_CHECKING:
    from bss_ray.report.console import Shown

STOPPED = 130  # exit code that shells expect after Ctrl-C


def start_ray(config: CommandConfig, display: Shown) -> None:
    """Connect to the given cluster, or start Ray on this machine, without its output."""
    gc.enable()  # see `main`
    # Each report is a barrier that waits for one poll of the controller, and epochs can be as short as a second.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # All processes must find the user's modules in the current folder.
    paths = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    if not sys.stdout.isatty():  # otherwise Ray colours its own output even in a log
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    if not config.verbose:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    import ray.data

    from bss_ray.runtime.ray_internals import without_helpers

    address = config.ray_address or os.environ.get("RAY_ADDRESS")
    display.status(f"connecting to Ray at {address}" if address else "starting Ray on this machine")
    level = logging.INFO if config.verbose else logging.ERROR
    if address or not ray.is_initialized():  # otherwise the caller of `main` has started it
        with contextlib.nullcontext() if address else without_helpers(logs=config.verbose):
            _init_ray(
                display,
                address=address or "local",
                log_to_driver=config.verbose,
                logging_level=level,
                **({} if address else {"include_dashboard": False}),
                **ray_logging(config.log_format),
            )
    if config.log_format == "json":  # which turns all of this process's loggers up as well
        logging.getLogger().setLevel(logging.WARNING)
        logging.getLogger("ray").setLevel(level)
    ray.data.DataContext.get_current().enable_progress_bars = config.verbose
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(level)
    if threading.current_thread() is threading.main_thread():  # no other may
        signal.signal(signal.SIGTERM, _stop)


def _init_ray(display: Shown, **options: Any) -> None:
    """`ray.init`, twice if need be: Ray gives its processes 30 s to start, too few on a machine that is very busy."""
    import ray

    try:
        ray.init(**options)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        ray.shutdown()
        display.say("Ray has not started within its limit of 30 s; once more")
        ray.init(**options)


def _stop(_signal: int, _frame: object) -> NoReturn:
    """Treat SIGTERM of `ray job stop`, Slurm and Kubernetes as Ctrl-C; Ray's handler would end the process at once."""
    raise KeyboardInterrupt


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
    # Until `start_ray`, all that is made are modules, and they stay: to look for garbage among them is a fifth of the
    # time that they take. The other commands do their work in this process, and make garbage.
    collecting = gc.isenabled()
    if words[0] in ("train", "score", "tune"):
        gc.disable()
    try:
        code: int = import_name(COMMANDS[words[0]])([_underscored(word) for word in words[1:]])
        return code
    except BssRayError as error:
        print(f"bss-ray: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED
    finally:
        (gc.enable if collecting else gc.disable)()


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
