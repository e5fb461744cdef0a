"""What criteria can know about the rows of a batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from bss_ray.errors import ModelOutputError
from bss_ray.names import FEATURES, FUSED, presence_column

# `{modality: logits (B, C), ..., "fused": logits (B, C)}`, and optionally `"features": {head: (B, D)}`.
Outputs = Mapping[str, Any]
RowLoss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) cross entropy of logits (B, C) and classes (B,)."""
    return F.cross_entropy(logits, labels.long(), reduction="none")  # a user's own batches may hold other integer types


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) mean over classes of the binary cross entropy of logits (B, C) and 0/1 labels (B, C), or (B,) for C = 1."""
    labels = labels.to(logits.dtype).reshape(logits.shape)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)


def squared_error(values: Tensor, labels: Tensor) -> Tensor:
    """(B,) mean squared error of values (B, D) and labels (B, D), or (B,) for D = 1."""
    return (values - labels.to(values.dtype).reshape(values.shape)).square().mean(-1)


@dataclass(frozen=True)
class TaskKind:
    """The meaning of a kind of labels for a head.

    Attributes:
        loss: Loss per row, from the logits of one head and the labels.
        predict: Function from logits to the head's predictions.
        integers: Whether labels are integers.
    """

    loss: RowLoss
    predict: Callable[[Tensor], Tensor]
    integers: bool


TASKS: dict[str, TaskKind] = {
    "multiclass": TaskKind(cross_entropy, lambda logits: logits.softmax(dim=-1), integers=True),
    "multilabel": TaskKind(binary_cross_entropy, torch.sigmoid, integers=False),
    "regression": TaskKind(squared_error, lambda values: values, integers=False),
}


def modalities_of(outputs: Outputs) -> list[str]:
    """Names of the modalities in a model's outputs, in the model's order."""
    return [name for name in outputs if name not in (FUSED, FEATURES)]


class _WhenAsked(Mapping[str, Tensor]):
    """The results of a function of each head's logits, computed once, when they are requested."""

    def __init__(self, logits: Mapping[str, Tensor], make: Callable[[Tensor], Tensor]) -> None:
        self._logits, self._make = logits, make
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, head: str) -> Tensor:
        if head not in self._made:
            self._made[head] = self._make(self._logits[head])
        return self._made[head]

    def __iter__(self) -> Iterator[str]:
        return iter(self._logits)

    def __len__(self) -> int:
        return len(self._logits)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """The rows of a batch as a model sees them. Criteria map an observation to one number for each row.

    Attributes:
        outputs: Logits (B, C) of each modality and `fused`, float32.
        labels: Labels of the rows.
        features: Inputs of the heads, `{head: (B, D)}`; None if the model returns none.
        task: Kind of the labels.
        head_loss: Loss per row, from the logits of one head and the labels.
        fused_weight: Weight w_f of the fused loss.
        unimodal_weight: Weight w_u of each unimodal loss.
        batch: All columns of the batch, which say which modalities a row has. None: rows have all modalities.
        model: The model, for criteria that need it; else None.
    """

    outputs: Mapping[str, Tensor]
    labels: Tensor
    features: Mapping[str, Tensor] | None
    task: str
    head_loss: RowLoss
    fused_weight: float
    unimodal_weight: float
    batch: Mapping[str, Tensor] | None = None
    model: nn.Module | None = None

    @cached_property
    def modalities(self) -> list[str]:
        """Names of the modalities, in the model's order."""
        return modalities_of(self.outputs)

    @cached_property
    def predictions(self) -> Mapping[str, Tensor]:
        """Predictions (B, C) of each head: probabilities, or the values of a regression; computed when requested."""
        return _WhenAsked(self.outputs, TASKS[self.task].predict)

    @cached_property
    def present(self) -> Tensor | None:
        """(M, B) true if the row has the modality; None if all rows have all modalities."""
        columns = [(self.batch or {}).get(presence_column(name)) for name in self.modalities]
        if all(column is None for column in columns):
            return None
        everywhere = torch.ones(len(self.labels), dtype=torch.bool, device=self.labels.device)
        return torch.stack([everywhere if column is None else column.bool() for column in columns])

    @property
    def unpaired(self) -> Tensor | None:
        """(B,) true if the row has fewer than two modalities; None if all rows have all modalities."""
        return None if self.present is None else self.present.sum(0) < 2

    @cached_property
    def head_losses(self) -> dict[str, Tensor]:
        """(B,) loss of each head; without meaning if the row lacks the modality."""
        return {name: self.head_loss(self._logits_there(name), self.labels) for name in self.outputs}

    def _logits_there(self, head: str) -> Tensor:
        """(B, C) logits of a head, 0 if the row lacks the modality.

        The loss of such a row has weight 0, but 0 times the gradient of a NaN would still be NaN.
        """
        logits = self.outputs[head]
        if self.present is None or head == FUSED:
            return logits
        return torch.where(self.present[self.modalities.index(head)].unsqueeze(-1), logits, 0)

    @property
    def loss(self) -> Tensor:
        """(B,) w_f loss(fused) + w_u sum_m loss(m); see `over_modalities` for rows that lack a modality."""
        unimodal = self.over_modalities([self.head_losses[name] for name in self.modalities])
        return self.fused_weight * self.head_losses[FUSED] + self.unimodal_weight * unimodal

    def over_modalities(self, values: list[Tensor]) -> Tensor:
        """(B,) sum over modalities of values (B,).

        For a row that lacks modalities: M times the mean over the modalities it has, so that rows stay comparable.
        """
        stacked = torch.stack(values)
        if self.present is None:
            return stacked.sum(0)
        return torch.where(self.present, stacked, 0).sum(0) * (len(values) / self.present.sum(0).clamp(min=1))

    def over_pairs(self, compare: Callable[[Tensor, Tensor], Tensor], values: Mapping[str, Tensor]) -> Tensor:
        """(B,) mean over pairs of modalities of `compare(a, b)`, values (B, ...) in and (B,) out.

        Only pairs of modalities that the row has count; a row without such a pair gets NaN.
        """
        names = list(itertools.combinations(range(len(self.modalities)), 2))
        each = torch.stack([compare(*(values[self.modalities[m]] for m in pair)) for pair in names])
        if self.present is None:
            return each.mean(0)
        both = torch.stack([self.present[m] & self.present[n] for m, n in names])
        return torch.where(both, each, 0).sum(0) / both.sum(0)

    def feature_of(self, head: str) -> Tensor:
        """(B, D) input of a head, float32.

        Raises:
            ModelOutputError: The model returns no features.
        """
        if self.features is None or head not in self.features:
            found = "no 'features'" if self.features is None else f"features of {sorted(self.features)}"
            raise ModelOutputError(
                f"this criterion needs the features of {head!r}: the model must return outputs['features'] = "
                f"{{modality: (B, D), ..., 'fused': (B, D)}}, the inputs of its heads; it returns {found}"
            )
        return self.features[head].float().flatten(1)


def check_outputs(outputs: Outputs, labels: Tensor) -> None:
    """Check the contract between a model and this package: shapes, not values.

    Raises:
        ModelOutputError: The outputs are no mapping, have no `fused`, fewer than two modalities, or unequal shapes, or
            the features are no mapping.
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
            "balance is measured between modalities: a model must return the logits of at least two in addition to "
            f"'fused'; received the keys {sorted(outputs)}"
        )
    features = outputs.get(FEATURES)
    if features is not None and not isinstance(features, Mapping):
        raise ModelOutputError(
            f"what a model returns under 'features' must be a dict {{head: (B, D)}}; received {type(features).__name__}"
        )
    shapes = {name: _shape(outputs[name]) for name in (*modalities_of(outputs), FUSED)}
    if len(set(shapes.values())) > 1 or len(shapes[FUSED]) != 2 or shapes[FUSED][0] != len(labels):
        raise ModelOutputError(
            f"all logits must have the same shape (B, C) with B = {len(labels)} rows of the batch; received {shapes}. "
            "Features belong under 'features', other extras not into the outputs"
        )


def _shape(values: object) -> tuple[int, ...] | str:
    return tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__


def check_batch_labels(labels: Tensor, logits: Tensor, task: str) -> None:
    """Check that labels are of the task's kind.

    Raises:
        ModelOutputError: The shape of the labels does not fit the shape of the logits.
    """
    if task == "multiclass":
        fits = labels.ndim == 1
    else:
        fits = labels.shape == logits.shape or (labels.ndim == 1 and logits.shape[1] == 1)
    if not fits:
        expected = "(B,)" if task == "multiclass" else "(B, C) like the logits"
        raise ModelOutputError(
            f"labels of a {task} task have the shape {expected}; received labels {tuple(labels.shape)} and logits "
            f"{tuple(logits.shape)}"
        )
