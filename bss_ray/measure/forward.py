"""A model over rows: the forward passes that measure them, and the model's way to them."""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import cloudpickle
import numpy as np
import torch
from torch import nn

from bss_ray.errors import ConfigError, ModelOutputError, first_ids, nearest
from bss_ray.measure.criteria import Measurer

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision on `device`; `fp32` is none.

    Raises:
        ConfigError: unknown precision.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown precision {precision!r}; {nearest(precision, PRECISIONS)}")
    dtype = PRECISIONS[precision]
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module is in the mode it was in.

    Scoring in train mode would feed the measured rows into the batch-norm statistics.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def to_tensors(columns: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """Columns of a batch as tensors on `device`; the arrays must be the caller's own (not a shard's views)."""
    return {name: torch.from_numpy(values).to(device, non_blocking=True) for name, values in columns.items()}


def measure_rows(
    model: nn.Module,
    columns: dict[str, np.ndarray],
    *,
    label: str,
    measurer: Measurer,
    batch_size: int,
    device: torch.device,
    precision: str = "fp32",
    first_row: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Measure consecutive rows, unaugmented, in eval mode.

    Args:
        model: maps a batch `{column: (b, ...)}` to outputs; on `device`.
        columns: `{column: (n, ...)}`; read-only views are fine, batches are copied.
        label: name of the label column.
        measurer: how to measure.
        batch_size: rows of a forward pass.
        device: where the model is.
        precision: `fp32`, `bf16` or `fp16`.
        first_row: row id of the first row, for messages.

    Returns:
        similarity and information, each (n,) float32.

    Raises:
        ModelOutputError: outputs break the contract, or are NaN or infinite (row ids named).
    """
    rows = len(columns[label])
    similarity, information = np.empty(rows, np.float32), np.empty(rows, np.float32)
    with evaluating(model), autocast(device, precision):
        for start in range(0, rows, batch_size):
            here = slice(start, min(start + batch_size, rows))
            ids = np.arange(first_row + here.start, first_row + here.stop)
            batch = to_tensors({name: values[here].copy() for name, values in columns.items()}, device)
            batch["row_id"] = torch.from_numpy(ids).to(device)
            measures = measurer.measure(model(batch), batch[label])
            similarity[here] = measures.similarity.cpu().numpy()
            information[here] = measures.information.cpu().numpy()
    bad = ~(np.isfinite(similarity) & np.isfinite(information))
    if bad.any():
        raise ModelOutputError(
            f"logits must be finite; NaN or infinite measures in {first_ids(bad, first_row)}. Look at these rows' "
            "inputs, or lower the learning rate if the model has diverged"
        )
    return similarity, information


# ---- a model as NumPy arrays ------------------------------------------------------------------


class ModelSnapshot(NamedTuple):
    """A module as its pickled skeleton and the NumPy arrays of its tensors.

    Ray shares NumPy arrays between processes without a copy (256 MB: 0.6 ms), but not tensors
    (256 MB: 1 s). Everything of the module travels, also buffers that are not in its state dict.
    """

    skeleton: bytes
    arrays: list[np.ndarray]


def pack_model(model: nn.Module) -> ModelSnapshot:
    """A snapshot of `model` as it is now; wrappers of DDP and `torch.compile` are taken off."""
    arrays: list[np.ndarray] = []
    buffer = io.BytesIO()
    _Packer(buffer, arrays).dump(unwrap_model(model))
    return ModelSnapshot(buffer.getvalue(), arrays)


def unpack_model(snapshot: ModelSnapshot) -> nn.Module:
    """The module of a snapshot, on the CPU, with its own copy of the weights."""
    model: nn.Module = _Unpacker(io.BytesIO(snapshot.skeleton), snapshot.arrays).load()
    return model


def unwrap_model(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel and `torch.compile`."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


class _Packer(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle ships no types
    """Pickles a module; its tensors go to a list, each once, so tied weights stay tied."""

    def __init__(self, file: io.BytesIO, arrays: list[np.ndarray]) -> None:
        super().__init__(file, protocol=5)
        self._arrays = arrays
        self._seen: dict[int, tuple[Any, ...]] = {}
        self._alive: list[torch.Tensor] = []  # ids of freed objects are used again

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if not isinstance(obj, torch.Tensor):
            return None
        if id(obj) not in self._seen:
            # NumPy has no bfloat16: carry all tensors as bytes, with their dtype and shape.
            data = obj.detach().cpu().contiguous()
            self._arrays.append(data.reshape(-1).view(torch.uint8).numpy().copy())
            self._alive.append(obj)
            self._seen[id(obj)] = (
                len(self._arrays) - 1,
                data.dtype,
                tuple(data.shape),
                isinstance(obj, nn.Parameter),
                obj.requires_grad,
            )
        return self._seen[id(obj)]


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, arrays: list[np.ndarray]) -> None:
        super().__init__(file)
        self._arrays = arrays
        self._made: dict[int, torch.Tensor] = {}

    def persistent_load(self, pid: tuple[Any, ...]) -> torch.Tensor:
        index, dtype, shape, is_parameter, requires_grad = pid
        if index not in self._made:
            data = torch.from_numpy(self._arrays[index].copy())
            tensor = data.view(dtype).reshape(shape) if len(data) else torch.empty(shape, dtype=dtype)
            if is_parameter:
                tensor = nn.Parameter(tensor, requires_grad=requires_grad)
            self._made[index] = tensor
        return self._made[index]
