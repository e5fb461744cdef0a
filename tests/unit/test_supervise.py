"""The driver while the ranks work, with an event log in this process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from bss_ray.errors import ConfigError
from bss_ray.runtime import wait
from bss_ray.runtime.event_log import EventLog, UnavailableError
from bss_ray.runtime.messages import FatalError, Message, Notice
from bss_ray.train import supervise as module
from bss_ray.train.supervise import EventReader, supervise


class Coordinator:
    """The event log of an actor that may be lost and restarted."""

    def __init__(self) -> None:
        self.its_log = EventLog()
        self.lost = False
        self.asked = threading.Event()

    def _log(self) -> EventLog:
        self.asked.set()
        if self.lost:
            raise UnavailableError("lost")
        return self.its_log

    def post(self, message: Message, *, wait: bool = False) -> None:
        self._log().post(message)

    def read(self, log: str, start: int) -> tuple[str, list[Message]]:
        return self._log().read(log, start)

    def beat(self) -> None:
        self._log().beat()

    def silence(self) -> float:
        return self._log().silence()

    def request_stop(self) -> None:
        self._log().request_stop()

    def stop_requested(self) -> bool:
        return self._log().stop_requested()


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Coordinator]:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(module, "_POLL_S", 0.01)
    yield Coordinator()
    wait.set_wait_limit(wait.DEFAULT_LIMIT_S)


def test_messages_are_handed_on_once_also_of_a_new_log(coordinator: Coordinator) -> None:
    seen: list[Any] = []
    reader = EventReader(coordinator, lambda message: seen.append(message))
    for n in range(3):
        coordinator.its_log.post(Notice(str(n)))
        reader.relay()
    coordinator.lost = True
    reader.relay()  # in trouble: nothing is read, and nothing forgotten
    coordinator.lost = False
    reader.relay()
    coordinator.its_log = EventLog()  # restarted
    coordinator.its_log.post(Notice("3"))
    reader.relay()
    assert seen == [Notice(text) for text in "0123"]


def test_the_result_the_last_messages_and_errors_come_through(coordinator: Coordinator) -> None:
    seen: list[Any] = []
    reader = EventReader(coordinator, seen.append)

    def fit() -> str:
        coordinator.its_log.post(FatalError(ConfigError("no")))
        return "result"

    assert supervise(fit, reader) == ("result", False)
    assert [type(message) for message in seen] == [FatalError]
    assert str(reader.fatal_error()) == "no"
    with pytest.raises(KeyError, match="inside"):
        supervise(lambda: {}["inside"], reader)


@pytest.fixture
def handler_of_ray_train() -> Iterator[None]:
    """What an earlier run of Ray Train, in this process and its main thread, leaves behind."""
    before = signal.signal(signal.SIGINT, lambda _signal, _frame: None)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("handler_of_ray_train")
def test_ctrl_c_asks_the_ranks_to_stop_and_the_second_ends_at_once(coordinator: Coordinator) -> None:
    theirs = signal.getsignal(signal.SIGINT)
    notices: list[Any] = []
    log = coordinator.its_log

    def fit() -> str:
        coordinator.asked.wait(30)  # the main thread is looking on by now, and not still starting this one
        signal.raise_signal(signal.SIGINT)  # delivered to the main thread
        deadline = time.monotonic() + 30
        while not log.stop_requested() and time.monotonic() < deadline:
            time.sleep(0.01)
        return "saved"

    assert supervise(fit, EventReader(coordinator, notices.append)) == ("saved", True)
    assert "stopping" in notices[0].text

    end = threading.Event()

    def stubborn() -> None:
        for _ in range(2):
            coordinator.asked.clear()
            coordinator.asked.wait(30)
            signal.raise_signal(signal.SIGINT)
            time.sleep(0.2)  # until it is handled: two at once are one
        end.wait(30)

    with pytest.raises(KeyboardInterrupt):
        supervise(stubborn, EventReader(coordinator, notices.append))
    end.set()
    assert signal.getsignal(signal.SIGINT) is theirs


def test_ranks_that_give_no_sign_of_life_end_the_run(coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.01)
    wait.set_wait_limit(0.3)
    end = threading.Event()
    with pytest.raises(wait.WaitError, match=r"waited 0.3 s for a heartbeat of the ranks \(the cluster has 2 CPU"):
        supervise(lambda: end.wait(30), EventReader(coordinator, lambda _: None))
    end.set()
    # With signs of life it goes on past the limit.
    started = time.monotonic()

    def living() -> str:
        while time.monotonic() - started < 0.9:
            coordinator.its_log.beat()
            time.sleep(0.02)
        return "done"

    assert supervise(living, EventReader(coordinator, lambda _: None)) == ("done", False)
