"""Waits that are over say what they waited for, and leave nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from bss_ray.runtime import wait
from bss_ray.runtime.wait import WaitError, call_with_timeout, iterate_with_timeout


@pytest.fixture(autouse=True)
def short_limit() -> Iterator[None]:
    wait.set_wait_limit(0.3)
    yield
    wait.set_wait_limit(wait.DEFAULT_LIMIT_S)


class Rows:
    """A generator of three rows that may have to wait for the last, and knows what became of it."""

    def __init__(self, *, stuck: bool = False, error: Exception | None = None) -> None:
        self.go_on, self.closed, self.error = threading.Event(), threading.Event(), error
        self.made = 0
        if not stuck:
            self.go_on.set()

    def __iter__(self) -> Iterator[int]:
        try:
            for number in range(3):
                if number == 2:
                    self.go_on.wait()
                    if self.error is not None:
                        raise self.error
                self.made += 1
                yield number
        finally:
            self.closed.set()


def test_items_come_one_by_one() -> None:
    rows = Rows()
    items = iterate_with_timeout(iter(rows), "rows")
    assert next(items) == 0
    assert rows.made == 1, "none is made ahead"
    assert list(items) == [1, 2]
    assert rows.closed.is_set()
    assert list(iterate_with_timeout(iter([1, 2]), "rows")) == [1, 2], "an iterator that cannot be closed"


def test_who_stops_early_closes_the_iterator() -> None:
    rows = Rows()
    items = iterate_with_timeout(iter(rows), "rows")
    next(items)
    items.close()
    assert rows.closed.is_set()


def test_one_that_does_not_come() -> None:
    rows = Rows(stuck=True)
    with pytest.raises(WaitError, match=r"waited 0.3 s for the next rows\. .* raise wait_limit_s"):
        list(iterate_with_timeout(iter(rows), "the next rows"))
    assert not rows.closed.is_set()
    rows.go_on.set()
    assert rows.closed.wait(10), "closed as soon as it can be"


@pytest.mark.parametrize("error", [ValueError("of the rows"), TimeoutError("of the rows' own")])
def test_errors_are_the_iterators(error: Exception) -> None:
    with pytest.raises(type(error), match="of the rows") as caught:
        list(iterate_with_timeout(iter(Rows(error=error)), "rows"))
    assert caught.value is error
    with pytest.raises(type(error), match="of the rows"):
        call_with_timeout(lambda: list(Rows(error=error)), "rows")


def test_a_call() -> None:
    assert call_with_timeout(lambda: 3, "a number") == 3
    go_on = threading.Event()
    with pytest.raises(WaitError, match=r"waited 0.3 s for a number"):
        call_with_timeout(go_on.wait, "a number")
    go_on.set()
