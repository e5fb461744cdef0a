"""Eval mode, precision and tensors for forward passes that measure rows.

torch is imported by the passes alone: the coordinator is given their settings, and starts a second sooner without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bss_ray.errors import ConfigError, check_one_of

if TYPE_CHECKING:
    import torch
    from torch import nn

# Each precision's type in torch.
PRECISIONS: dict[str, str | None] = {"fp32": None, "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class Forward:
    """Settings of the forward passes that measure rows.

    Args:
        batch_size: Number of rows of a scoring pass's batch; it is halved, with a message, if the batch does not fit
            into memory.
        precision: Precision of scoring passes: `fp32`, `bf16` or `fp16` (autocast).
        channels_last: Whether images (B, C, H, W) and the model are in the channels-last layout, which tensor cores
            prefer.
        compile: Whether the model runs through `torch.compile`; the first batch then takes long.

    Raises:
        ConfigError: a setting is unknown or out of its range.
    """

    batch_size: int = 256
    precision: str = "fp32"
    channels_last: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ConfigError(f"batch_size of the scoring passes must be at least 1; received {self.batch_size}")
        check_precision(self.precision)


def check_precision(precision: str) -> None:
    """Refuse a precision that does not exist.

    Raises:
        ConfigError: The precision is unknown; the error names the nearest.
    """
    check_one_of("precision", precision, PRECISIONS)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Context of mixed precision on `device`; `fp32` changes nothing.

    Raises:
        ConfigError: The precision is unknown.
    """
    check_precision(precision)
    dtype = PRECISIONS[precision]
    if dtype is None:
        return contextlib.nullcontext()
    import torch

    return torch.autocast(device.type, dtype=getattr(torch, dtype))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; afterwards each module is in its earlier mode again.

    Scoring in train mode would feed the measured rows into the batch-norm statistics.
    """
    import torch

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
    import torch

    return {name: torch.from_numpy(values).to(device, non_blocking=True) for name, values in columns.items()}
