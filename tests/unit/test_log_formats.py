"""What commands print: for people at a terminal, for people who read logs, and for programs."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bss_ray.errors import ConfigError
from bss_ray.report.console import Display, JsonLines, open_display
from bss_ray.runtime.logs import RunLogger
from bss_ray.runtime.messages import AttemptStarted, BatchProgress, EpochFinished, Message, Notice, Status
from bss_ray.score.config import ScoreConfig
from bss_ray.train.run import TrainConfig
from bss_ray.tune.config import TuneConfig

ROW: dict[str, Any] = {"epoch": 3, "rows": 10, "effective_sample_size": 8.5, "train_loss": 0.5, "score_version": 2}
ROW |= {f"seconds_{name}": 1.0 for name in ("scoring", "planning", "training")}
PLACE = {"epoch": 3, "version": 2, "rank": 0}
MESSAGES: list[Message] = [
    Status("reading train rows"),
    AttemptStarted(0, restarts=1, **PLACE),
    *(BatchProgress(batch, 40, 10, 0.25, **PLACE) for batch in (0, 1, 39)),
    Notice("Warning: peaked", **PLACE),
    EpochFinished(ROW, [ROW], **PLACE),
]


def lines_of(run: str = "mine", messages: list[Message] = MESSAGES) -> list[dict[str, Any]]:
    out = io.StringIO()
    with JsonLines(run, out) as display:
        for message in messages:
            display.on_message(message)
    return [json.loads(line, parse_constant=pytest.fail) for line in out.getvalue().splitlines()]


def test_each_message_is_one_json_line_that_says_where_it_comes_from() -> None:
    lines = lines_of()
    assert [line["event"] for line in lines] == ["status", "begin", "batch", "batch", "notice", "epoch"]
    for line in lines:
        assert line["run"] == "mine"
        assert datetime.fromisoformat(line["time"]).utcoffset() == timedelta(0)
    places = [{name: line[name] for name in PLACE} for line in lines]
    assert places == [dict.fromkeys(PLACE), *[PLACE] * 5]
    assert [line["level"] for line in lines] == ["INFO"] * 4 + ["WARNING", "INFO"]
    assert lines[0]["message"] == "reading train rows"


def test_an_epoch_is_a_line_of_its_figures() -> None:
    line = lines_of()[-1]
    assert {name: line[name] for name in ROW} == ROW
    assert "history" not in line


def test_progress_is_told_now_and_then_and_at_its_end() -> None:
    # The second message comes at once after the first, the third is of the last batch.
    assert [line["batch"] for line in lines_of() if line["event"] == "batch"] == [0, 39]


def test_numbers_that_json_does_not_have_are_null() -> None:
    row = {**ROW, "train_loss": math.nan, "deep": {"list": [math.inf, 1.0]}}
    line = lines_of(messages=[EpochFinished(row, [], **PLACE)])[0]
    assert line["train_loss"] is None
    assert line["deep"] == {"list": [None, 1.0]}


def test_the_result_and_an_error_are_lines_too() -> None:
    out = io.StringIO()

    def fails() -> None:
        with JsonLines("mine", out) as display:
            display.show({"chosen_epoch": 3}, Path("runs/mine"))
            raise ConfigError("batch_size is 0")

    with pytest.raises(ConfigError):
        fails()
    result, error = map(json.loads, out.getvalue().splitlines())
    assert (result["event"], result["chosen_epoch"], result["folder"]) == ("result", 3, "runs/mine")
    assert (error["event"], error["level"], error["type"]) == ("error", "ERROR", "ConfigError")
    assert error["message"] == "batch_size is 0"


class FlushCounting(io.StringIO):
    """Standard output that is no terminal, as in a job."""

    flushed = 0

    def flush(self) -> None:
        self.flushed = len(self.getvalue())


def printed(log_format: str, monkeypatch: pytest.MonkeyPatch) -> str:
    out = FlushCounting()
    monkeypatch.setattr(sys, "stdout", out)
    with open_display(log_format, "mine", Display) as display:
        for message in MESSAGES:
            display.on_message(message)
            assert log_format == "rich" or out.flushed == len(out.getvalue())
    return out.getvalue()


@pytest.mark.parametrize("log_format", ["auto", "plain"])
@pytest.mark.parametrize("force", [True, False])
def test_off_a_terminal_there_is_a_line_per_stage_and_epoch(
    log_format: str, force: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if force:  # as build servers do, to have colours
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TTY_COMPATIBLE", "1")
    text = printed(log_format, monkeypatch)
    assert "\x1b" not in text
    assert "\r" not in text
    stage, warning, _header, epoch = text.splitlines()
    assert stage.endswith("s] reading train rows")
    assert warning == "Warning: peaked"
    assert epoch.split()[:2] == ["3", "10"]


def test_rich_moves_the_cursor_where_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[" in printed("rich", monkeypatch)


def test_json_is_chosen_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(json.loads(line)["run"] == "mine" for line in printed("json", monkeypatch).splitlines())


@pytest.mark.parametrize("config", [TrainConfig, ScoreConfig, TuneConfig])
def test_a_format_that_does_not_exist_is_refused(config: type) -> None:
    with pytest.raises(ConfigError, match="unknown log_format 'jsn'; did you mean 'json'"):
        config(log_format="jsn")


def test_records_of_a_process_say_where_they_come_from(caplog: pytest.LogCaptureFixture) -> None:
    logger = RunLogger(run="mine", rank=1)
    with caplog.at_level(logging.INFO, "bss_ray"):
        logger.at(epoch=3, version=2).info("saved %d", 5, extra={"batch": 7})
        logger.info("again")
    first, second = caplog.records
    wanted = {"run": "mine", "rank": 1, "epoch": 3, "version": 2, "batch": 7}
    assert {name: getattr(first, name) for name in wanted} == wanted
    assert first.getMessage() == "saved 5"
    assert (second.epoch, second.version, second.rank) == (None, None, 1)  # type: ignore[attr-defined]
