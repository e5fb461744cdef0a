"""From a command to a Ray cluster."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, NoReturn

from bss_ray.runtime.logs import CommandConfig, ray_logging

if TYPE_CHECKING:
    from bss_ray.report.console import Shown

STOPPED = 130  # exit code that shells expect after Ctrl-C


def start_ray(config: CommandConfig, display: Shown) -> None:
    """Connect to the given cluster, or start Ray on this machine, without its output."""
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
            ray.init(
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


def _stop(_signal: int, _frame: object) -> NoReturn:
    """Treat SIGTERM of `ray job stop`, Slurm and Kubernetes as Ctrl-C; Ray's handler would end the process at once."""
    raise KeyboardInterrupt
