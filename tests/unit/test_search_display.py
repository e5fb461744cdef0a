"""What a search shows: lines in a log, a live table on a terminal."""

import io
from typing import Any

import pytest
from rich.console import Console

from bss_ray.report.search import SearchDisplay
from bss_ray.runtime.messages import Notice, Status, TrialChanged
from bss_ray.tune.config import TuneConfig


def trial(number: int, state: str, **more: Any) -> TrialChanged:
    return TrialChanged(number, state, {"temperature": 0.25}, ["val_accuracy_fused"], **more)


MESSAGES = [
    Status("reading train rows"),
    Notice("2 trials at a time"),
    trial(0, "running"),
    trial(0, "running", epoch=3, values=[0.9]),
    trial(1, "running", epoch=1, values=[0.5]),
    trial(0, "complete", values=[0.9125]),
    trial(2, "fail", cause="RuntimeError: boom"),
]


def shown(terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False, soft_wrap=True)
    with SearchDisplay(TuneConfig(), console) as display:
        for message in MESSAGES:
            display.on_message(message)
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def test_a_log_has_a_line_for_each_finished_trial() -> None:
    out = shown(terminal=False)
    assert "\x1b" not in out
    assert "trial   0 done    91.25%  temperature=0.25" in out
    assert "trial   2 failed  RuntimeError: boom" in out
    assert out.count("searching") == 1
    assert "trial   1" not in out, "it is still running"


@pytest.mark.parametrize("text", ["1 done, 0 pruned, 1 failed, 1 running of 16 trials", "1/15", "91.25%", "boom"])
def test_a_terminal_has_a_table(text: str) -> None:
    assert text in shown(terminal=True)
