"""The loader: every row of every global batch on one rank, made ahead, and no thread left behind."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bss_ray.data.arrays import ArrayStore, shards_of_arrays
from bss_ray.data.columns import Columns
from bss_ray.data.shards import Shards
from bss_ray.data.store import Arrays
from bss_ray.errors import ConfigError
from bss_ray.load import loader as loader_module
from bss_ray.load import transfer as transfer_module
from bss_ray.load.loader import FILLER, Loader, RankBatch, Transform, share_runs
from bss_ray.load.randomness import RowRandom
from bss_ray.load.rows import Receive, RowReader
from bss_ray.load.transfer import BufferRing, Recycled, Tensors, torch_dtype
from bss_ray.sample.plan import Order, Plan

ROWS, BATCH = 203, 16  # 203 = 12 * 16 + 11
CPU = torch.device("cpu")


class CountingStore(ArrayStore):
    """Counts the rows that were taken."""

    def __init__(self, arrays: Sequence[Arrays]) -> None:
        super().__init__(arrays)
        self.taken = 0
        self._counting = threading.Lock()

    def take(self, shards: np.ndarray, rows: np.ndarray, out: Arrays) -> None:
        super().take(shards, rows, out)
        with self._counting:
            self.taken += len(rows)


def make_shards(nodes: Sequence[str], rows: int = ROWS, width: int = 3) -> Shards:
    """A shard for each of `nodes`; column a is the row id, b twice that."""
    ids = np.arange(rows)
    a = np.repeat(ids[:, None], width, axis=1).astype(np.float32)
    arrays = {"a": a, "b": ids.astype(np.float32) * 2, "label": ids % 5}
    return shards_of_arrays(arrays, Columns(modalities=("a", "b")), nodes=nodes)


def counting(shards: Shards, kind: type[CountingStore] = CountingStore) -> tuple[Shards, CountingStore]:
    """The shards over a store that counts."""
    assert isinstance(shards.store, ArrayStore)
    store = kind(shards.store.arrays)
    return replace(shards, store=store), store


def make_plan(rows: int = ROWS, batch_size: int = BATCH) -> tuple[Plan, Callable[[], Order]]:
    """A plan of three windows over a shuffled order."""
    order = np.random.default_rng(5).permutation(rows)
    ends = (rows // 3, rows // 2, rows)
    plan = Plan(4, 1, rows, batch_size, "keep", ends)
    windows = np.split(order, ends[:-1])
    return plan, lambda: Order(plan, lambda index: windows[index])


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert not loader_threads()


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("bss_ray")]


class Asked:
    """Other nodes, in this process.

    Attributes:
        requests: node and row ids of what they were asked for.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, list[int]]] = []

    def __call__(self, node: str, shards: Shards, row_ids: np.ndarray) -> Receive:
        self.requests.append((node, row_ids.tolist()))
        assert {part.node for part in shards.parts} == {node}, "only what is asked for is described"
        return lambda: shards.gather(row_ids)


def read_all(
    shards: Shards, rank_nodes: list[str], transform: Transform | None = None, start: int = 0
) -> list[list[RankBatch]]:
    """The batches of each rank."""
    plan, order = make_plan(shards.rows)
    return [
        list(
            Loader(shards, rank=rank, rank_nodes=rank_nodes, device=CPU, seed=3).batches(
                plan, order(), start, transform
            )
        )
        for rank in range(len(rank_nodes))
    ]


def check_content(batch: Tensors) -> None:
    ids = batch["row_id"]
    assert torch.equal(batch["a"][:, 2], ids.float())
    assert torch.equal(batch["b"], ids.float() * 2)
    assert torch.equal(batch["label"], ids % 5)


@pytest.mark.parametrize("group", [1, 3, 50])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_global_batches_are_complete_on_any_number_of_ranks(
    ranks: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RowReader, "group_size", lambda self, rows: group)
    plan, order = make_plan()
    parts = read_all(make_shards(["n"] * 7), ["n"] * ranks)
    everything = order().take(0, ROWS)
    for number, batches in enumerate(zip(*parts, strict=True)):
        assert [batch.number for batch in batches] == [number] * ranks
        for batch in batches:
            check_content(batch.tensors)
        found = torch.cat([batch.tensors["row_id"] for batch in batches])
        start, stop = plan.span(number)
        assert sorted(found.tolist()) == sorted(everything[start:stop].tolist())
        assert sum(batch.loss_scale for batch in batches) == pytest.approx(ranks)


def test_a_tail_of_fewer_rows_than_ranks_brings_filler_rows() -> None:
    parts = read_all(make_shards(["n"], rows=17), ["n"] * 4)
    tail = [batches[-1] for batches in parts]
    assert [batch.loss_scale for batch in tail] == [4.0, 0.0, 0.0, 0.0]
    assert [batch.tensors["row_id"].tolist() == [FILLER] for batch in tail] == [False, True, True, True]


def jitter(batch: Tensors, random: RowRandom) -> Tensors:
    return {**batch, "a": batch["a"] + random.normal(3), "cut": random.integers(0, 100)}


def test_augmented_rows_do_not_depend_on_ranks_or_shards() -> None:
    def augmented(shards: int, ranks: int) -> Tensors:
        batches = [b.tensors for part in read_all(make_shards(["n"] * shards), ["n"] * ranks, jitter) for b in part]
        joined = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        own = joined["row_id"] != FILLER
        place = torch.argsort(joined["row_id"][own])
        return {name: values[own][place] for name, values in joined.items()}

    first = augmented(1, 1)
    assert first["row_id"].tolist() == list(range(ROWS))
    assert not torch.equal(first["a"][:, 0], first["row_id"].float())
    for shards, ranks in ((3, 2), (5, 4), (2, 8)):
        other = augmented(shards, ranks)
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_start_in_the_middle() -> None:
    shards = make_shards(["n"] * 3)
    whole, rest = read_all(shards, ["n"] * 2, jitter), read_all(shards, ["n"] * 2, jitter, start=5)
    for all_batches, batches in zip(whole, rest, strict=True):
        assert [batch.number for batch in batches] == list(range(5, 13))
        for expected, batch in zip(all_batches[5:], batches, strict=True):
            assert all(torch.equal(expected.tensors[name], batch.tensors[name]) for name in batch.tensors)


def test_rows_with_replacement() -> None:
    shards = make_shards(["n"] * 3)
    ids = np.array([7, 7, 200, 7, 100, 100])
    plan = Plan(0, 1, 6, 4, "keep", (6,))
    batches = list(Loader(shards, rank=0, rank_nodes=["n"], device=CPU).batches(plan, Order(plan, lambda _: ids)))
    assert [batch.tensors["row_id"].tolist() for batch in batches] == [[7, 7, 200, 7], [100, 100]]
    for batch in batches:
        check_content(batch.tensors)


@pytest.mark.parametrize("recycle_bytes", [0, 1 << 20])
def test_a_batch_is_the_loop_s_own(recycle_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module, "_RECYCLE_BYTES", recycle_bytes)
    shards = make_shards(["n"] * 2)
    plan, order = make_plan()
    kept = []
    for batch in Loader(shards, rank=0, rank_nodes=["n"], device=CPU).batches(plan, order()):
        kept.append({name: values.clone() for name, values in batch.tensors.items()})
        kept.append(batch.tensors)
    for copy, batch in zip(kept[::2], kept[1::2], strict=True):  # later batches have not written into it
        assert all(torch.equal(copy[name], batch[name]) for name in copy)
        batch["a"] += 1
    check_content(shards_batch(shards))


def shards_batch(shards: Shards) -> Tensors:
    ids = np.arange(shards.rows)
    return {name: torch.from_numpy(values) for name, values in {**shards.gather(ids), "row_id": ids}.items()}


# ---- other nodes ------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 4])
def test_rows_of_other_nodes_are_asked_for_there(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowReader, "group_size", lambda self, rows: group)
    shards = make_shards(["x", "y", "", "x", "z"])
    nodes = np.array(["x", "y", "", "x", "z"])
    plan, order = make_plan()
    for rank, node in enumerate("xxy"):
        asked = Asked()
        loader = Loader(shards, rank=rank, rank_nodes=["x", "x", "y"], device=CPU, ask=asked)
        assert loader.moved_share == 0
        ids = []
        for batch in loader.batches(plan, order()):
            check_content(batch.tensors)
            ids += batch.tensors["row_id"].tolist()
        holders = nodes[shards.locate(np.array(ids))]
        far = [row for row, holder in zip(ids, holders, strict=True) if holder not in ("", node)]
        assert sorted(row for _, rows in asked.requests for row in rows) == sorted(far)
        assert all((nodes[shards.locate(np.array(rows))] == other).all() for other, rows in asked.requests)
        assert len(asked.requests) <= 2 * -(-plan.batches // group)  # one a node and group
        assert loader.moved_share == pytest.approx(len(far) / len(ids))
        assert 0 < loader.moved_share < 0.6


def test_nothing_moves_where_nodes_have_what_they_need() -> None:
    plan, order = make_plan()
    for shard_nodes, rank_nodes in ((["x"] * 3, ["x"] * 4), ([""] * 3, ["x", "y"])):
        loader = Loader(make_shards(shard_nodes), rank=1, rank_nodes=rank_nodes, device=CPU)
        assert sum(1 for _ in loader.batches(plan, order())) == plan.batches
        assert (loader.moved, loader.moved_share) == (0, 0.0)
        assert loader.read > 0


def test_a_node_that_fails_reaches_the_loop() -> None:
    def receive() -> Arrays:
        raise RuntimeError("the node is gone")

    plan, order = make_plan()
    loader = Loader(make_shards(["y"]), rank=0, rank_nodes=["x"], device=CPU, ask=lambda *_request: receive)
    with pytest.raises(RuntimeError, match="the node is gone"):
        list(loader.batches(plan, order()))


# ---- evaluation -------------------------------------------------------------------------------


@pytest.mark.parametrize("rank_nodes", [["x"], ["x", "y"], ["x", "x", "y"], ["w"] * 4])
def test_evaluation_brings_each_row_once(rank_nodes: list[str]) -> None:
    shards = make_shards(["x", "y", "", "x", "z"])
    parts = []
    for rank in range(len(rank_nodes)):
        batches = list(Loader(shards, rank=rank, rank_nodes=rank_nodes, device=CPU, ask=Asked()).rows(10))
        for batch in batches:
            check_content(batch)
        assert all(len(batch["row_id"]) == 10 for batch in batches[:-1])
        parts.append(torch.cat([batch["row_id"] for batch in batches]).tolist())
    assert sorted(itertools.chain(*parts)) == list(range(ROWS))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_evaluation_without_rows_for_a_rank() -> None:
    assert list(Loader(make_shards(["n"], rows=2), rank=3, rank_nodes=["n"] * 4, device=CPU).rows(10)) == []


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(-1, 3)), min_size=1), st.lists(st.integers(0, 3), min_size=1))
def test_runs_are_shared_out_level_and_at_home(shards: list[tuple[int, int]], ranks: list[int]) -> None:
    firsts = np.cumsum([0] + [rows for rows, _ in shards]).tolist()
    runs = [(first, rows) for first, (rows, _) in zip(firsts, shards, strict=False)]
    homes, rank_homes = np.array([home for _, home in shards]), np.array(ranks)
    shares = share_runs(runs, homes, rank_homes)
    rows = [[row for first, count in share for row in range(first, first + count)] for share in shares]
    assert sorted(itertools.chain(*rows)) == list(range(firsts[-1]))
    size, more = divmod(firsts[-1], len(ranks))
    assert [len(own) for own in rows] == [size + (rank < more) for rank in range(len(ranks))]
    home_of = np.repeat(homes, [count for count, _ in shards])
    for node in set(ranks):
        room = sum(len(own) for own, home in zip(rows, ranks, strict=True) if home == node)
        kept = sum((home_of[own] == node).sum() for own, home in zip(rows, ranks, strict=True) if home == node and own)
        assert kept == min(room, (home_of == node).sum())


# ---- the background ---------------------------------------------------------------------------


def wait_until_idle(store: CountingStore) -> int:
    """Rows taken once nothing more is."""
    while True:
        before = store.taken
        time.sleep(0.1)
        if store.taken == before:
            return before


@pytest.mark.parametrize("group", [1, 2])
def test_back_pressure(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowReader, "group_size", lambda self, rows: group)
    monkeypatch.setattr(loader_module, "_AHEAD_BATCHES", 6)
    shards, store = counting(make_shards(["n"] * 2, rows=50 * BATCH))
    plan, order = make_plan(shards.rows)
    batches = Loader(shards, rank=0, rank_nodes=["n"], device=CPU).batches(plan, order())
    for asked in range(1, 20):
        next(batches)
        if asked in (1, 8, 19):  # the group at hand, and six batches ahead of it
            assert wait_until_idle(store) == (-(-asked // group) * group + 6) * BATCH
    batches.close()
    assert wait_until_idle(store) < 30 * BATCH


def test_large_batches_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "_AHEAD_BYTES", 1000)
    shards, store = counting(make_shards(["n"], rows=20 * BATCH, width=100))
    plan, order = make_plan(shards.rows)
    monkeypatch.setattr(RowReader, "group_size", lambda self, rows: 1)
    batches = Loader(shards, rank=0, rank_nodes=["n"], device=CPU).batches(plan, order())
    next(batches)
    assert wait_until_idle(store) == 3 * BATCH  # the one at hand and two more, whatever their size
    batches.close()


class BrokenStore(CountingStore):
    def take(self, shards: np.ndarray, rows: np.ndarray, out: Arrays) -> None:
        super().take(shards, rows, out)
        if self.taken > 5 * BATCH:
            self.fail_on_purpose()

    def fail_on_purpose(self) -> None:
        raise OSError("disk on fire")


def test_an_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowReader, "group_size", lambda self, rows: 1)
    monkeypatch.setattr(loader_module, "_THREADS", 1)
    shards, _ = counting(make_shards(["n"] * 2), BrokenStore)
    plan, order = make_plan()
    batches = Loader(shards, rank=0, rank_nodes=["n"], device=CPU).batches(plan, order())
    # What came before the error is handed out first.
    assert [next(batches).number for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="disk on fire") as caught:
        next(batches)
    text = "".join(traceback.format_exception(caught.value))
    assert "fail_on_purpose" in text
    assert "While loading batch 5 of epoch 4: 16 rows, row ids" in text


def test_an_error_of_the_order_reaches_the_loop() -> None:
    plan, _ = make_plan()

    def window(index: int) -> np.ndarray:
        if index == 1:
            raise ValueError("no such window")
        return np.arange(ROWS // 3)

    with pytest.raises(ValueError, match="no such window"):
        list(Loader(make_shards(["n"]), rank=0, rank_nodes=["n"], device=CPU).batches(plan, Order(plan, window)))


@pytest.mark.parametrize("how", ["close", "break", "raise", "drop"])
def test_ending_early_leaves_no_thread(how: str) -> None:
    plan, order = make_plan()
    batches = Loader(make_shards(["n"]), rank=0, rank_nodes=["n"], device=CPU).batches(plan, order())
    next(batches)
    assert loader_threads()
    if how == "close":
        batches.close()
    elif how == "break":
        for _ in batches:
            break
        del batches, _
    elif how == "raise":
        with pytest.raises(KeyError):
            batches.throw(KeyError("a bug of the loop"))
    else:
        del batches
        gc.collect()
    assert not loader_threads()


BAD_TRANSFORMS: dict[str, tuple[Callable[[Tensors, RowRandom], object], str]] = {
    "nothing": (lambda batch, random: None, "a dict of tensors; received NoneType"),
    "fewer rows": (lambda batch, random: {**batch, "a": batch["a"][1:]}, r"16 rows .* received shape \(15, 3\) in 'a'"),
    "no tensor": (lambda batch, random: {**batch, "a": 3}, "received int in 'a'"),
}


@pytest.mark.parametrize("case", BAD_TRANSFORMS)
def test_a_transform_returns_a_batch(case: str) -> None:
    transform, message = BAD_TRANSFORMS[case]
    with pytest.raises(ConfigError, match=message):
        read_all(make_shards(["n"]), ["n"], transform)  # type: ignore[arg-type]


def test_an_error_in_a_transform_names_its_batch() -> None:
    def burst(batch: Tensors, random: RowRandom) -> Tensors:
        raise ZeroDivisionError("augmentation")

    with pytest.raises(ZeroDivisionError) as caught:
        read_all(make_shards(["n"]), ["n"], burst)
    text = "".join(traceback.format_exception(caught.value))
    assert "in burst" in text
    assert "While loading batch 0 of epoch 4" in text


def test_row_ids_survive_a_transform() -> None:
    (batches,) = read_all(make_shards(["n"]), ["n"], lambda batch, random: {"a": batch["a"]})
    assert all(set(batch.tensors) == {"a", "row_id"} for batch in batches)


# ---- buffers ----------------------------------------------------------------------------------


def test_a_buffer_waits_for_the_copy_out_of_it() -> None:
    made = itertools.count()
    ring = BufferRing(lambda: {"number": torch.tensor(next(made))}, 2)
    copied = threading.Event()
    with ring.lend() as slot:
        first = slot.buffers["number"]
        slot.wait = copied.wait
    with ring.lend() as slot:
        assert slot.buffers["number"] is not first
    used_again = threading.Event()

    def third() -> None:
        with ring.lend() as slot:
            assert slot.buffers["number"] is first
            used_again.set()

    thread = threading.Thread(target=third)
    thread.start()
    assert not used_again.wait(0.1)
    copied.set()
    assert used_again.wait(10)
    thread.join()
    assert next(made) == 2  # no more than two were ever made


def test_memory_is_used_again_when_nothing_refers_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module, "_RECYCLE_BYTES", 0)
    memory = Recycled((8, 3), "float32", 1)
    lease = memory.lease()
    tensors = [torch.from_numpy(lease.part(start, start + 4)) for start in (0, 4)]
    address, part = tensors[0].data_ptr(), tensors[1][2:, 1]
    del lease, tensors  # a view of one of them lives on
    assert memory.lease().memory.ctypes.data != address
    as_numpy = part.numpy()
    del part
    assert memory.lease().memory.ctypes.data != address
    del as_numpy
    again = [memory.lease().memory.ctypes.data for _ in range(2)]
    assert address in again


def test_batches_of_a_group_are_changed_in_place_independently() -> None:
    (batches,) = read_all(make_shards(["n"], width=200), ["n"])
    first, second = batches[0].tensors["a"], batches[1].tensors["a"]
    weight = torch.ones(200, requires_grad=True)
    loss = (first * weight).sum()
    second.mul_(2)  # must not count as a change of what backward needs
    loss.backward()
    assert torch.equal(weight.grad, first.sum(0))


def test_a_buffer_comes_back_after_an_error() -> None:
    ring = BufferRing(dict, 1)
    with pytest.raises(KeyError), ring.lend():
        raise KeyError
    with ring.lend():
        pass


def test_pinned_buffers_have_the_columns_dtypes() -> None:
    assert [torch_dtype(name) for name in ("float32", "uint8", "int64")] == [torch.float32, torch.uint8, torch.int64]


# ---- groups -----------------------------------------------------------------------------------


def test_groups_are_bounded_by_bytes_and_batches() -> None:
    shards = make_shards(["n"], rows=2000, width=1024)
    assert [RowReader(shards, "n").group_size(rows) for rows in (1, 256, 10_000)] == [64, 15, 1]
