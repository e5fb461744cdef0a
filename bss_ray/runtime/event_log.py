"""The event log of a run: messages of the ranks to the driver, and the driver's request that the ranks stop."""

from __future__ import annotations

import threading
import time
import uuid
from typing import Protocol

from bss_ray.runtime.messages import Message, OnMessage


class UnavailableError(RuntimeError):
    """The event log does not answer now: its process is lost or cut off, and may be restarted."""


class EventLogClient(Protocol):
    """A run's event log, as ranks and the driver call it; `EventLog` describes the methods.

    Raises:
        UnavailableError: The event log does not answer now.
    """

    def post(self, message: Message, *, wait: bool = False) -> None: ...

    def read(self, log: str, start: int) -> tuple[str, list[Message]]: ...

    def beat(self) -> None: ...

    def silence(self) -> float: ...

    def request_stop(self) -> None: ...

    def stop_requested(self) -> bool: ...


class EventLog:
    """Messages in the order of their arrival, the time of the last heartbeat, and whether the ranks are to stop.

    Several threads may call it at a time.

    Args:
        listener: Function that is also called with each message.
    """

    def __init__(self, listener: OnMessage | None = None) -> None:
        self._listener = listener
        self._id = uuid.uuid4().hex
        self._messages: list[Message] = []
        self._heard = time.monotonic()
        self._stopping = False
        self._lock = threading.Lock()

    def post(self, message: Message, *, wait: bool = False) -> None:
        """Append a message. `wait` is for clients in other processes: return only when the message is in the log."""
        with self._lock:
            self._messages.append(message)
            if self._listener is not None:
                self._listener(message)
            self._heard = time.monotonic()

    def read(self, log: str, start: int) -> tuple[str, list[Message]]:
        """Messages that a reader has not read yet.

        Args:
            log: Id of the log that was read before. A coordinator that was restarted has a new, empty log.
            start: Number of messages that were read from that log.

        Returns:
            Id of this log, and its messages that were not read yet.
        """
        with self._lock:
            return self._id, self._messages[start if log == self._id else 0 :]

    def beat(self) -> None:
        """A rank is alive."""
        self._heard = time.monotonic()

    def silence(self) -> float:
        """Seconds since the last message or heartbeat."""
        return time.monotonic() - self._heard

    def request_stop(self) -> None:
        """Ask the ranks to save a checkpoint and end."""
        self._stopping = True

    def stop_requested(self) -> bool:
        """Whether the ranks must stop."""
        return self._stopping
