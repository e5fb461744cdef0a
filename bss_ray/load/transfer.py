"""How a batch gets from the gathering of its rows to the rank's device."""

from __future__ import annotations

import contextlib
import itertools
import math
import queue
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from bss_ray.data.shards import Feature
from bss_ray.data.store import Arrays

Tensors = dict[str, Tensor]
Buffers = TypeVar("Buffers")

# Writes the rows of some batches, one after the other, into host arrays; and what is done to each of the batches,
# by its number, on the device.
Fill = Callable[[Arrays], None]
Finish = Callable[[int, Tensors], Tensors]
Receive = Callable[[], Tensors]

# malloc has smaller arrays at hand.
_RECYCLE_BYTES = 64 << 10

# One is being copied from while another is being filled, and one waits for either.
_SLOTS = 3


class Transfer(Protocol):
    """Makes batches on a device; `send` is safe to call from several threads.

    Attributes:
        overlaps: Batches are on their way while the device works: it pays to send them ahead.
    """

    overlaps: ClassVar[bool]

    def begin(self) -> None:
        """Called in the thread of the loop before the first batch of a pass."""
        ...

    def send(self, sizes: Sequence[int], fill: Fill, finish: Finish) -> list[Receive]:
        """Fill host arrays with the rows of some batches, bring them to the device, finish them there.

        Args:
            sizes: rows of each batch.
            fill: writes `{column: (all rows, ...)}`.
            finish: last step of each batch.

        Returns:
            For each batch a function: called in the thread of the loop, it returns the batch, ready to be used there.
        """
        ...


def make_transfer(features: Mapping[str, Feature], rows: int, device: torch.device, spare: int) -> Transfer:
    """The way to `device` for batches of these columns.

    Args:
        features: the columns.
        rows: that are sent at a time, at most.
        device: where batches go.
        spare: arrays of so many rows whose memory is kept for the next ones, in host memory.
    """
    if device.type == "cuda":
        return CudaTransfer(features, rows, device)
    return HostTransfer(features, rows, device, spare)


class HostTransfer:
    """Arrays whose memory the batches' tensors share: the loop may keep or change them."""

    overlaps: ClassVar[bool] = False

    def __init__(self, features: Mapping[str, Feature], rows: int, device: torch.device, spare: int) -> None:
        self._device = device
        self._memory = {
            name: Recycled((rows, *feature.shape), feature.dtype, spare) for name, feature in features.items()
        }

    def begin(self) -> None:
        """Nothing is to be waited for."""

    def send(self, sizes: Sequence[int], fill: Fill, finish: Finish) -> list[Receive]:
        leases = {name: memory.lease() for name, memory in self._memory.items()}
        fill({name: lease.memory[: sum(sizes)] for name, lease in leases.items()})
        batches = []
        for number, (start, stop) in enumerate(_spans(sizes)):
            # A tensor of its own for each batch: slices of one would count as changed when another is changed in place.
            batch = {name: torch.from_numpy(lease.part(start, stop)) for name, lease in leases.items()}
            if self._device.type != "cpu":
                batch = {name: values.to(self._device) for name, values in batch.items()}
            batches.append(finish(number, batch))
        return [lambda batch=batch: batch for batch in batches]  # type: ignore[misc]


class Lease:
    """Memory on loan, given back when nothing refers to it or to any part of it."""

    def __init__(self, memory: np.ndarray, give_back: Callable[[np.ndarray], object] | None) -> None:
        self.memory = memory
        self._give_back = give_back

    def part(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), on loan as long as this very array, or a tensor of it, is there."""
        view = self.memory[start:stop]
        if self._give_back is not None:
            # NumPy's slices refer to the memory, not to each other: so each part holds the loan by itself.
            weakref.finalize(view, _let_go, self).atexit = False
        return view

    def __del__(self) -> None:
        if self._give_back is not None:
            self._give_back(self.memory)


def _let_go(lease: Lease) -> None:
    """The finalizer's own reference to the loan ends with this call."""


class Recycled:
    """Arrays that take over the memory of earlier ones, once nothing refers to those any more.

    malloc gives large arrays back to the system when they are freed, and the page faults of fresh ones
    (80 us a MB) would cost as much as the rows' copying.

    Args:
        shape: of all arrays.
        dtype: of all.
        spare: free arrays that are kept, at most.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, spare: int) -> None:
        self._shape, self._dtype = shape, dtype
        self._free: deque[np.ndarray] = deque(maxlen=spare)
        self._recycles = math.prod(shape) * np.dtype(dtype).itemsize >= _RECYCLE_BYTES

    def lease(self) -> Lease:
        """An array, not initialised."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._shape, self._dtype)
        return Lease(memory, self._free.append if self._recycles else None)


class CudaTransfer:
    """Pinned buffers that are used again, and copies on a stream of their own beside the training's."""

    overlaps: ClassVar[bool] = True

    def __init__(self, features: Mapping[str, Feature], rows: int, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ring = BufferRing(lambda: _pinned(features, rows), _SLOTS)

    def begin(self) -> None:
        # What the loop has queued so far may be a transform's constants, and the side stream must not overtake that.
        # Only once a pass: a wait for each batch would put its copy behind the training that is queued.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def send(self, sizes: Sequence[int], fill: Fill, finish: Finish) -> list[Receive]:
        with self._ring.lend() as slot, torch.cuda.stream(self._stream):
            fill({name: buffer[: sum(sizes)].numpy() for name, buffer in slot.buffers.items()})
            # Blocking: to wait for it, a thread sleeps. By default it spins, on a core that fills the next buffers.
            copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            slot.wait = copied.synchronize
            try:
                batches = [
                    {
                        name: buffer[start:stop].to(self._device, non_blocking=True)
                        for name, buffer in slot.buffers.items()
                    }
                    for start, stop in _spans(sizes)
                ]
            finally:
                copied.record(self._stream)
        return [self._finish(number, batch, finish) for number, batch in enumerate(batches)]

    def _finish(self, number: int, batch: Tensors, finish: Finish) -> Receive:
        with torch.cuda.stream(self._stream):
            finished_batch = finish(number, batch)
            finished = torch.cuda.Event()  # type: ignore[no-untyped-call]
            finished.record(self._stream)

        def receive() -> Tensors:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(finished)
            for tensor in finished_batch.values():
                if tensor.is_cuda:  # a transform may add columns of its own
                    # Its memory belongs to the side stream: keep it until the loop's stream has used it.
                    tensor.record_stream(stream)
            return finished_batch

        return receive


def _spans(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, stop) of batches that lie one after the other."""
    return itertools.pairwise(itertools.accumulate(sizes, initial=0))


def _pinned(features: Mapping[str, Feature], rows: int) -> Tensors:
    return {
        name: torch.empty((rows, *feature.shape), dtype=torch_dtype(feature.dtype), pin_memory=True)
        for name, feature in features.items()
    }


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a NumPy one."""
    return torch.from_numpy(np.empty(0, name)).dtype


@dataclass
class Slot(Generic[Buffers]):
    """Buffers, and how to wait until nothing reads them any more."""

    buffers: Buffers
    wait: Callable[[], object]


class BufferRing(Generic[Buffers]):
    """A fixed number of buffers that are used in turn, each again only when its last copy has ended.

    Args:
        make: allocates the buffers of one slot.
        slots: how many.
    """

    def __init__(self, make: Callable[[], Buffers], slots: int) -> None:
        self._free: queue.SimpleQueue[Slot[Buffers]] = queue.SimpleQueue()
        for _ in range(slots):
            self._free.put(Slot(make(), lambda: None))

    @contextlib.contextmanager
    def lend(self) -> Iterator[Slot[Buffers]]:
        """A free slot, waited for if need be. Set its `wait` once a copy out of it has begun."""
        slot = self._free.get()
        try:
            slot.wait()
            yield slot
        finally:
            self._free.put(slot)
