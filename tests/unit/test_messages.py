"""Messages: what they show, and that they reach other processes whole."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bss_ray.errors import ResourceError
from bss_ray.runtime import messages
from bss_ray.runtime.messages import (
    BatchProgress,
    EpochFinished,
    FatalError,
    Message,
    Notice,
    RowsProgress,
    ShardsProgress,
    TrialChanged,
)

WATCHING = (Path(__file__).parents[2] / "docs" / "watching.md").read_text()


def kinds(base: type[Message] = Message) -> Iterator[tuple[str, str]]:
    """Kind and class name of each message."""
    for one in base.__subclasses__():
        if "kind" in vars(one):
            yield one.kind, one.__name__
        yield from kinds(one)


def test_the_documentation_lists_every_message() -> None:
    assert len(dict(kinds())) == len(list(kinds()))
    table = {name: kind for kind, name in re.findall(r"^\| `(\w+)` \| `(\w+)` \|", WATCHING, re.M)}
    assert table == {name: kind for kind, name in kinds()}


@pytest.mark.parametrize(
    ("message", "figures"),
    [
        (Notice("hello"), {"message": "hello"}),
        (ShardsProgress("train", 1, 3), {"split": "train", "done": 1, "of": 3}),
        (RowsProgress(1, 3, 2.5), {"done": 1, "of": 3, "rows_per_second": 2.5}),
        (
            BatchProgress(1, 40, 8, 0.5, epoch=2, version=1, rank=0),
            {"epoch": 2, "version": 1, "rank": 0, "batch": 1, "batches": 40, "new_rows": 8, "loader_stall_share": 0.5},
        ),
        (
            EpochFinished({"epoch": 2, "loss": 0.5}, [], epoch=2, version=1, rank=0),
            {"epoch": 2, "version": 1, "rank": 0, "loss": 0.5},
        ),
        (
            TrialChanged(4, "running", {"lr": 0.1}, ["val"], values=[0.5], epoch=1),
            {"epoch": 1, "number": 4, "state": "running", "params": {"lr": 0.1}, "metrics": ["val"], "cause": ""}
            | {"values": [0.5]},
        ),
    ],
)
def test_figures_are_fields_in_their_order(message: Message, figures: dict[str, Any]) -> None:
    assert list(message.figures().items()) == list(figures.items())


def test_messages_and_their_errors_survive_the_way_between_processes() -> None:
    notice = Notice("hello", epoch=2, version=1, rank=0)
    assert pickle.loads(pickle.dumps(notice)) == notice
    fatal = pickle.loads(pickle.dumps(FatalError(ResourceError("too few"))))
    assert type(fatal) is messages.FatalError
    assert type(fatal.error) is ResourceError
    assert str(fatal.error) == "too few"
