"""The transfer of gathered rows to the rank's device."""

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

# A function that writes the rows of some batches into host arrays, and a function that finishes each batch, by its
# number, on the device.
Fill = Callable[[Arrays], None]
Finish = Callable[[int, Tensors], Tensors]
Receive = Callable[[], Tensors]

# malloc keeps smaller arrays itself.
_RECYCLE_BYTES = 64 << 10

# One slot is copied from while another is filled, and one waits for either.
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
        """Fill host arrays with the rows of some batches, copy them to the device, and finish them there.

        Args:
            sizes: Number of rows of each batch.
            fill: Function that writes `{column: (all rows, ...)}`.
            finish: Last step of each batch.

        Returns:
            For each batch a function that, called in the thread of the loop, returns the batch ready for use there.
        """
        ...


def make_transfer(features: Mapping[str, Feature], rows: int, device: torch.device, spare: int) -> Transfer:
    """The transfer to `device` for batches of these columns.

    Args:
        features: Features of the columns.
        rows: Largest number of rows that are sent at a time.
        device: Device of the batches.
        spare: Number of host arrays whose memory is kept for later batches.
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
        """There is nothing to wait for."""

    def send(self, sizes: Sequence[int], fill: Fill, finish: Finish) -> list[Receive]:
        leases = {name: memory.lease() for name, memory in self._memory.items()}
        fill({name: lease.memory[: sum(sizes)] for name, lease in leases.items()})
        batches = []
        for number, (start, stop) in enumerate(_spans(sizes)):
            # A separate tensor for each batch: slices of one would count as changed when another slice is.
            batch = {name: torch.from_numpy(lease.part(start, stop)) for name, lease in leases.items()}
            if self._device.type != "cpu":
                batch = {name: values.to(self._device) for name, values in batch.items()}
            batches.append(finish(number, batch))
        return [lambda batch=batch: batch for batch in batches]  # type: ignore[misc]


class Lease:
    """Lent memory, which is returned when nothing refers to it or to any part of it."""

    def __init__(self, memory: np.ndarray, give_back: Callable[[np.ndarray], object] | None) -> None:
        self.memory = memory
        self._give_back = give_back

    def part(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop), lent as long as this array, or a tensor of it, exists."""
        view = self.memory[start:stop]
        if self._give_back is not None:
            # NumPy's slices refer to the memory and not to each other, so each part holds the loan itself.
            weakref.finalize(view, _let_go, self).atexit = False
        return view

    def __del__(self) -> None:
        if self._give_back is not None:
            self._give_back(self.memory)


def _let_go(lease: Lease) -> None:
    """The finalizer's own reference to the loan ends with this call."""


class Recycled:
    """Arrays that reuse the memory of earlier arrays when nothing refers to those any more.

    malloc returns large freed arrays to the system, and the page faults of new arrays (80 us a MB) would cost as
    much as copying the rows.

    Args:
        shape: Shape of all arrays.
        dtype: Dtype of all arrays.
        spare: Largest number of free arrays that are kept.
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
    """Reused pinned buffers, and copies on a separate stream next to that of training."""

    overlaps: ClassVar[bool] = True

    def __init__(self, features: Mapping[str, Feature], rows: int, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ring = BufferRing(lambda: _pinned(features, rows), _SLOTS)

    def begin(self) -> None:
        # The loop may have queued constants of a transform, which the side stream must not overtake. Only once a
        # pass: with a wait for each batch its copy would come after the queued training.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def send(self, sizes: Sequence[int], fill: Fill, finish: Finish) -> list[Receive]:
        with self._ring.lend() as slot, torch.cuda.stream(self._stream):
            fill({name: buffer[: sum(sizes)].numpy() for name, buffer in slot.buffers.items()})
            # Blocking: a waiting thread sleeps. By default it would spin on a core that fills the next buffers.
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
                if tensor.is_cuda:  # a transform may add columns
                    # Its memory belongs to the side stream, so it is kept until the loop's stream has used it.
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
    """Buffers, and a function that waits until nothing reads them any more."""

    buffers: Buffers
    wait: Callable[[], object]


class BufferRing(Generic[Buffers]):
    """A fixed number of buffers that are used in turn, each only when its last copy has ended.

    Args:
        make: Function that allocates the buffers of one slot.
        slots: Number of slots.
    """

    def __init__(self, make: Callable[[], Buffers], slots: int) -> None:
        self._free: queue.SimpleQueue[Slot[Buffers]] = queue.SimpleQueue()
        for _ in range(slots):
            self._free.put(Slot(make(), lambda: None))

    @contextlib.contextmanager
    def lend(self) -> Iterator[Slot[Buffers]]:
        """A free slot; waits for one if necessary. Set its `wait` after a copy out of it has begun."""
        slot = self._free.get()
        try:
            slot.wait()
            yield slot
        finally:
            self._free.put(slot)
