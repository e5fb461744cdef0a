"""Output of a search: a live table of trials on a terminal, a line per finished trial in a log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bss_ray.report.console import Result, show
from bss_ray.runtime.messages import ComparisonProgress, Message, Notice, Status, TrialChanged
from bss_ray.storage import StoragePath
from bss_ray.tune.config import TuneConfig

_ROWS = 12
_STATES = {"complete": "done", "pruned": "pruned", "fail": "failed", "running": "running"}


class SearchDisplay:
    """Shows the messages of a search.

    Args:
        config: Settings of the search.
        console: Console that shows the messages.
    """

    def __init__(self, config: TuneConfig, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._config = config
        self._metrics: Sequence[str] = ()
        self._status = ""
        self._trials: dict[int, TrialChanged] = {}
        self._started = time.monotonic()
        self._live = Live(console=self.console, get_renderable=self._table, refresh_per_second=4, transient=True)

    def __enter__(self) -> SearchDisplay:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_error: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def status(self, text: str) -> None:
        """What is being done now."""
        if text == self._status:
            return
        self._status = text
        if not self.console.is_terminal:
            self.say(f"[{time.monotonic() - self._started:5.1f} s] {text}")

    def on_message(self, message: Message) -> None:
        """A message of the search (see `bss_ray.tune.tuner.tune`)."""
        match message:
            case Status(text):
                self.status(text)
            case Notice(text):
                self.say(text)
            case ComparisonProgress(done, of):
                self.status(f"comparing the best with uniform sampling: {done} of {of} runs")
            case TrialChanged():
                self._trial(message)

    def _trial(self, trial: TrialChanged) -> None:
        self._metrics = trial.metrics
        before = self._trials.get(trial.number, trial)
        epoch = before.epoch if trial.epoch is None else trial.epoch
        trial = replace(trial, epoch=epoch, values=before.values if trial.values is None else trial.values)
        self._trials[trial.number] = trial
        if trial.state == "running":
            self.status("searching")
        elif not self.console.is_terminal:
            self.say(f"trial {trial.number:3d} {_STATES[trial.state]:7s} {self._shown(trial)}  {_knobs(trial)}")

    def _shown(self, trial: TrialChanged) -> str:
        if trial.state == "fail":
            return trial.cause
        return " ".join(show(name, value) for name, value in zip(self._metrics, trial.values or (), strict=False))

    def _table(self) -> Group:
        """Running trials, then the finished trials, the last first."""
        trials = list(self._trials.values())  # drawn in a thread while messages arrive
        running = [trial for trial in trials if trial.state == "running"]
        others = [trial for trial in reversed(trials) if trial.state != "running"]
        epochs = self._config.train.loop.epochs * self._config.seeds
        states = [trial.state for trial in trials]
        counts = ", ".join(f"{states.count(state)} {word}" for state, word in _STATES.items())
        seconds = time.monotonic() - self._started
        head = Text(f"{self._status}  {counts} of {self._config.trials} trials, {seconds:.0f} s")
        table = Table("trial", "state", "epochs", ", ".join(self._metrics), "knobs", box=None, pad_edge=False)
        for trial in [*running, *others][:_ROWS]:
            done = f"{trial.epoch}/{epochs}" if trial.epoch else ""
            table.add_row(str(trial.number), _STATES[trial.state], done, self._shown(trial), _knobs(trial))
        return Group(head, table) if trials else Group(head)

    def show(self, result: Result, folder: StoragePath) -> None:
        """The end of a search."""
        assert folder.local is not None, "a search's configuration refuses URIs"
        from bss_ray.report.study import study_table
        from bss_ray.tune.record import load_study

        study = load_study(self._config.storage, self._config.name, folder.local)
        self.console.print(study_table(study, result["comparison"], folder.local))


def _knobs(trial: TrialChanged) -> str:
    return " ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in trial.params.items()
    )
