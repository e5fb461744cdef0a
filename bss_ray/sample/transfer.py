"""How a batch gets from the gathering of its rows to the rank's device."""

from __future__ import annotations

import contextlib
import queue
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from bss_ray.data.shards import Feature
from bss_ray.data.store import Arrays

Tensors = dict[str, Tensor]
Buffers = TypeVar("Buffers")

# Writes the rows of a batch into host arrays, and what is done to the batch on the device.
Fill = Callable[[Arrays], None]
Finish = Callable[[Tensors], Tensors]

# malloc has smaller arrays at hand.
_RECYCLE_BYTES = 64 << 10

# One is being copied from while another is being filled, in each of two threads.
_SLOTS = 4


class Transfer(Protocol):
    """Makes batches on a device; safe to call from several threads."""

    def send(self, rows: int, fill: Fill, finish: Finish) -> Callable[[], Tensors]:
        """Fill host arrays of so many rows, bring them to the device, finish them there.

        Returns:
            Called in the thread of the loop, it returns the batch, ready to be used there.
        """
        ...


def make_transfer(features: Mapping[str, Feature], rows: int, device: torch.device, spare: int) -> Transfer:
    """The way to `device` for batches of these columns.

    Args:
        features: the columns.
        rows: of a batch, at most.
        device: where batches go.
        spare: batches whose memory is kept for the next ones, in host memory.
    """
    if device.type == "cuda":
        return CudaTransfer(features, rows, device)
    return HostTransfer(features, rows, device, spare)


class HostTransfer:
    """Arrays whose memory the batch's tensors share: the loop may keep or change them."""

    def __init__(self, features: Mapping[str, Feature], rows: int, device: torch.device, spare: int) -> None:
        self._device = device
        self._memory = {
            name: Recycled((rows, *feature.shape), feature.dtype, spare) for name, feature in features.items()
        }

    def send(self, rows: int, fill: Fill, finish: Finish) -> Callable[[], Tensors]:
        arrays = {name: memory.array(rows) for name, memory in self._memory.items()}
        fill(arrays)
        batch = {name: torch.from_numpy(values) for name, values in arrays.items()}
        if self._device.type != "cpu":
            batch = {name: values.to(self._device) for name, values in batch.items()}
        batch = finish(batch)
        return lambda: batch


class Recycled:
    """Arrays that take over the memory of earlier ones, once nothing refers to those any more.

    malloc gives large arrays back to the system when they are freed, and the page faults of fresh ones
    (80 us a MB) would cost as much as the rows' copying.

    Args:
        shape: of the largest array.
        dtype: of all.
        spare: free arrays that are kept, at most.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str, spare: int) -> None:
        self._shape, self._dtype = shape, dtype
        self._free: deque[np.ndarray] = deque(maxlen=spare)

    def array(self, rows: int) -> np.ndarray:
        """(rows, ...), not initialised. Its memory is in use as long as this very array, or a tensor of it, is."""
        if int(np.prod(self._shape)) * np.dtype(self._dtype).itemsize < _RECYCLE_BYTES:
            return np.empty((rows, *self._shape[1:]), self._dtype)
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(self._shape, self._dtype)
        view = memory[:rows]
        # torch.from_numpy refers to the view. Slices of it refer to `memory`: none may outlive the filling.
        weakref.finalize(view, self._free.append, memory).atexit = False
        return view


class CudaTransfer:
    """Pinned buffers that are used again, and copies on a stream of their own beside the training's."""

    def __init__(self, features: Mapping[str, Feature], rows: int, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ring = BufferRing(lambda: _pinned(features, rows), _SLOTS)

    def send(self, rows: int, fill: Fill, finish: Finish) -> Callable[[], Tensors]:
        with self._ring.lend() as slot, torch.cuda.stream(self._stream):
            buffers = {name: buffer[:rows] for name, buffer in slot.buffers.items()}
            fill({name: buffer.numpy() for name, buffer in buffers.items()})
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            slot.wait = copied.synchronize
            try:
                batch = {name: buffer.to(self._device, non_blocking=True) for name, buffer in buffers.items()}
            finally:
                copied.record(self._stream)
        with torch.cuda.stream(self._stream):
            batch = finish(batch)
            finished = torch.cuda.Event()  # type: ignore[no-untyped-call]
            finished.record(self._stream)

        def receive() -> Tensors:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(finished)
            for tensor in batch.values():
                # Its memory belongs to the side stream: keep it until the loop's stream has used it.
                tensor.record_stream(stream)
            return batch

        return receive


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
