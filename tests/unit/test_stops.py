"""When a run stops: on all ranks before the same batch."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from bss_ray.runtime.ranks import OneRank, RankGroup
from bss_ray.testing.thread_ranks import Meeting, ThreadRanks
from bss_ray.train.supervise import StopPoll


def run_ranks(count: int, loop: Callable[[RankGroup], int]) -> list[int]:
    meeting = Meeting(count)
    ended = [0] * count

    def run(rank: int) -> None:
        with meeting.turn(rank):
            ended[rank] = loop(ThreadRanks(rank, meeting))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return ended


@pytest.mark.parametrize("every_s", [0.0, 0.01])
def test_all_ranks_stop_before_the_same_batch_soon_after_the_request(every_s: float) -> None:
    asked_at = 500

    def loop(ranks: RankGroup) -> int:
        at = 0
        stops = StopPoll(ranks, lambda: at >= asked_at, lambda: False, every_s=every_s)
        pause = threading.Event()
        while stops.next_action() == "continue" and at < 100_000:
            at += 1
            if ranks.rank == 1 and at % 7 == 0:
                pause.wait(0.0005)  # one that is slower
        return at

    ended = run_ranks(3, loop)
    assert len(set(ended)) == 1
    assert asked_at <= ended[0] < 100_000
    if every_s == 0:
        assert ended[0] == asked_at, "asked before every batch"


def test_the_question_is_rare() -> None:
    questions = 0

    def stopping() -> bool:
        nonlocal questions
        questions += 1
        return False

    stops = StopPoll(OneRank(), stopping, lambda: False, every_s=1e9)
    assert {stops.next_action() for _ in range(10_000)} == {"continue"}
    assert questions == 1  # the second step, which says how long one takes


def test_a_node_that_goes_is_saved_for_and_a_stop_comes_first() -> None:
    stops = StopPoll(OneRank(), lambda: False, lambda: True, every_s=0.0)
    assert [stops.next_action() for _ in range(3)] == ["continue", "save", "save"]
    stops = StopPoll(OneRank(), lambda: True, lambda: True, every_s=0.0)
    assert [stops.next_action() for _ in range(2)] == ["continue", "stop"]
