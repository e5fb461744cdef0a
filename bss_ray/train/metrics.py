"""Metrics of every head over all ranks: fused, each modality, and the sum of the heads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAveragePrecision, MulticlassF1Score

from bss_ray.measure.criteria import FUSED, Outputs
from bss_ray.measure.forward import autocast, evaluating

# The prediction from the sum of the modalities' logits: what the heads know without the fused one.
SUM = "sum"


METRICS = ("accuracy", "map", "f1")


def metric_names(prefix: str, modalities: Sequence[str]) -> list[str]:
    """All names that `HeadMetrics.compute(prefix)` returns."""
    return [f"{prefix}_{metric}_{head}" for metric in METRICS for head in (FUSED, *modalities, SUM)]


class HeadMetrics:
    """Accuracy, mean average precision and macro F1 of each head.

    States are summed (or joined) over the ranks by torchmetrics when a process group is there, so
    every rank computes the same figures over all rows.

    Args:
        modalities: names of the modalities.
        num_classes: C.
        device: where predictions lie.
    """

    def __init__(self, modalities: Sequence[str], num_classes: int, device: torch.device) -> None:
        self._modalities = list(modalities)
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro"),
                "map": MulticlassAveragePrecision(num_classes, average="macro"),
                "f1": MulticlassF1Score(num_classes, average="macro"),
            }
        )
        self._heads = {name: metrics.clone().to(device) for name in (FUSED, *modalities, SUM)}

    def update(self, outputs: Outputs, labels: Tensor) -> None:
        """Count one batch."""
        logits = {name: values.float() for name, values in outputs.items()}
        logits[SUM] = torch.stack([logits[name] for name in self._modalities]).sum(0)
        for name, metrics in self._heads.items():
            metrics.update(logits[name].softmax(-1), labels)

    def compute(self, prefix: str) -> dict[str, float]:
        """`{prefix}_{metric}_{head}` of all batches since the last call; then start over."""
        figures = {}
        for head, metrics in self._heads.items():
            for metric, value in metrics.compute().items():
                figures[f"{prefix}_{metric}_{head}"] = float(value)
            metrics.reset()
        return figures


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
        model: not wrapped by DDP: ranks may have different numbers of batches.
        batches: this rank's share of the rows.
        metrics: counts and computes over all ranks.
        label: name of the label column.
        prefix: of the metrics' names, e.g. `val`.
        device: where model and batches are.
        precision: `fp32`, `bf16` or `fp16`.
    """
    with evaluating(model), autocast(device, precision):
        for batch in batches:
            metrics.update(model(batch), batch[label])
    return metrics.compute(prefix)
