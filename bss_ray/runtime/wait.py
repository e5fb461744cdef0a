"""Waits for other processes: each has a limit, and says what it waited for when it is over.

A node can be cut off without a word, and what Ray waits for then is in the hands of its own health checks. The limit
is the last resort: it turns a run that would hang for ever into an error, and the ranks start again from their last
checkpoint.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, Generic, TypeVar

from bss_ray.errors import BssRayError

T = TypeVar("T")

# Longer than any single step between processes should take; as long as torch.distributed waits for a collective.
DEFAULT_LIMIT_S = 1800.0

# Ray Data adds this, and advice for others than users, to the message of an error.
_ADDED_BY_RAY = "\nFailed to apply UDF"

_limit_s = DEFAULT_LIMIT_S


class WaitError(TimeoutError):
    """Another process did not answer within the limit.

    No error of the user's: the ranks start again from the last checkpoint, as often as `max_failures` allows.
    """


def set_wait_limit(seconds: float) -> None:
    """How long this process waits for others. Each process of a run sets it once, when it starts to work."""
    global _limit_s
    _limit_s = seconds


def wait_limit() -> float:
    """Seconds that this process waits for others."""
    return _limit_s


def wait_for(reference: Any, what: str) -> Any:
    """The value of a reference, or of a list of them.

    Args:
        reference: as of `ray.get`.
        what: is waited for, to go on the text "waited 1800 s for".

    Raises:
        WaitError: it did not come within the limit.
        BssRayError: a task has raised it.
    """
    import ray  # runs in a single process do without it

    with users_errors():
        try:
            return ray.get(reference, timeout=_limit_s)
        except ray.exceptions.GetTimeoutError:
            raise wait_timeout_error(what) from None


@contextlib.contextmanager
def users_errors() -> Iterator[None]:
    """Raises an error of the user in a task as it was raised there, without Ray's wrapper and traceback.

    Raises:
        BssRayError: a task has raised it.
    """
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        found = unwrap_ray_error(error)
        if isinstance(found, BssRayError):
            raise found from None
        raise


def unwrap_ray_error(error: BaseException) -> BaseException:
    """The error itself, out of the wrappers that Ray puts around it on its way between processes."""
    ray = sys.modules.get("ray")  # where Ray is not at work there are no wrappers
    while ray is not None and isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    if isinstance(error, BssRayError) and _ADDED_BY_RAY in str(error):
        return type(error)(str(error).partition(_ADDED_BY_RAY)[0])
    return error


def call_with_timeout(function: Callable[[], T], what: str) -> T:
    """What a function returns that waits for others, and cannot be told for how long; it runs in another thread.

    Args:
        function: is left to itself where the limit is over.
        what: is waited for, see `wait_for`.

    Raises:
        WaitError: it did not return within the limit.
        BaseException: what it has raised.
    """
    return InThread(function).result_in_time(what)


def iterate_with_timeout(items: Iterator[T], what: str) -> Generator[T, None, None]:
    """The items of an iterator that waits for others, such as Ray Data's.

    Each is taken in a thread of its own, one after the other and none ahead. Where the wait ends first, with its
    limit or with ctrl-C, the iterator is closed as soon as it can be. Until then `ray.shutdown()` would end the
    process: Ray takes a call that outlives its session for a bug of its own.

    Args:
        items: a generator, or without anything to close.
        what: is waited for, see `wait_for`.

    Raises:
        WaitError: one did not come within the limit.
    """
    end = object()
    close = getattr(items, "close", lambda: None)
    pull: InThread[Any] | None = None
    try:
        while True:
            pull = InThread(lambda: next(items, end))
            item = pull.result_in_time(what)
            if item is end:
                return
            yield item
    finally:
        if pull is None or pull.done.is_set():
            close()
        else:
            pull.then(close)


def wait_timeout_error(what: str) -> WaitError:
    """The error of a wait that is over."""
    return WaitError(
        f"waited {_limit_s:g} s for {what}. Its process or its node may be cut off or stuck: see `ray list actors` and "
        "`ray list nodes`; if it is only slow, raise wait_limit_s"
    )


class InThread(Generic[T]):
    """A call in a daemon thread, which does not keep the process alive.

    Args:
        function: what is called, at once.

    Attributes:
        done: that it has returned or raised.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self.done = threading.Event()
        self._function = function
        self._result: T
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="bss-ray-call", daemon=True).start()

    def _run(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:  # SystemExit, too, is the caller's
            self._error = error
        finally:
            self.done.set()

    def result(self) -> T:
        """What it has returned; to be asked for when it is done.

        Raises:
            BaseException: what it has raised.
        """
        if self._error is not None:
            raise self._error
        return self._result

    def result_in_time(self, what: str) -> T:
        """What it returns within the limit.

        Raises:
            WaitError: it has not, and goes on.
            BaseException: what it has raised.
        """
        if not self.done.wait(_limit_s):
            raise wait_timeout_error(what)
        return self.result()

    def then(self, function: Callable[[], Any]) -> None:
        """Call another function when it is done, in another thread."""

        def wait() -> None:
            self.done.wait()
            function()

        threading.Thread(target=wait, name="bss-ray-then", daemon=True).start()
