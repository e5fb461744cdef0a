"""The message board of a run: what ranks say to the driver, and the driver's wish that they stop."""

from __future__ import annotations

import threading
import time
import uuid
from typing import Protocol

from bss_ray.runtime.messages import Message, OnMessage


class UnavailableError(RuntimeError):
    """The event log does not answer now: its process is lost, or cut off, and perhaps being restarted."""


class EventLogClient(Protocol):
    """A run's event log, as ranks and the driver call it; see `EventLog` for what the methods do.

    Raises:
        UnavailableError: it does not answer now.
    """

    def post(self, message: Message, *, wait: bool = False) -> None: ...

    def read(self, log: str, start: int) -> tuple[str, list[Message]]: ...

    def beat(self) -> None: ...

    def silence(self) -> float: ...

    def request_stop(self) -> None: ...

    def stop_requested(self) -> bool: ...


class EventLog:
    """Messages in the order of their arrival, the ranks' signs of life, and whether they are to stop.

    Called from several threads.

    Args:
        listener: is told each message, too.
    """

    def __init__(self, listener: OnMessage | None = None) -> None:
        self._listener = listener
        self._id = uuid.uuid4().hex
        self._messages: list[Message] = []
        self._heard = time.monotonic()
        self._stopping = False
        self._lock = threading.Lock()

    def post(self, message: Message, *, wait: bool = False) -> None:
        """Put a message into the log."""
        with self._lock:
            self._messages.append(message)
            if self._listener is not None:
                self._listener(message)
            self._heard = time.monotonic()

    def read(self, log: str, start: int) -> tuple[str, list[Message]]:
        """What is new to a reader.

        Args:
            log: Id of the log that was read before: a coordinator that was restarted has another, an empty one.
            start: messages that were read of it.

        Returns:
            Id of this log, and its messages that were not read.
        """
        with self._lock:
            return self._id, self._messages[start if log == self._id else 0 :]

    def beat(self) -> None:
        """The ranks are alive."""
        self._heard = time.monotonic()

    def silence(self) -> float:
        """Seconds since the ranks gave a sign of life."""
        return time.monotonic() - self._heard

    def request_stop(self) -> None:
        """Have the ranks save a checkpoint and end."""
        self._stopping = True

    def stop_requested(self) -> bool:
        """Whether the ranks are to stop."""
        return self._stopping
