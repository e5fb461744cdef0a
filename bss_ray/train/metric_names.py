"""Names of the validation and test metrics, and which way they improve.

Apart from the metrics themselves, because commands need the names before anything runs, and torchmetrics imports SciPy
where it is installed: a second and more.
"""

from __future__ import annotations

from collections.abc import Sequence

from bss_ray.data.columns import Task
from bss_ray.names import FUSED

# Prediction of the modalities' heads without the fused head: the sum of their logits, or the mean of their values.
SUM, MEAN = "sum", "mean"

METRICS: dict[Task, tuple[str, ...]] = {
    "multiclass": ("accuracy", "map", "f1"),
    "multilabel": ("accuracy", "map", "f1"),
    "regression": ("r2", "mae", "rmse"),
}

# Metrics whose smaller values are better.
_ERRORS = ("mae", "rmse")


def metric_names(prefix: str, modalities: Sequence[str], task: Task = "multiclass") -> list[str]:
    """All names that `HeadMetrics.compute(prefix)` returns."""
    return [f"{prefix}_{metric}_{head}" for metric in METRICS[task] for head in (FUSED, *modalities, joint_head(task))]


def default_metric(prefix: str, task: Task = "multiclass") -> str:
    """The default metric of a task: accuracy of the fused head, or its R²."""
    return f"{prefix}_{METRICS[task][0]}_{FUSED}"


def is_error(name: str) -> bool:
    """Whether lower values of a metric of `metric_names` are better."""
    return name.split("_")[1] in _ERRORS


def joint_head(task: Task) -> str:
    """Name of the modalities' heads together."""
    return MEAN if task == "regression" else SUM
