"""Shards of a lost node: where they are, and when the ranks may start again."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from bss_ray.data.columns import Columns
from bss_ray.data.shards import Shard, Shards
from bss_ray.data.store import Arrays, Store
from bss_ray.train import rank_trainer as lost_shards
from bss_ray.train.rank_trainer import AwaitLostShards


class Copies(Store):
    """Says where copies are: one answer after the other, and the last for ever."""

    def __init__(self, *answers: dict[int, set[str]]) -> None:
        self.answers = list(answers)

    def read(self, shard: int) -> Arrays:
        raise NotImplementedError

    def only(self, shards: Any) -> Store:
        raise NotImplementedError

    def copies(self) -> dict[int, set[str]]:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def shards_on(nodes: str, store: Store) -> Shards:
    parts = tuple(Shard(10 * index, 10, node.strip("-")) for index, node in enumerate(nodes))
    return Shards(Columns(modalities=("a", "b")), parts, {}, 2, "", store)


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Nodes that live; tests change it."""
    nodes = {"x", "y", "z"}
    monkeypatch.setattr(
        ray, "nodes", lambda: [{"NodeID": node, "Alive": node in nodes} for node in ("x", "y", "z", "gone")]
    )
    monkeypatch.setattr(lost_shards, "_settle", lambda _nodes, _limit_s: None)
    monkeypatch.setattr(lost_shards, "_POLL_S", 0.001)
    return nodes


def test_nodes_of_shards(alive: set[str]) -> None:
    store = Copies({0: {"x"}, 1: {"gone", "z", "x"}, 2: set(), 3: {"y"}})
    assert shards_on("xyx-", store).nodes() == ["x", "y", "x", ""]
    alive.remove("y")
    shards = shards_on("xyy-", store)
    # The second was made again on two nodes; the third is small and stays with the driver, or is being made.
    assert shards.nodes() == ["x", "x", "y", ""]
    assert [part.node for part in shards.on(shards.nodes()).parts] == ["x", "x", "y", ""]


def test_shards_on_disk_stay_with_their_lost_node(alive: set[str]) -> None:
    alive.remove("y")
    assert shards_on("xy", Copies({})).nodes() == ["x", "y"]


def test_ranks_start_when_all_shards_are_there_again(alive: set[str]) -> None:
    there, lost, half = {0: {"x"}, 1: {"y"}, 2: set[str]()}, {0: {"x"}, 1: {"y"}}, {0: {"x"}, 1: set[str]()}
    store = Copies(there, lost, lost, half, {0: {"x"}, 1: {"z"}})
    wait = AwaitLostShards([shards_on("xy-", store)], limit_s=60)
    wait()
    assert len(store.answers) == 4, "the first start only notes what there is"
    alive.remove("y")
    wait()
    assert store.answers == [{0: {"x"}, 1: {"z"}}]


def test_ranks_start_all_the_same_after_the_limit(alive: set[str], caplog: pytest.LogCaptureFixture) -> None:
    store = Copies({0: {"y"}})
    wait = AwaitLostShards([shards_on("y", store)], limit_s=0.02)
    wait()
    alive.remove("y")
    wait()
    assert "1 shards were lost with their node" in caplog.text
