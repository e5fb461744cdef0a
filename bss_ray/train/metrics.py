"""Metrics of every head over all ranks: fused, each modality, and the modalities' heads together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAveragePrecision,
    MulticlassF1Score,
    MultilabelAccuracy,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

from bss_ray.data.columns import Task
from bss_ray.measure.forward import autocast, evaluating
from bss_ray.measure.observation import Outputs
from bss_ray.names import FUSED, presence_column
from bss_ray.train.metric_names import joint_head

# Label of a row that does not count. If such rows were left out, a batch could be empty, which torchmetrics'
# classification refuses, and a rank without any row could not join the states of the other ranks.
_IGNORED = -1


class HeadMetrics:
    """Metrics of each head, by the kind of labels.

    - multiclass: accuracy, mean average precision and macro F1;
    - multilabel: the same over classes, accuracy over all rows and classes (threshold 0.5);
    - regression: R² (mean over the D numbers), mean absolute and root mean squared error.

    A row that lacks a modality does not count for the modality's head, and the modality does not enter the row's sum or
    mean. torchmetrics sums (or joins) states over the ranks if there is a process group, so every rank computes the
    same figures over all rows.

    Args:
        modalities: Names of the modalities.
        num_classes: Number of classes C, or D numbers of a regression.
        device: Device of the predictions.
        task: Kind of the labels.
    """

    def __init__(
        self, modalities: Sequence[str], num_classes: int, device: torch.device, task: Task = "multiclass"
    ) -> None:
        self._modalities = list(modalities)
        self._task = task
        metrics = MetricCollection(_metrics(task, num_classes))
        self._heads = {name: metrics.clone().to(device) for name in (FUSED, *modalities, joint_head(task))}

    def update(self, outputs: Outputs, labels: Tensor, batch: Mapping[str, Tensor] | None = None) -> None:
        """Count one batch.

        Args:
            outputs: Outputs of the model; features among them are ignored.
            labels: Labels of the rows.
            batch: Batch whose `has_<modality>` columns say which rows lack which modality; None: no row lacks one.
        """
        present = {name: (batch or {}).get(presence_column(name)) for name in self._modalities}
        logits = {name: outputs[name].float() for name in (FUSED, *self._modalities)}
        logits[joint_head(self._task)] = self._join(logits, present)
        for name, metrics in self._heads.items():
            self._count(metrics, logits[name], labels, present.get(name))

    def compute(self, prefix: str) -> dict[str, float]:
        """`{prefix}_{metric}_{head}` of all batches since the last call; then the states are reset."""
        figures = {}
        for head, metrics in self._heads.items():
            for metric, value in metrics.compute().items():
                figures[f"{prefix}_{metric}_{head}"] = float(value)
            metrics.reset()
        return figures

    def _join(self, logits: Mapping[str, Tensor], present: Mapping[str, Tensor | None]) -> Tensor:
        """(B, C) sum of the logits, or mean of the values, of the modalities that each row has."""
        there = [_column(present[name], logits[name]) for name in self._modalities]
        total = torch.stack([logits[name] * mask for name, mask in zip(self._modalities, there, strict=True)]).sum(0)
        return total / torch.stack(there).sum(0) if self._task == "regression" else total

    def _count(self, metrics: MetricCollection, logits: Tensor, labels: Tensor, present: Tensor | None) -> None:
        """Count the present rows (B,) of one head."""
        if self._task == "regression":
            # Float64, because R² computes the variance of the labels from the difference of two sums.
            values, truth = logits.double(), labels.double().reshape(logits.shape)
            metrics.update(*((values, truth) if present is None else (values[present], truth[present])))
            return
        truth = labels.long()
        if present is not None:
            truth = torch.where(present.reshape(-1, *[1] * (labels.ndim - 1)), truth, _IGNORED)
        metrics.update(logits.softmax(-1) if self._task == "multiclass" else logits.sigmoid(), truth)


def _column(present: Tensor | None, logits: Tensor) -> Tensor:
    """(B, 1) 1 for the present rows, in the logits' dtype."""
    return torch.ones_like(logits[:, :1]) if present is None else present.unsqueeze(-1).to(logits.dtype)


def _metrics(task: Task, width: int) -> dict[str, Metric | MetricCollection]:
    """torchmetrics' classes for a task, by this project's names."""
    if task == "regression":
        return {"r2": _R2(), "mae": MeanAbsoluteError(), "rmse": MeanSquaredError(squared=False)}
    if task == "multilabel":
        return {
            "accuracy": MultilabelAccuracy(width, average="micro", ignore_index=_IGNORED),
            "map": MultilabelAveragePrecision(width, average="macro", ignore_index=_IGNORED),
            "f1": MultilabelF1Score(width, average="macro", ignore_index=_IGNORED),
        }
    return {
        "accuracy": MulticlassAccuracy(width, average="micro", ignore_index=_IGNORED),
        "map": MulticlassAveragePrecision(width, average="macro", ignore_index=_IGNORED),
        "f1": MulticlassF1Score(width, average="macro", ignore_index=_IGNORED),
    }


class _R2(R2Score):
    """R², which is NaN for fewer than two rows (torchmetrics raises an error), as few rows may have a modality."""

    def compute(self) -> Tensor:
        return super().compute() if self.total >= 2 else torch.tensor(float("nan"))


def evaluate(
    model: nn.Module,
    batches: Iterable[dict[str, Tensor]],
    metrics: HeadMetrics,
    *,
    label: str,
    prefix: str,
    device: torch.device,
    precision: str = "fp32",
) -> dict[str, float]:
    """Metrics of `model` over batches, in eval mode.

    Args:
        model: Model without the DDP wrapper, because ranks may have different numbers of batches.
        batches: This rank's share of the rows.
        metrics: Metrics that count and compute over all ranks.
        label: Name of the label column.
        prefix: Prefix of the metrics' names, e.g. `val`.
        device: Device of model and batches.
        precision: Precision: `fp32`, `bf16` or `fp16`.
    """
    with evaluating(model), autocast(device, precision):
        for batch in batches:
            metrics.update(model(batch), batch[label], batch)
    return metrics.compute(prefix)
