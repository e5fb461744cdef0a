"""One rank's batches of an epoch: its rows of every global batch, gathered ahead and put on its device."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bss_ray.data.shards import Feature, Shards
from bss_ray.data.store import Arrays
from bss_ray.errors import ConfigError
from bss_ray.load.randomness import RowRandom
from bss_ray.load.rows import Ask, RowReader, RowRequest
from bss_ray.load.transfer import Receive, Tensors, Transfer, make_transfer
from bss_ray.runtime.threads import work_ahead
from bss_ray.sample.plan import Order, Plan, share_out

# Row id of a filler row, whose loss has weight 0.
FILLER = -1

# Changes a batch on its device, e.g. augments it: (batch, its rows' random numbers) -> batch.
Transform = Callable[[Tensors, RowRandom], Tensors]

# Most batches and bytes that are made ahead of the loop, but at least two groups of batches.
_AHEAD_BATCHES = 32
_AHEAD_BYTES = 64 << 20
# The second thread works while the first waits for another node or a disk, or transforms. Copies of a few rows
# hardly run in parallel: they take 3 us, less than a thread needs to wake up and get the GIL.
_THREADS = 2


class RankBatch(NamedTuple):
    """One rank's part of a global batch.

    Attributes:
        number: Number of the global batch in the epoch, from 0.
        tensors: Columns `{column: (b, ...)}` on the rank's device, with `row_id` (b,) int64, in the order drawn.
        loss_scale: Factor of the mean loss of the part: averaged over the ranks, as DDP averages gradients, the product
            is the mean over the global batch, whatever the parts' sizes.
    """

    number: int
    tensors: Tensors
    loss_scale: float


class Part(NamedTuple):
    """The rows of one batch of this rank.

    Attributes:
        number: Number of the batch.
        row_ids: (b,) int64.
        loss_scale: See `RankBatch`; 0 for a filler row.
    """

    number: int
    row_ids: np.ndarray
    loss_scale: float = 1.0


class Loader:
    """Reads one rank's rows of every global batch of a plan, ahead of the loop.

    Rows go to a rank on the node that holds them, as long as it has room. A process on that node picks out
    the remaining rows: single rows are sent, never shards.

    Args:
        shards: The rows.
        rank: Number of this rank.
        rank_nodes: Node id of every rank.
        device: Device of the batches.
        seed: Seed of the run, for the random numbers of transforms.
        prefix: Prefix of the names of the run's actors.
        ask: How rows of other nodes are asked for; None asks their processes through Ray.

    Attributes:
        read: Number of rows that the last `batches` has handed out so far, without filler rows.
        moved: Number of these rows that came from another node.
        waited: Seconds in which its loop has waited for these rows.
    """

    def __init__(
        self,
        shards: Shards,
        *,
        rank: int,
        rank_nodes: list[str],
        device: torch.device,
        seed: int = 0,
        prefix: str = "bss_ray-",
        ask: Ask | None = None,
    ) -> None:
        self._shards = shards
        self._rank = rank
        self._device = device
        self._seed = seed
        if ask is None and any(part.node not in ("", rank_nodes[rank]) for part in shards.parts):
            from bss_ray.load.remote_rows import RemoteRows  # with all rows on one node Ray is not needed

            ask = RemoteRows(prefix).ask
        self._reader = RowReader(shards, rank_nodes[rank], ask)
        nodes = {node: index for index, node in enumerate(dict.fromkeys(rank_nodes))}
        self._rank_homes = np.array([nodes[node] for node in rank_nodes])
        # Shards on nodes without a rank, or without a node, have no home: any rank may take their rows.
        self._shard_homes = np.array([nodes.get(part.node, -1) for part in shards.parts])
        homes = set(self._shard_homes.tolist())
        self._one_home = homes == {-1} or (len(nodes) == 1 and len(homes) == 1)
        self._transfers: dict[int, Transfer] = {}  # by number of rows; their memory is used in all epochs
        self.read, self.moved, self.waited = 0, 0, 0.0

    @property
    def moved_share(self) -> float:
        """`moved / read`; 0 before any row."""
        return self.moved / max(self.read, 1)

    def batches(
        self, plan: Plan, order: Order, start: int = 0, transform: Transform | None = None
    ) -> Generator[RankBatch, None, None]:
        """The rank's parts of global batches `start`, `start + 1`, ... of the plan.

        Args:
            plan: Plan of the epoch.
            order: Order of the plan; it is read in a background thread.
            start: First global batch.
            transform: Function that is called in the background for each batch, on its device.

        Raises:
            ConfigError: The transform returned something else than a batch.
        """
        self.read, self.moved, self.waited = 0, 0, 0.0
        parts = (self._part(number, order.take(*plan.span(number))) for number in range(start, plan.batches))
        largest = -(-plan.batch_size // len(self._rank_homes))
        loaded = self._load(parts, largest, f"epoch {plan.epoch}", self._finish(transform, plan.epoch))
        asked = time.perf_counter()
        with contextlib.closing(loaded):
            for part, tensors in loaded:
                if part.loss_scale > 0:
                    self.read += len(part.row_ids)
                    self.moved += self._reader.far(part.row_ids)
                self.waited += time.perf_counter() - asked
                yield RankBatch(part.number, tensors, part.loss_scale)
                asked = time.perf_counter()

    def rows(self, batch_size: int, transform: Transform | None = None) -> Generator[Tensors, None, None]:
        """The rank's share of all rows in batches, each row on one rank (evaluation).

        Args:
            batch_size: Number of rows of a batch on this rank.
            transform: As in `batches`; its random numbers are always those of epoch 0.
        """
        runs = share_runs(
            [(part.first_row, part.rows) for part in self._shards.parts], self._shard_homes, self._rank_homes
        )[self._rank]
        parts = (Part(number, ids) for number, ids in enumerate(_cut(runs, batch_size)))
        with contextlib.closing(self._load(parts, batch_size, "evaluation", self._finish(transform, 0))) as loaded:
            for _, tensors in loaded:
                yield tensors

    def _part(self, number: int, global_ids: np.ndarray) -> Part:
        row_ids = self._own(global_ids)
        if len(row_ids) == 0:
            # A tail of fewer rows than ranks. The rank must still take part in the backward pass.
            return Part(number, global_ids[:1], 0.0)
        return Part(number, row_ids, len(row_ids) * len(self._rank_homes) / len(global_ids))

    def _own(self, global_ids: np.ndarray) -> np.ndarray:
        """This rank's rows of a global batch."""
        if self._one_home:  # the result of `share_out` in this case, without reading the rows
            size, more = divmod(len(global_ids), len(self._rank_homes))
            start = self._rank * size + min(self._rank, more)
            return global_ids[start : start + size + (self._rank < more)]
        homes = self._shard_homes[self._shards.locate(global_ids)]
        own: np.ndarray = global_ids[share_out(homes, self._rank_homes) == self._rank]
        return own

    def _load(
        self, parts: Iterator[Part], largest: int, where: str, finish: Callable[[Tensors], Tensors]
    ) -> Generator[tuple[Part, Tensors], None, None]:
        """The batches of `parts`, made in the background.

        Args:
            parts: Parts of at most `largest` rows; the iterator is advanced in the background, too.
            largest: Largest number of rows of a part.
            where: Place that notes of errors name.
            finish: Last step of each batch, on its device.
        """
        group = self._reader.group_size(largest)
        group_bytes = group * largest * self._reader.row_bytes
        ahead = max(2, min(_AHEAD_BATCHES // group, _AHEAD_BYTES // max(group_bytes, 1)))
        transfer = self._transfer(group * largest, ahead)
        transfer.begin()
        job = _Job(self._reader, transfer, where, finish)
        loaded = work_ahead(map(job.request, _groups(parts, group)), job.load, ahead=ahead, threads=_THREADS)
        with contextlib.closing(loaded):
            for batches in loaded:
                batches.reverse()
                while batches:
                    part, receive = batches.pop()  # removed from the list, so that only the loop keeps it alive
                    yield part, receive()
                    del receive

    def _transfer(self, rows: int, ahead: int) -> Transfer:
        """The transfer of `rows` rows at a time to the device."""
        if rows not in self._transfers:
            columns = {**self._shards.features, "row_id": Feature((), "int64")}
            self._transfers[rows] = make_transfer(columns, rows, self._device, spare=ahead + _THREADS)
        return self._transfers[rows]

    def _finish(self, transform: Transform | None, epoch: int) -> Callable[[Tensors], Tensors]:
        if transform is None:
            return lambda batch: batch
        return lambda batch: apply_transform(transform, batch, RowRandom(self._seed, epoch, batch["row_id"]))


class _Job:
    """Makes groups of batches: `request` in one thread, `load` in several."""

    def __init__(self, reader: RowReader, transfer: Transfer, where: str, finish: Callable[[Tensors], Tensors]) -> None:
        self._reader = reader
        self._transfer = transfer
        self._where = where
        self._finish = finish

    def request(self, parts: list[Part]) -> tuple[list[Part], RowRequest]:
        return parts, self._reader.request(np.concatenate([part.row_ids for part in parts]))

    def load(self, requested: tuple[list[Part], RowRequest]) -> list[tuple[Part, Receive]]:
        parts, request = requested
        at = parts

        def fill(arrays: Arrays) -> None:
            ids = [part.row_ids if part.loss_scale > 0 else np.full_like(part.row_ids, FILLER) for part in parts]
            arrays["row_id"][:] = np.concatenate(ids)
            self._reader.fill(request, {name: values for name, values in arrays.items() if name != "row_id"})

        def finish(number: int, batch: Tensors) -> Tensors:
            nonlocal at
            at = [parts[number]]
            return self._finish(batch)

        try:
            received = self._transfer.send([len(part.row_ids) for part in parts], fill, finish)
            return list(zip(parts, received, strict=True))
        except Exception as error:
            error.add_note(_note(self._where, at))
            raise


def apply_transform(transform: Transform, batch: Tensors, random: RowRandom) -> Tensors:
    """The transformed batch, with its row ids.

    Raises:
        ConfigError: The result is not a dict of tensors with a row for each row of the batch.
    """
    row_id = batch["row_id"]
    changed = transform(dict(batch), random)
    if not isinstance(changed, dict):
        raise ConfigError(f"a transform returns the batch, a dict of tensors; received {type(changed).__name__}")
    for name, values in changed.items():
        if not isinstance(values, Tensor) or values.shape[:1] != row_id.shape:
            found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ConfigError(
                f"a transform returns a tensor with one row for each of the {len(row_id)} rows of the batch in every "
                f"column; received {found} in {name!r}"
            )
    return {**changed, "row_id": row_id}


def share_runs(runs: list[tuple[int, int]], homes: np.ndarray, rank_homes: np.ndarray) -> list[list[tuple[int, int]]]:
    """`share_out` for all rows: which rank takes which runs of consecutive rows.

    The ranks' numbers of rows differ by at most one, and each takes rows of its own node first.

    Args:
        runs: (first row id, rows) of each shard.
        homes: (shards,) int node of each shard.
        rank_homes: (ranks,) int node of each rank.

    Returns:
        For each rank (first row id, rows), ascending.
    """
    ranks = len(rank_homes)
    size, more = divmod(sum(rows for _, rows in runs), ranks)
    room = [size + (rank < more) for rank in range(ranks)]
    shares: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]

    def deal(first: int, rows: int, takers: list[int]) -> tuple[int, int]:
        for rank in takers:
            taken = min(rows, room[rank])
            if taken:
                shares[rank].append((first, taken))
            room[rank] -= taken
            first, rows = first + taken, rows - taken
        return first, rows

    at_home = [np.flatnonzero(rank_homes == home).tolist() for home in homes]
    surplus = [deal(*run, takers) for run, takers in zip(runs, at_home, strict=True)]
    for run in surplus:
        deal(*run, list(range(ranks)))
    return [sorted(share) for share in shares]


def _cut(runs: list[tuple[int, int]], batch_size: int) -> Iterator[np.ndarray]:
    """The row ids of runs in batches, without making all of them at once."""
    lengths = np.array([rows for _, rows in runs], dtype=np.int64)
    ends = np.cumsum(lengths)
    shift = np.array([first for first, _ in runs], dtype=np.int64) - (ends - lengths)
    total = int(lengths.sum())
    for start in range(0, total, batch_size):
        positions = np.arange(start, min(start + batch_size, total))
        yield positions + shift[np.searchsorted(ends, positions, side="right")]


def _groups(parts: Iterator[Part], size: int) -> Iterator[list[Part]]:
    while group := list(itertools.islice(parts, size)):
        yield group


def _note(where: str, parts: list[Part]) -> str:
    """Place of an error, for people."""
    numbers = f"batch {parts[0].number}" if len(parts) == 1 else f"batches {parts[0].number} to {parts[-1].number}"
    ids = np.concatenate([part.row_ids for part in parts])
    shown = ", ".join(map(str, ids[:5].tolist()))
    return f"While loading {numbers} of {where}: {len(ids)} rows, row ids {shown}{', ...' if len(ids) > 5 else ''}"
