"""`bss-ray train`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bss_ray.cli import STOPPED, start_ray
from bss_ray.errors import BssRayError
from bss_ray.storage import StoragePath
from bss_ray.train.settings import instantiate, make, resolved, train_parser

if TYPE_CHECKING:
    from bss_ray.report.console import Shown


def train_command(argv: Sequence[str]) -> int:
    """`bss-ray train`; returns the exit code."""
    parser = train_parser(argv)
    settings = parser.parse_args(list(argv))
    from bss_ray.train.folder import RunFolder  # after --help and wrong options: Ray takes seconds
    from bss_ray.train.run import TrainConfig, train

    config = make(TrainConfig, instantiate(parser, settings))
    folder = RunFolder(config.storage_path, config.name)
    resumed = folder.claim(resolved(parser, settings))

    from bss_ray.report.console import Display, open_display

    with open_display(config.log_format, config.name, Display) as display:
        display.say(
            f"run {folder.path}{' (resumed)' if resumed else ''}: {type(config.scheduler).__name__}, {config.data}"
        )
        result = folder.result()
        if result is None:
            try:
                start_ray(config, display)
                result = train(config, folder, display.on_message)
                _write_report(folder.path, display)
            except BssRayError:
                folder.release()
                raise
            except KeyboardInterrupt:
                display.say("stopped. The same command resumes from the last checkpoint")
                return STOPPED
        else:
            display.say("this run is complete. Choose another --name for a new one")
    display.show(result, folder.path)
    return 0


def _write_report(folder: StoragePath, display: Shown) -> None:
    from bss_ray.errors import MissingDependencyError
    from bss_ray.report.html import write_report

    try:
        write_report(folder)
    except MissingDependencyError as error:
        display.say(f"no report.html: {error}")
