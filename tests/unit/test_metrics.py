"""Metrics of each head, by the kind of labels, against formulas written out here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.metrics import average_precision_score, f1_score, r2_score
from torch import Tensor

from bss_ray.data.columns import TASKS, Columns
from bss_ray.errors import ConfigError
from bss_ray.testing.processes import in_another_process
from bss_ray.train.metric_names import default_metric, is_error, metric_names
from bss_ray.train.metrics import HeadMetrics
from bss_ray.train.run import _choose, check_choice

CPU = torch.device("cpu")
ROWS, WIDTH = 60, 3
NAMES = ("audio", "image")
HALF = torch.arange(ROWS) >= ROWS // 2


def make_outputs() -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)
    heads = {name: torch.randn(ROWS, WIDTH, generator=random) for name in ("fused", *NAMES)}
    return {**heads, "features": {name: torch.zeros(ROWS, 4) for name in heads}}


def make_labels(task: str) -> Tensor:
    random = torch.Generator().manual_seed(1)
    if task == "multiclass":
        return torch.randint(0, WIDTH, (ROWS,), generator=random)
    if task == "multilabel":
        return torch.randint(0, 2, (ROWS, WIDTH), generator=random, dtype=torch.uint8)
    return 1990 + torch.randn(ROWS, WIDTH, generator=random)


def figures_of(task: Any, outputs: Mapping[str, Any], labels: Tensor, batch: dict[str, Tensor]) -> dict[str, float]:
    """All rows, in batches of 20."""
    metrics = HeadMetrics(NAMES, WIDTH, CPU, task)
    for start in range(0, ROWS, 20):
        rows = slice(start, start + 20)
        heads = {name: values[rows] for name, values in outputs.items() if name != "features"}
        metrics.update({**heads, "features": {}}, labels[rows], {name: values[rows] for name, values in batch.items()})
    figures = metrics.compute("val")
    assert sorted(figures) == sorted(metric_names("val", NAMES, task))
    return figures


def expected(task: str, values: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of one head."""
    if task == "regression":
        errors = values.astype(np.float64) - labels
        return {
            "r2": float(r2_score(labels, values)),
            "mae": float(np.abs(errors).mean()),
            "rmse": math.sqrt((errors**2).mean()),
        }
    if task == "multilabel":
        shares, guess = expit(values), values > 0
        accuracy, average = (guess == labels).mean(), "macro"
        precision = average_precision_score(labels, shares, average="macro")
    else:
        guess, average = values.argmax(1), "macro"
        accuracy = (guess == labels).mean()
        shares = np.exp(values) / np.exp(values).sum(1, keepdims=True)
        precision = average_precision_score(np.eye(WIDTH)[labels], shares, average="macro")
    return {
        "accuracy": float(accuracy),
        "map": float(precision),
        "f1": float(f1_score(labels, guess, average=average)),
    }


@pytest.mark.parametrize("task", TASKS)
def test_every_head_and_all_of_them_together(task: str) -> None:
    outputs, labels = make_outputs(), make_labels(task)
    if task == "regression":
        outputs = {name: values + 1990 if name != "features" else values for name, values in outputs.items()}
    figures = figures_of(task, outputs, labels, {})
    both = outputs["audio"] + outputs["image"]
    heads = {name: outputs[name] for name in ("fused", *NAMES)}
    heads |= {"mean": both / 2} if task == "regression" else {"sum": both}
    for head, values in heads.items():
        for metric, value in expected(task, values.numpy(), labels.numpy()).items():
            assert figures[f"val_{metric}_{head}"] == pytest.approx(value, rel=1e-4), (metric, head)


@pytest.mark.parametrize("task", TASKS)
def test_rows_that_lack_a_modality_do_not_count_for_its_head(task: str) -> None:
    outputs, labels = make_outputs(), make_labels(task)
    there = torch.arange(ROWS) % 3 != 1
    there[20:40] = False  # a whole batch
    figures = figures_of(task, outputs, labels, {"has_audio": there})
    joint = torch.where(there[:, None], outputs["audio"], 0) + outputs["image"]
    if task == "regression":
        joint = joint / (1 + there[:, None].float())
    cases = {
        "audio": (outputs["audio"][there], labels[there]),
        "image": (outputs["image"], labels),
        "fused": (outputs["fused"], labels),
        "mean" if task == "regression" else "sum": (joint, labels),
    }
    for head, (values, truth) in cases.items():
        for metric, value in expected(task, values.numpy(), truth.numpy()).items():
            assert figures[f"val_{metric}_{head}"] == pytest.approx(value, rel=1e-4), (metric, head)


def _rank(rank: int, folder: Path) -> list[dict[str, float]]:
    """One of two ranks, each with half of the rows: figures of every task. Rank 0 has no row with audio."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    figures = []
    for task in TASKS:
        metrics = HeadMetrics(NAMES, WIDTH, CPU, task)
        outputs = {name: values[rows] for name, values in make_outputs().items() if name != "features"}
        metrics.update(outputs, make_labels(task)[rows], {"has_audio": HALF[rows]})
        figures.append(metrics.compute("val"))
    return figures


def test_a_rank_without_a_modality_joins_the_others(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as threads:
        ranks = list(threads.map(lambda rank: in_another_process(_rank, rank, tmp_path), range(2)))
    assert ranks[0] == ranks[1]
    for task, figures in zip(TASKS, ranks[0], strict=True):
        alone = figures_of(task, make_outputs(), make_labels(task), {"has_audio": HALF})
        assert figures == pytest.approx(alone, rel=1e-4), task


def test_numbers_of_one_column() -> None:
    """Labels (B,) of a regression are one value of the outputs (B, 1); too few rows have no R²."""
    metrics = HeadMetrics(NAMES, 1, CPU, "regression")
    labels = torch.arange(6.0)
    outputs = {name: labels.unsqueeze(1) + shift for name, shift in (("fused", 0.5), ("audio", 1.0), ("image", -2.0))}
    metrics.update(outputs, labels, {"has_image": labels == 3})
    figures = metrics.compute("test")
    assert figures["test_mae_fused"] == pytest.approx(0.5)
    assert figures["test_r2_audio"] == pytest.approx(1 - 6 / 17.5)
    assert figures["test_rmse_image"] == pytest.approx(2)
    assert math.isnan(figures["test_r2_image"])


def test_the_metric_to_choose_by() -> None:
    numbers = Columns(modalities=NAMES, task="regression")
    assert check_choice(None, Columns(modalities=NAMES)) == default_metric("val") == "val_accuracy_fused"
    assert check_choice(None, Columns(modalities=NAMES, task="multilabel")) == "val_accuracy_fused"
    assert check_choice(None, numbers) == "val_r2_fused"
    assert check_choice("val_mae_mean", numbers) == "val_mae_mean"
    with pytest.raises(ConfigError, match="choose_by='val_accuracy_fused' is no validation metric"):
        check_choice("val_accuracy_fused", numbers)
    assert [name for name in metric_names("val", ("mae_a", "b"), "regression") if is_error(name)] == [
        f"val_{metric}_{head}" for metric in ("mae", "rmse") for head in ("fused", "mae_a", "b", "mean")
    ]


def test_the_best_epoch_has_the_lowest_error() -> None:
    rows = [
        {"epoch": epoch, "val_mae_fused": error, "val_r2_fused": score}
        for epoch, (error, score) in enumerate([(3.0, 0.1), (1.0, 0.2), (1.0, 0.9), (2.0, 0.9)])
    ]
    saved = [(f"epoch {row['epoch']}", row) for row in rows]
    outcome: Any = SimpleNamespace(checkpoint="last", metrics={"epoch": 9}, best_checkpoints=saved)
    assert _choose(outcome, "val_mae_fused")[0] == "epoch 1"
    assert _choose(outcome, "val_r2_fused")[0] == "epoch 2"
    assert _choose(outcome, "val_rmse_fused") == ("last", {"epoch": 9})
