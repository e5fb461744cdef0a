"""A model as NumPy arrays, the form in which it is sent between processes."""

from __future__ import annotations

import io
import pickle
import warnings
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

try:
    from cloudpickle import Pickler
except ImportError:  # it comes with Ray, and only other processes need its classes by value
    from pickle import Pickler


class ModelSnapshot(NamedTuple):
    """A module as its pickled skeleton and the NumPy arrays of its tensors.

    Ray shares NumPy arrays between processes without a copy (256 MB: 0.6 ms), but not tensors
    (256 MB: 1 s). All of the module is sent, also buffers that are not in its state dict.
    """

    skeleton: bytes
    arrays: list[np.ndarray]


def pack_model(model: nn.Module) -> ModelSnapshot:
    """A snapshot of `model` as it is now; wrappers of DDP and `torch.compile` are removed."""
    arrays: list[np.ndarray] = []
    buffer = io.BytesIO()
    _Packer(buffer, arrays).dump(unwrap_model(model))
    return ModelSnapshot(buffer.getvalue(), arrays)


def unpack_model(snapshot: ModelSnapshot) -> nn.Module:
    """The module of a snapshot, on the CPU, with its own copy of the weights."""
    model: nn.Module = _Unpacker(io.BytesIO(snapshot.skeleton), snapshot.arrays).load()
    return model


def update_model(model: nn.Module, snapshot: ModelSnapshot, skeleton: bytes) -> bool:
    """Copy the weights of `snapshot` into a module, in place: compiled code and memory layout stay the same.

    Args:
        model: Module that was unpacked from another snapshot.
        snapshot: Snapshot of the same module at another time.
        skeleton: Skeleton of the snapshot that the module was unpacked from.

    Returns:
        False if this is impossible, because more than the weights has changed.
    """
    if snapshot.skeleton != skeleton:
        return False
    tensors = _Packer.tensors_of(model)
    if len(tensors) != len(snapshot.arrays):
        return False
    with torch.no_grad():
        for tensor, array in zip(tensors, snapshot.arrays, strict=True):
            tensor.copy_(_as_tensor(array, tensor.dtype, tuple(tensor.shape)))
    return True


def _as_tensor(array: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The bytes of a tensor as a tensor that shares the array's memory."""
    if len(array) == 0:
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")  # the tensor is only read
        return torch.from_numpy(array).view(dtype).reshape(shape)


def _strides(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Strides of an image-like tensor whose layout must be kept; None for the default layout.

    Strides and not a layout: with one channel a tensor has both layouts, and convolutions use the strides (wrong
    strides made the passes of the default model take 1.7 times as long).
    """
    if tensor.ndim != 4 or not tensor.is_contiguous(memory_format=torch.channels_last):
        return None
    return tensor.stride()


def unwrap_model(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel and `torch.compile`."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


# In place of a tensor: number of its array, dtype, shape, strides, whether it is a parameter, and wants gradients.
_Pid = tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...] | None, bool, bool]


class _Packer(Pickler):  # type: ignore[misc]  # cloudpickle ships no types
    """Pickles a module; each of its tensors is put into a list once, so that tied weights stay tied."""

    def __init__(self, file: io.BytesIO, arrays: list[np.ndarray] | None) -> None:
        super().__init__(file, protocol=5)
        self._arrays = arrays
        self._seen: dict[int, _Pid] = {}
        self.tensors: list[torch.Tensor] = []  # keeps them alive: ids of freed objects are used again

    @classmethod
    def tensors_of(cls, model: nn.Module) -> list[torch.Tensor]:
        """The tensors of a module in the order of a snapshot's arrays."""
        packer = cls(io.BytesIO(), None)
        packer.dump(model)
        return packer.tensors

    def persistent_id(self, obj: object) -> _Pid | None:
        if not isinstance(obj, torch.Tensor):
            return None
        if id(obj) not in self._seen:
            if self._arrays is not None:
                # NumPy has no bfloat16, so all tensors are sent as bytes with their dtype and shape.
                data = obj.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
                self._arrays.append(data.reshape(-1).view(torch.uint8).numpy())
            self.tensors.append(obj)
            self._seen[id(obj)] = (
                len(self.tensors) - 1,
                obj.dtype,
                tuple(obj.shape),
                _strides(obj),
                isinstance(obj, nn.Parameter),
                obj.requires_grad,
            )
        return self._seen[id(obj)]


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, arrays: list[np.ndarray]) -> None:
        super().__init__(file)
        self._arrays = arrays
        self._made: dict[int, torch.Tensor] = {}

    def persistent_load(self, pid: _Pid) -> torch.Tensor:
        index, dtype, shape, strides, is_parameter, requires_grad = pid
        if index not in self._made:
            tensor = _as_tensor(self._arrays[index], dtype, shape)
            copy = torch.empty_like(tensor) if strides is None else torch.empty_strided(shape, strides, dtype=dtype)
            tensor = copy.copy_(tensor)
            if is_parameter:
                tensor = nn.Parameter(tensor, requires_grad=requires_grad)
            self._made[index] = tensor
        return self._made[index]
