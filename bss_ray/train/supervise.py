"""Supervision of a run: the driver relays messages, requests a stop, and notices that no rank is alive."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Literal, ParamSpec, TypeVar

from bss_ray.runtime.event_log import EventLogClient, UnavailableError
from bss_ray.runtime.messages import FatalError, Notice, OnMessage
from bss_ray.runtime.ranks import RankGroup
from bss_ray.runtime.wait import InThread, wait_limit, wait_timeout_error

StopAction = Literal["continue", "save", "stop"]

# Seconds between two questions. A question is a broadcast of a few bytes; a stop gives the ranks some seconds.
EVERY_S = 1.0


class Stopped(BaseException):
    """Leaves the train loop of a rank whose run must stop. No `except Exception` of a loop can catch it."""


class StopPoll:
    """Checks about once a second whether the run must stop, on all ranks before the same batch.

    The clocks of the ranks cannot agree on a batch. So rank 0 measures how long a step takes, and tells the others
    with each answer after how many steps the next question is due.

    Args:
        ranks: All ranks; each calls `next_action` equally often.
        stop_requested: Function that rank 0 calls: is the run to stop?
        preempted: Function that all ranks call: is a node about to be taken away?
        every_s: Seconds between two questions.
    """

    def __init__(
        self,
        ranks: RankGroup,
        stop_requested: Callable[[], bool],
        preempted: Callable[[], bool],
        *,
        every_s: float = EVERY_S,
    ) -> None:
        self._ranks, self._stop_requested, self._preempted, self._every_s = ranks, stop_requested, preempted, every_s
        self._steps = 0  # steps since the last check
        self._due_after = 1
        self._asked = time.monotonic()

    def next_action(self) -> StopAction:
        """The action before the next step."""
        if self._steps < self._due_after:
            self._steps += 1
            return "continue"
        stopping, self._due_after = self._ranks.from_first(self._answer())
        self._steps, self._asked = 1, time.monotonic()
        if stopping:
            return "stop"
        return "save" if self._preempted() else "continue"

    def _answer(self) -> tuple[bool, int]:
        """Whether to stop, and the number of steps until the next question."""
        if self._ranks.rank != 0:
            return False, 1  # only the answer of rank 0 counts
        seconds = (time.monotonic() - self._asked) / self._steps
        return self._stop_requested(), max(1, round(self._every_s / max(seconds, 1e-6)))


P = ParamSpec("P")
T = TypeVar("T")

_POLL_S = 0.25
# Seconds between two heartbeats of a rank.
BEAT_S = 5.0


class EventReader:
    """The driver's end of the run's event log.

    Args:
        events: The event log.
        on_message: Function that is called with each message.
    """

    def __init__(self, events: EventLogClient, on_message: OnMessage) -> None:
        self._events, self._on_message = events, on_message
        self._log, self._seen = "", 0
        self._heard = time.monotonic()

    def relay(self) -> None:
        """Pass messages that are new to `on_message`."""
        answer = _answer_of(self._events.read, self._log, self._seen)
        if answer is None:
            return
        log, messages = answer
        if log != self._log:
            self._log, self._seen = log, 0
        for message in messages:
            self._seen += 1
            self._on_message(message)

    def fatal_error(self) -> BaseException | None:
        """The first error of the user that was raised in a rank."""
        answer = _answer_of(self._events.read, "", 0)
        messages = [] if answer is None else answer[1]
        return next((message.error for message in messages if isinstance(message, FatalError)), None)

    def stop_requested(self) -> bool:
        """Whether the ranks are to stop."""
        return bool(_answer_of(self._events.stop_requested))

    def notice(self, text: str) -> None:
        """Tell the user something."""
        self._on_message(Notice(text))

    def request_stop(self) -> None:
        """Ask the ranks to save a checkpoint and end. To be repeated: a restarted coordinator has a new event log."""
        _answer_of(self._events.request_stop)

    def check_alive(self) -> None:
        """Check that some rank is alive.

        Raises:
            WaitError: No rank has been heard of for too long; the cluster may have no room for them any more.
        """
        if time.monotonic() - self._heard < 2 * BEAT_S:  # no call is needed
            return
        silence = _answer_of(self._events.silence)
        if silence is not None:
            self._heard = max(self._heard, time.monotonic() - silence)
        if time.monotonic() - self._heard > wait_limit():
            import ray

            there = ", ".join(f"{ray.cluster_resources().get(name, 0):g} {name}" for name in ("CPU", "GPU"))
            raise wait_timeout_error(f"a heartbeat of the ranks (the cluster has {there} now)")


def _answer_of(ask: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """An answer of the event log; None while its process is lost, cut off or being restarted."""
    try:
        return ask(*args, **kwargs)
    except UnavailableError:
        return None


def supervise(fit: Callable[[], T], events: EventReader) -> tuple[T, bool]:
    """Run `fit` in a thread of its own, and supervise it in this thread.

    Ray Train's own handler of ctrl-C aborts without a checkpoint. It is installed only if `fit` is called in the main
    thread, so `fit` runs in another. The first ctrl-C then asks the ranks to save and stop, the second ends at once.

    Args:
        fit: Function that runs the ranks.
        events: Reader of the ranks' event log.

    Returns:
        Result of `fit`, and whether the ranks were asked to stop.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed twice.
        WaitError: No rank was heard of for too long.
        Exception: `fit` has raised it.
    """
    with _ctrl_c_is_an_interrupt():
        running = InThread(fit)
        stopping = False
        while True:
            try:
                while not running.done.wait(_POLL_S):
                    if stopping:
                        events.request_stop()
                    events.relay()
                    events.check_alive()
                events.relay()  # the last messages
                return running.result(), stopping
            except KeyboardInterrupt:
                if stopping:
                    raise
                stopping = True
                events.notice("stopping at the next batch, with a checkpoint (again: stop at once)")


@contextlib.contextmanager
def _ctrl_c_is_an_interrupt() -> Iterator[None]:
    """In the block Ctrl-C raises KeyboardInterrupt, also if an earlier `fit` of Ray Train has left its handler.

    A process that was started with Ctrl-C switched off keeps it off.
    """
    before = signal.getsignal(signal.SIGINT)
    # None: a handler that was not set from Python, and cannot be restored.
    ours = threading.current_thread() is threading.main_thread() and before not in (signal.SIG_IGN, None)
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def watch(events: EventReader) -> Iterator[None]:
    """Relay messages in another thread, while this thread trains."""
    done = threading.Event()

    def relay() -> None:
        last = False
        while not last:
            last = done.wait(_POLL_S)  # once more after the end for the last messages
            events.relay()

    thread = threading.Thread(target=relay, name="bss-ray-events", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def heartbeat(events: EventLogClient) -> Iterator[None]:
    """Tell the event log regularly that this rank is alive; in another thread, so also while the rank computes."""
    done = threading.Event()

    def beat() -> None:
        while True:  # at once: the driver has heard nothing since the last attempt
            with contextlib.suppress(UnavailableError):
                events.beat()
            if done.wait(BEAT_S):
                return

    thread = threading.Thread(target=beat, name="bss-ray-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
