"""A run that is watched: the driver relays messages, asks for a stop, and notices ranks that are silent."""

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

StopAction = Literal["go on", "save", "stop"]

# About so often the ranks ask each other: a broadcast of a few bytes, against the seconds of grace that a stop gives.
EVERY_S = 1.0


class Stopped(BaseException):
    """Leaves the train loop of a rank whose run is to stop. No `except Exception` of a loop may catch it."""


class StopPoll:
    """Asks about once a second whether the run is to stop, on all ranks before the same batch.

    When that is, no rank's own clock can say. Rank 0 measures how long a step takes, and says with each answer after
    how many of them the next question is due.

    Args:
        ranks: all of them; each calls `wish` equally often.
        stopping: called on rank 0: is the run to stop?
        preempted: called on all ranks: is a node about to be taken away?
        every_s: seconds between questions.
    """

    def __init__(
        self, ranks: RankGroup, stopping: Callable[[], bool], preempted: Callable[[], bool], *, every_s: float = EVERY_S
    ) -> None:
        self._ranks, self._stopping, self._preempted, self._every_s = ranks, stopping, preempted, every_s
        self._steps = 0  # since the last question
        self._due_after = 1
        self._asked = time.monotonic()

    def wish(self) -> StopAction:
        """What is to be done before the next step."""
        if self._steps < self._due_after:
            self._steps += 1
            return "go on"
        stopping, self._due_after = self._ranks.from_first(self._answer())
        self._steps, self._asked = 1, time.monotonic()
        if stopping:
            return "stop"
        return "save" if self._preempted() else "go on"

    def _answer(self) -> tuple[bool, int]:
        """Whether to stop, and steps until the next question."""
        if self._ranks.rank != 0:
            return False, 1  # only rank 0's counts
        seconds = (time.monotonic() - self._asked) / self._steps
        return self._stopping(), max(1, round(self._every_s / max(seconds, 1e-6)))


P = ParamSpec("P")
T = TypeVar("T")

_POLL_S = 0.25
# Seconds between two signs of life of a rank.
BEAT_S = 5.0


class EventReader:
    """The driver's end of the run's event log.

    Args:
        events: The event log.
        on_message: Called with each message.
    """

    def __init__(self, events: EventLogClient, on_message: OnMessage) -> None:
        self._events, self._on_message = events, on_message
        self._log, self._seen = "", 0
        self._heard = time.monotonic()

    def look(self) -> None:
        """Hand on what is new."""
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
        """The first user error that a rank has met."""
        answer = _answer_of(self._events.read, "", 0)
        messages = [] if answer is None else answer[1]
        return next((message.error for message in messages if isinstance(message, FatalError)), None)

    def stopping(self) -> bool:
        """Whether the ranks have been asked to stop."""
        return bool(_answer_of(self._events.stop_requested))

    def notice(self, text: str) -> None:
        """Something that the user should read."""
        self._on_message(Notice(text))

    def ask_to_stop(self) -> None:
        """Have the ranks save a checkpoint and end; to be repeated, for the event log may be a new one."""
        _answer_of(self._events.request_stop)

    def check_life(self) -> None:
        """The ranks have given a sign of life not too long ago.

        Raises:
            WaitError: they have not; the cluster has no room for them any more, say.
        """
        if time.monotonic() - self._heard < 2 * BEAT_S:  # no need to ask
            return
        silence = _answer_of(self._events.silence)
        if silence is not None:
            self._heard = max(self._heard, time.monotonic() - silence)
        if time.monotonic() - self._heard > wait_limit():
            import ray

            there = ", ".join(f"{ray.cluster_resources().get(name, 0):g} {name}" for name in ("CPU", "GPU"))
            raise wait_timeout_error(f"a sign of life of the ranks (the cluster has {there} now)")


def _answer_of(ask: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """An answer of the event log; None while there is none, since its process is in trouble or being restarted."""
    try:
        return ask(*args, **kwargs)
    except UnavailableError:
        return None


def supervise(fit: Callable[[], T], board: EventReader) -> tuple[T, bool]:
    """Run `fit` in a thread of its own, and look after it in this one.

    Ray Train's own handler of ctrl-C aborts without a checkpoint. It is installed by whoever calls `fit` in the main
    thread; so that stays free, and the first ctrl-C there asks the ranks to save and stop, the second ends at once.

    Args:
        fit: runs the ranks.
        board: theirs.

    Returns:
        What `fit` returned, and whether it was asked to stop.

    Raises:
        KeyboardInterrupt: the second.
        WaitError: nothing was heard of the ranks for too long.
        Exception: of `fit`.
    """
    with _ctrl_c_is_an_interrupt():
        running = InThread(fit)
        stopping = False
        while True:
            try:
                while not running.done.wait(_POLL_S):
                    if stopping:
                        board.ask_to_stop()
                    board.look()
                    board.check_life()
                board.look()  # the last messages
                return running.result(), stopping
            except KeyboardInterrupt:
                if stopping:
                    raise
                stopping = True
                board.notice("stopping at the next batch, with a checkpoint (again: stop at once)")


@contextlib.contextmanager
def _ctrl_c_is_an_interrupt() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where an earlier `fit` of Ray Train has left its own handler behind.

    A process that was started with ctrl-C switched off keeps it so.
    """
    before = signal.getsignal(signal.SIGINT)
    # None: a handler that was not set from Python, and cannot be put back.
    ours = threading.current_thread() is threading.main_thread() and before not in (signal.SIG_IGN, None)
    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def watch(board: EventReader) -> Iterator[None]:
    """Hand messages on from a thread, while this one trains itself."""
    done = threading.Event()

    def look() -> None:
        last = False
        while not last:
            last = done.wait(_POLL_S)  # once more after the end, for the last messages
            board.look()

    thread = threading.Thread(target=look, name="bss-ray-board", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def heartbeat(events: EventLogClient) -> Iterator[None]:
    """Tell the event log that this rank lives, from a thread, also while it computes."""
    done = threading.Event()

    def beat() -> None:
        while True:  # at once: the driver has heard nothing since the attempt before
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
