"""Rows of another node's shards: picked out there, one by one; whole shards stay where they are."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import numpy as np
import pytest
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bss_ray.data.columns import Columns
from bss_ray.data.shards import Feature, Shard, Shards
from bss_ray.data.store import Arrays, ObjectStore
from bss_ray.load import rows as rows_module
from bss_ray.load.loader import Loader
from bss_ray.sample.plan import Order, Plan, share_out
from tests.hosts import Cluster, Host

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("two_nodes")]

SHARD_ROWS, SHARDS, BATCH, WIDTH = 500, 6, 64, 256
ROWS = SHARD_ROWS * SHARDS


@ray.remote(num_cpus=0)
def _make_shard(index: int) -> Arrays:
    ids = np.arange(index * SHARD_ROWS, (index + 1) * SHARD_ROWS)
    a = np.repeat(ids[:, None], WIDTH, axis=1).astype(np.float32)
    return {"a": a, "b": ids.astype(np.float32) * 2, "label": ids % 5}


def _on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


def make_shards(nodes: list[str]) -> tuple[Shards, list[ray.ObjectRef]]:
    """A shard on each of `nodes`."""
    refs = [_make_shard.options(scheduling_strategy=_on(node)).remote(index) for index, node in enumerate(nodes)]
    ray.wait(refs, num_returns=len(refs), fetch_local=False)
    shards = Shards(
        columns=Columns(modalities=("a", "b")),
        parts=tuple(Shard(index * SHARD_ROWS, SHARD_ROWS, node) for index, node in enumerate(nodes)),
        features={"a": Feature((WIDTH,), "float32"), "b": Feature((), "float32"), "label": Feature((), "int64")},
        num_classes=5,
        fingerprint="",
        store=ObjectStore(refs),
    )
    return shards, refs


def living_nodes() -> list[str]:
    """Ids of the nodes that are there; the head comes first."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    nodes.sort(key=lambda node: "node:__internal_head__" not in node["Resources"])
    return [node["NodeID"] for node in nodes]


def make_order() -> np.ndarray:
    return np.random.default_rng(2).permutation(ROWS)


@ray.remote(num_cpus=0)
def read_rank(shards: Shards, rank: int, rank_nodes: list[str], evaluate: bool) -> tuple[list[np.ndarray], float]:
    """Row ids of each batch of a rank, and the share that moved; checks the columns."""
    loader = Loader(shards, rank=rank, rank_nodes=rank_nodes, device=torch.device("cpu"))
    if evaluate:
        batches = list(loader.rows(BATCH))
    else:
        plan = Plan(0, 0, ROWS, BATCH, "keep", (ROWS,))
        batches = [batch.tensors for batch in loader.batches(plan, Order(plan, lambda _: make_order()))]
    for batch in batches:
        ids = batch["row_id"]
        assert torch.equal(batch["a"], ids.float()[:, None].expand(-1, WIDTH))
        assert torch.equal(batch["b"], ids.float() * 2)
        assert torch.equal(batch["label"], ids % 5)
    return [batch["row_id"].numpy() for batch in batches], loader.moved_share


def test_rows_move_and_shards_do_not() -> None:
    one, two = living_nodes()
    shard_nodes = [one, one, one, one, two, two]  # a third of the rows, and half of the ranks
    shards, refs = make_shards(shard_nodes)
    rank_nodes = [one, two]
    read = ray.get(
        [
            read_rank.options(scheduling_strategy=_on(node)).remote(shards, rank, rank_nodes, False)
            for rank, node in enumerate(rank_nodes)
        ]
    )
    moved = [0, 0]
    order = make_order()
    for number, batches in enumerate(zip(*(ids for ids, _ in read), strict=True)):
        global_ids = order[number * BATCH : (number + 1) * BATCH]
        homes = np.array([node == two for node in shard_nodes]).astype(int)[global_ids // SHARD_ROWS]
        owners = share_out(homes, np.array([0, 1]))
        for rank, ids in enumerate(batches):
            assert ids.tolist() == global_ids[owners == rank].tolist()
            moved[rank] += int((homes[owners == rank] != rank).sum())
    assert [share for _, share in read] == pytest.approx([moved[rank] * 2 / ROWS for rank in (0, 1)])
    assert moved[0] < moved[1] < ROWS / 4
    # Every shard is on the node that made it and nowhere else.
    locations = ray.experimental.get_object_locations(refs)
    assert [locations[ref]["node_ids"] for ref in refs] == [[node] for node in shard_nodes]


def test_evaluation_moves_the_surplus() -> None:
    one, two = living_nodes()
    shards, refs = make_shards([one, two, one, one, two, one])
    read = ray.get(
        [
            read_rank.options(scheduling_strategy=_on(node)).remote(shards, rank, [one, two], True)
            for rank, node in enumerate((one, two))
        ]
    )
    rows = [np.concatenate(ids) for ids, _ in read]
    assert sorted(np.concatenate(rows).tolist()) == list(range(ROWS))
    assert len(rows[0]) == len(rows[1])
    assert set((rows[0] // SHARD_ROWS).tolist()) <= {0, 2, 3, 5}  # nothing of the other node
    locations = ray.experimental.get_object_locations(refs)
    assert all(len(locations[ref]["node_ids"]) == 1 for ref in refs)


def _kill_process(server: ray.actor.ActorHandle) -> None:
    os.kill(ray.get(server.__ray_call__.remote(lambda _server: os.getpid())), signal.SIGKILL)


@pytest.mark.parametrize("kill", [ray.kill, _kill_process])
def test_tasks_take_over_from_a_lost_server(kill: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_GROUP_BATCHES", 1)
    one, two = living_nodes()
    shards, _refs = make_shards([one, two, two])
    order = np.random.default_rng(3).permutation(3 * SHARD_ROWS)
    plan = Plan(0, 0, len(order), BATCH, "keep", (len(order),))
    loader = Loader(shards, rank=0, rank_nodes=[one], device=torch.device("cpu"), prefix="test-")
    read: list[int] = []
    for batch in loader.batches(plan, Order(plan, lambda _: order)):
        assert torch.equal(batch.tensors["a"], batch.tensors["row_id"].float()[:, None].expand(-1, WIDTH))
        read += batch.tensors["row_id"].tolist()
        if batch.number == 2:
            kill(ray.get_actor(f"test-rows-{two[:6]}"))
    assert read == order.tolist()
    assert loader.moved_share > 0.5


def test_a_lost_node_does_not_hang(two_nodes: Cluster) -> None:
    before = living_nodes()
    extra = two_nodes.add_node(Host(cpus=1))
    (added,) = set(living_nodes()) - set(before)
    one = ray.get_runtime_context().get_node_id()
    shards, _ = make_shards([one, added])
    two_nodes.lose(extra)
    order = np.random.default_rng(0).permutation(2 * SHARD_ROWS)
    plan = Plan(0, 0, len(order), BATCH, "keep", (len(order),))
    loader = Loader(shards, rank=0, rank_nodes=[one], device=torch.device("cpu"))
    # Pinned to the lost node, these shards cannot be made again: the loop is told.
    with pytest.raises(ray.exceptions.RayError) as caught:
        list(loader.batches(plan, Order(plan, lambda _: order)))
    assert "While loading batch" in "".join(caught.value.__notes__)
