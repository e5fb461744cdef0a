"""Criteria: how well the modalities agree on a row, and how much it has left to teach.

A criterion maps a model's outputs for a batch to one number a row. Outputs are
`{modality: logits (B, C), ..., "fused": logits (B, C)}`, with at least two modalities.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from bss_ray.errors import ConfigError, DataError, ModelOutputError, nearest

FUSED = "fused"

Outputs = Mapping[str, Tensor]


class Measures(NamedTuple):
    """Raw measures of a batch, before any normalisation; float32 (B,), without gradients."""

    similarity: Tensor
    information: Tensor


def modalities_of(outputs: Outputs) -> list[str]:
    """Names of the modalities in a model's outputs, in the model's order."""
    return [name for name in outputs if name != FUSED]


def check_outputs(outputs: Outputs, labels: Tensor) -> None:
    """Check the contract between a model and this package; looks at shapes, not at values.

    Raises:
        ModelOutputError: not a mapping, no `fused`, fewer than two modalities, or unequal shapes.
    """
    if not isinstance(outputs, Mapping):
        raise ModelOutputError(
            "a model must return a dict {modality: logits (B, C), ..., 'fused': logits (B, C)}; "
            f"received {type(outputs).__name__}"
        )
    if FUSED not in outputs:
        raise ModelOutputError(
            f"a model must return the fused logits under 'fused'; received the keys {sorted(outputs)}"
        )
    if len(modalities_of(outputs)) < 2:
        raise ModelOutputError(
            "balance is measured between modalities: a model must return the logits of at least two beside "
            f"'fused'; received the keys {sorted(outputs)}"
        )
    shapes = {name: tuple(value.shape) for name, value in outputs.items()}
    if len(set(shapes.values())) > 1 or len(shapes[FUSED]) != 2 or shapes[FUSED][0] != len(labels):
        raise ModelOutputError(
            f"all logits must have the same shape (B, C) with B = {len(labels)} rows of the batch; received {shapes}. "
            "Features and other extras do not belong into the outputs"
        )


def per_row_loss(
    outputs: Outputs, labels: Tensor, *, fused_weight: float = 0.1, unimodal_weight: float = 0.9
) -> Tensor:
    """Training loss and information of each row: w_f CE(fused, y) + w_u sum_m CE(m, y).

    Args:
        outputs: logits (B, C) of each modality and `fused`.
        labels: (B,) int64 classes in 0..C-1.
        fused_weight: w_f; released code: 0.1 for CREMA-D, 1 for its other data sets.
        unimodal_weight: w_u; released code: 0.9 for CREMA-D, 1 for its other data sets.

    Returns:
        (B,) with gradients; its mean over a global batch is the training loss.
    """
    labels = labels.long()  # shards hold int64; a user's own batches may not
    fused = F.cross_entropy(outputs[FUSED], labels, reduction="none")
    unimodal = [F.cross_entropy(outputs[name], labels, reduction="none") for name in modalities_of(outputs)]
    return fused_weight * fused + unimodal_weight * torch.stack(unimodal).sum(0)


def prediction_similarity(outputs: Outputs) -> Tensor:
    """Mean over pairs of modalities of cos(softmax z_m, softmax z_n): (B,) in [0, 1]."""
    predictions = [outputs[name].softmax(dim=-1) for name in modalities_of(outputs)]
    pairs = [F.cosine_similarity(a, b, dim=-1) for a, b in itertools.combinations(predictions, 2)]
    return torch.stack(pairs).mean(0)


# Choices of the two axes of the paper's appendix, by name.
SIMILARITIES: dict[str, Callable[[Outputs], Tensor]] = {"prediction": prediction_similarity}
INFORMATIONS: dict[str, Callable[..., Tensor]] = {"loss": per_row_loss}


@dataclass(frozen=True, kw_only=True)
class Measurer:
    """Measures the balance of rows from a model's outputs.

    Args:
        similarity: how agreement between modalities is measured: `prediction`.
        information: how much a row has left to teach: `loss`.
        fused_weight: w_f of the loss (see `per_row_loss`).
        unimodal_weight: w_u of the loss.

    Raises:
        ConfigError: an unknown criterion (with the nearest name), or an impossible weight.
    """

    similarity: str = "prediction"
    information: str = "loss"
    fused_weight: float = 0.1
    unimodal_weight: float = 0.9

    def __post_init__(self) -> None:
        if self.similarity not in SIMILARITIES:
            raise ConfigError(f"unknown similarity {self.similarity!r}; {nearest(self.similarity, SIMILARITIES)}")
        if self.information not in INFORMATIONS:
            raise ConfigError(f"unknown information {self.information!r}; {nearest(self.information, INFORMATIONS)}")
        weights = (self.fused_weight, self.unimodal_weight)
        if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
            raise ConfigError(
                "fused_weight and unimodal_weight must be finite, not negative and not both 0; "
                f"received {self.fused_weight} and {self.unimodal_weight}"
            )

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """`per_row_loss` with this measurer's weights: (B,) with gradients."""
        return per_row_loss(outputs, labels, fused_weight=self.fused_weight, unimodal_weight=self.unimodal_weight)

    @torch.no_grad()
    def measure(self, outputs: Outputs, labels: Tensor) -> Measures:
        """Similarity and information of each row of a batch.

        Args:
            outputs: logits (B, C) of each modality and `fused`, of any floating dtype.
            labels: (B,) int64 classes in 0..C-1.

        Returns:
            Two float32 tensors (B,) on the outputs' device, without gradients.

        Raises:
            ModelOutputError: the outputs break the contract (see `check_outputs`).
            DataError: the labels are not integers.
        """
        check_outputs(outputs, labels)
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise DataError(f"labels must be integer classes 0..C-1; received dtype {labels.dtype}")
        # Half precision is fine for the forward pass; a cosine or a loss of it is not.
        outputs = {name: logits.float() for name, logits in outputs.items()}
        information = INFORMATIONS[self.information](
            outputs, labels, fused_weight=self.fused_weight, unimodal_weight=self.unimodal_weight
        )
        return Measures(SIMILARITIES[self.similarity](outputs), information)
