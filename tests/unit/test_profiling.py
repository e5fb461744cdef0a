"""Which step and which pass are profiled."""

from __future__ import annotations

from typing import Any

import pytest

from bss_ray.runtime import profiling
from bss_ray.runtime.profiling import Profiler


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be recorded."""
    found: list[Any] = []

    class Recorded:
        def __init__(self, file: str, _post: Any) -> None:
            self.file = file

        def __enter__(self) -> None:
            found.append(self.file)

        def __exit__(self, *_error: object) -> None: ...

    monkeypatch.setattr(profiling, "recorded", Recorded)
    return found


def steps(profiler: Profiler, epochs: list[tuple[bool, int, int]], found: list[Any]) -> list[tuple[int, int]]:
    """(epoch, batch) of the steps that are recorded; an epoch is (due, first batch, batches)."""
    at = []
    for epoch, (due, first, batches) in enumerate(epochs):
        for batch in range(first, batches):
            with profiler.step(batch, batches, due=due):
                if found and not at:
                    at.append((epoch, batch))
    return at


@pytest.mark.parametrize(
    ("epochs", "at"),
    [
        ([(False, 0, 30), (True, 0, 30), (True, 0, 30)], (1, 10)),  # not of burn-in, and after warm-up
        ([(True, 0, 5), (True, 0, 5)], (0, 4)),  # the last, where there are fewer
        ([(True, 12, 30)], (0, 22)),  # the process is new: it goes on in the middle of an epoch
        ([(True, 28, 30)], (0, 29)),
    ],
)
def test_one_warm_step_is_recorded(epochs: Any, at: tuple[int, int], recorded: list[Any]) -> None:
    assert steps(Profiler(True, pytest.fail), epochs, recorded) == [at]
    assert recorded == [profiling.STEP]


def test_nothing_is_recorded_where_nobody_asked(recorded: list[Any]) -> None:
    profiler = Profiler(False, pytest.fail)
    assert steps(profiler, [(True, 0, 30)], recorded) == []
    with profiler.scoring():
        pass
    assert not profiler.takes_scoring()
    assert recorded == []


def test_one_scoring_pass_is_recorded(recorded: list[Any]) -> None:
    profiler = Profiler(True, pytest.fail)
    for _ in range(3):
        with profiler.scoring():
            pass
    assert recorded == [profiling.SCORING]
