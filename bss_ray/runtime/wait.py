"""Waits for other processes: each has a limit, and the error at its end says what was waited for.

A node can be cut off without notice, and how long Ray waits then depends on its own health checks. The limit is the
last resort: it turns a run that would hang forever into an error, and the ranks start again from their last checkpoint.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any, Generic, TypeVar

from bss_ray.errors import BssRayError

T = TypeVar("T")

# Longer than any single step between processes should take; as long as torch.distributed waits for a collective.
DEFAULT_LIMIT_S = 1800.0

# Ray Data appends this to the message of an error, with advice that is not for users of this project.
_ADDED_BY_RAY = "\nFailed to apply UDF"

_limit_s = DEFAULT_LIMIT_S


class WaitError(TimeoutError):
    """Another process did not answer within the limit.

    It is not an error of the user: the ranks start again from the last checkpoint, as often as `max_failures` allows.
    """


def set_wait_limit(seconds: float) -> None:
    """Set how long this process waits for others. Each process of a run sets it once, when it starts to work."""
    global _limit_s
    _limit_s = seconds


def wait_limit() -> float:
    """Seconds that this process waits for others."""
    return _limit_s


def wait_for(reference: object, what: str) -> Any:
    """The value of a reference, or of a list of them.

    Args:
        reference: Reference, or list of references, as for `ray.get`.
        what: Name of the value, to complete the text "waited 1800 s for".

    Raises:
        WaitError: The value did not come within the limit.
        BssRayError: A task has raised it.
    """
    import ray  # runs in a single process do without Ray

    with users_errors():
        try:
            return ray.get(reference, timeout=_limit_s)
        except ray.exceptions.GetTimeoutError:
            raise wait_timeout_error(what) from None


@contextlib.contextmanager
def users_errors() -> Iterator[None]:
    """Raise an error of the user in a task as it was raised there, without Ray's wrapper and traceback.

    Raises:
        BssRayError: A task has raised it.
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
    """The error itself, without the wrappers that Ray puts around it between processes."""
    ray = sys.modules.get("ray")  # without Ray there are no wrappers
    while ray is not None and isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        error = error.cause
    if isinstance(error, BssRayError) and _ADDED_BY_RAY in str(error):
        return type(error)(str(error).partition(_ADDED_BY_RAY)[0])
    return error


def call_with_timeout(function: Callable[[], T], what: str) -> T:
    """Result of a function that waits for others and has no time limit of its own; it runs in another thread.

    Args:
        function: Function that is abandoned at the end of the limit.
        what: Name of the result, see `wait_for`.

    Raises:
        WaitError: The function did not return within the limit.
        BaseException: The function has raised it.
    """
    return InThread(function).result_in_time(what)


def iterate_with_timeout(items: Iterator[T], what: str) -> Generator[T, None, None]:
    """The items of an iterator that waits for others, such as Ray Data's.

    Each item is taken in a thread of its own, one after the other and none ahead. If the wait ends first, by its limit
    or by ctrl-C, the iterator is closed as soon as possible. Until then `ray.shutdown()` would end the process,
    because Ray takes a call that outlives its session for a bug of its own.

    Args:
        items: Generator, or another iterator that needs no closing.
        what: Name of an item, see `wait_for`.

    Raises:
        WaitError: An item did not come within the limit.
    """
    close = getattr(items, "close", lambda: None)
    pull: InThread[list[T]] | None = None
    try:
        while True:
            pull = InThread(lambda: list(itertools.islice(items, 1)))  # empty at the end
            taken = pull.result_in_time(what)
            if not taken:
                return
            yield taken.pop()
    finally:
        if pull is None or pull.done.is_set():
            close()
        else:
            pull.then(close)


def wait_timeout_error(what: str) -> WaitError:
    """The error at the end of a wait."""
    return WaitError(
        f"waited {_limit_s:g} s for {what}. Its process or its node may be cut off or stuck: see `ray list actors` and "
        "`ray list nodes`; if it is only slow, raise wait_limit_s"
    )


class InThread(Generic[T]):
    """A call in a daemon thread, which does not keep the process alive.

    Args:
        function: Function that is called at once.

    Attributes:
        done: Event that is set when the function has returned or raised.
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
        except BaseException as error:  # SystemExit is the caller's, too
            self._error = error
        finally:
            self.done.set()

    def result(self) -> T:
        """Result of the function, which must be done.

        Raises:
            BaseException: The function has raised it.
        """
        if self._error is not None:
            raise self._error
        return self._result

    def result_in_time(self, what: str) -> T:
        """Result of the function, within the limit.

        Raises:
            WaitError: The function is not done, and continues.
            BaseException: The function has raised it.
        """
        if not self.done.wait(_limit_s):
            raise wait_timeout_error(what)
        return self.result()

    def then(self, function: Callable[[], object]) -> None:
        """Call another function when this one is done, in another thread."""

        def wait() -> None:
            self.done.wait()
            function()

        threading.Thread(target=wait, name="bss-ray-then", daemon=True).start()
