"""Criteria of balance: each against the formula written out a row at a time, in NumPy or by plain autograd."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from bss_ray.errors import ConfigError, DataError, ModelOutputError
from bss_ray.measure import criteria
from bss_ray.measure.criteria import register_information, register_similarity
from bss_ray.measure.forward import evaluating
from bss_ray.measure.measurer import Measurer
from bss_ray.measure.observation import Observation
from bss_ray.models import LateFusion
from bss_ray.testing.processes import in_another_process

NAMES = ("audio", "image", "text")
ROWS, CLASSES, WIDTH = 9, 4, 6
WEIGHTS = [(0.1, 0.9), (1.0, 1.0), (0.0, 2.0), (0.7, 0.0)]

Arrays = dict[str, np.ndarray]

# ---- the formulas, for one row, in float64 -------------------------------------------------------


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (math.sqrt(a @ a) * math.sqrt(b @ b)))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return np.asarray(powers / powers.sum())


def predicted(logits: np.ndarray, task: str) -> np.ndarray:
    if task == "multiclass":
        return softmax(logits)
    return 1 / (1 + np.exp(-logits)) if task == "multilabel" else logits


def loss_of(logits: np.ndarray, label: np.ndarray, task: str) -> float:
    if task == "multiclass":
        return -math.log(softmax(logits)[int(label)])
    label = label.astype(float).reshape(logits.shape)
    if task == "regression":
        return float(((logits - label) ** 2).mean())
    p = predicted(logits, task)
    return float(-(label * np.log(p) + (1 - label) * np.log(1 - p)).mean())


def gradient_of(logits: np.ndarray, label: np.ndarray, task: str) -> np.ndarray:
    """Of the loss by the logits."""
    if task == "multiclass":
        return softmax(logits) - (np.arange(len(logits)) == int(label))
    label = label.astype(float).reshape(logits.shape)
    if task == "regression":
        return 2 * (logits - label) / len(logits)
    return (predicted(logits, task) - label) / len(logits)


def agreement(vectors: Sequence[np.ndarray], compare: Callable[[np.ndarray, np.ndarray], float]) -> float:
    """Mean over pairs; NaN without any."""
    pairs = [compare(a, b) for a, b in itertools.combinations(vectors, 2)]
    return sum(pairs) / len(pairs) if pairs else math.nan


class Reference:
    """All criteria of a batch, row by row.

    Args:
        outputs: logits (B, C) of each head.
        features: inputs (B, D) of each head.
        labels: of the rows.
        present: (B,) of each modality that some row lacks.
    """

    def __init__(
        self,
        outputs: Arrays,
        features: Arrays,
        labels: np.ndarray,
        *,
        task: str = "multiclass",
        weights: tuple[float, float] = (0.1, 0.9),
        present: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        self.outputs = {name: values.astype(float) for name, values in outputs.items()}
        self.features = {name: values.astype(float) for name, values in features.items()}
        self.labels, self.task, self.weights, self.present = labels, task, weights, present or {}
        self.names = [name for name in outputs if name != "fused"]

    def has(self, row: int) -> list[str]:
        return [name for name in self.names if name not in self.present or self.present[name][row]]

    def of_rows(self, value: Callable[[int], float]) -> np.ndarray:
        return np.array([value(row) for row in range(len(self.labels))])

    def prediction(self, row: int) -> float:
        vectors = [predicted(self.outputs[name][row], self.task) for name in self.has(row)]
        if self.task == "regression":
            return agreement(vectors, lambda a, b: 1 / (1 + float(((a - b) ** 2).mean())))
        return agreement(vectors, cosine)

    def feature(self, row: int) -> float:
        return agreement([self.features[name][row] for name in self.has(row)], cosine)

    def loss(self, row: int) -> float:
        each = {name: loss_of(values[row], self.labels[row], self.task) for name, values in self.outputs.items()}
        mine = [each[name] for name in self.has(row)]
        unimodal = len(self.names) * sum(mine) / len(mine) if mine else 0
        return self.weights[0] * each["fused"] + self.weights[1] * unimodal

    def gradient_norm(self, row: int) -> float:
        """Outer products of gradient and feature, and the gradient itself for the bias: no shortcuts."""
        here = self.has(row)
        factors = {name: self.weights[1] * len(self.names) / len(here) for name in here} | {"fused": self.weights[0]}
        total = 0.0
        for head, factor in factors.items():
            gradient = factor * gradient_of(self.outputs[head][row], self.labels[row], self.task)
            total += (np.outer(gradient, self.features[head][row]) ** 2).sum() + (gradient**2).sum()
        return math.sqrt(total)


def make_outputs(modalities: int, seed: int, *, rows: int = ROWS, classes: int = CLASSES) -> tuple[Arrays, Arrays]:
    """Logits and features of heads that have nothing to do with each other."""
    rng = np.random.default_rng(seed)
    heads = (*NAMES[:modalities], "fused")
    outputs = {name: rng.normal(0, 2, (rows, classes)).astype(np.float32) for name in heads}
    widths = {name: WIDTH * (modalities if name == "fused" else 1) for name in heads}
    return outputs, {name: rng.normal(0, 1, (rows, widths[name])).astype(np.float32) for name in heads}


def make_labels(task: str, dtype: Any, seed: int, classes: int = CLASSES, rows: int = ROWS) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if task == "multiclass":
        return rng.integers(0, classes, rows).astype(dtype)
    if task == "multilabel":
        return (rng.random((rows, classes)) < 0.4).astype(dtype)
    return rng.normal(0, 2, (rows, classes)).astype(dtype)


def tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values.copy()) for name, values in arrays.items()}


def as_outputs(outputs: Arrays, features: Arrays) -> dict[str, Any]:
    return {**tensors(outputs), "features": tensors(features)}


# ---- the four pairs ------------------------------------------------------------------------------


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("similarity", ["prediction", "feature"])
@pytest.mark.parametrize("information", ["loss", "gradient_norm"])
def test_all_pairs_of_criteria(
    modalities: int, weights: tuple[float, float], similarity: str, information: str
) -> None:
    outputs, features = make_outputs(modalities, seed=modalities)
    labels = make_labels("multiclass", np.int64, seed=1)
    measurer = Measurer(
        similarity=similarity, information=information, fused_weight=weights[0], unimodal_weight=weights[1]
    )
    found = measurer.measure(as_outputs(outputs, features), torch.from_numpy(labels))
    reference = Reference(outputs, features, labels, weights=weights)
    np.testing.assert_allclose(
        found.similarity.numpy(), reference.of_rows(getattr(reference, similarity)), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        found.information.numpy(), reference.of_rows(getattr(reference, information)), rtol=1e-5, atol=1e-6
    )
    assert found.similarity.dtype == found.information.dtype == torch.float32
    assert not found.similarity.requires_grad
    assert not found.information.requires_grad


def test_features_of_more_than_two_dimensions_are_one_vector() -> None:
    outputs, features = make_outputs(2, seed=5)
    labels = torch.from_numpy(make_labels("multiclass", np.int64, seed=5))
    measurer = Measurer(similarity="feature", information="gradient_norm")
    flat = measurer.measure(as_outputs(outputs, features), labels)
    maps = {name: values.reshape(ROWS, 2, 3, -1) for name, values in features.items()}
    again = measurer.measure(as_outputs(outputs, maps), labels)
    assert torch.equal(flat.similarity, again.similarity)
    assert torch.equal(flat.information, again.information)


class TestFeaturesAreMissing:
    def measure(self, features: Any, **settings: str) -> None:
        outputs, _ = make_outputs(2, seed=0)
        given = {**tensors(outputs)} if features is None else {**tensors(outputs), "features": features}
        Measurer(**settings).measure(given, torch.zeros(ROWS, dtype=torch.int64))  # type: ignore[arg-type]

    def test_no_features(self) -> None:
        with pytest.raises(
            ModelOutputError,
            match=r"features of 'audio': the model must return outputs\['features'\].*it returns no 'features'",
        ):
            self.measure(None, similarity="feature")

    def test_not_of_all_heads(self) -> None:
        features = {name: torch.ones(ROWS, WIDTH) for name in ("audio", "image")}
        self.measure(features, similarity="feature")  # that of modalities needs no fused ones
        with pytest.raises(ModelOutputError, match=r"features of 'fused'.*features of \['audio', 'image'\]"):
            self.measure(features, information="gradient_norm")

    def test_unequal_lengths(self) -> None:
        features = {"audio": torch.ones(ROWS, 5), "image": torch.ones(ROWS, 7), "fused": torch.ones(ROWS, 12)}
        with pytest.raises(ModelOutputError, match=r"one length; received \{'audio': 5, 'image': 7\}.*Project them"):
            self.measure(features, similarity="feature")
        self.measure(features, information="gradient_norm")  # each head by itself


# ---- gradient norms against autograd -------------------------------------------------------------

SHAPES = {"audio": (12, 7), "image": (3, 9, 9), "text": (5,)}  # maps, images and vectors


def make_model(modalities: int, seed: int) -> LateFusion:
    """Convolutions, batch norm with statistics of its own, and dropout."""
    torch.manual_seed(seed)
    model = LateFusion({name: SHAPES[name] for name in NAMES[:modalities]}, CLASSES, width=8, dropout=0.4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def make_batch(modalities: int, seed: int, rows: int = ROWS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = {name: torch.randn(rows, *SHAPES[name], generator=generator) for name in NAMES[:modalities]}
    batch["label"] = torch.randint(CLASSES, (rows,), generator=generator)
    batch["row_id"] = torch.arange(100, 100 + rows)
    return batch


def norms_by_autograd(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    batch: Mapping[str, Tensor],
    weights: tuple[float, float],
    head_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> list[float]:
    """Each row by itself: forward, backward, norm of all gradients."""
    norms = []
    for row in range(len(batch["label"])):
        one = {name: values[row : row + 1] for name, values in batch.items()}
        outputs = model(one)
        names = [name for name in outputs if name not in ("fused", "features")]
        here = [name for name in names if bool(one.get(f"has_{name}", torch.ones(1))[0])]
        loss = weights[0] * head_loss(outputs["fused"], one["label"])
        for name in here:
            loss = loss + weights[1] * len(names) / len(here) * head_loss(outputs[name], one["label"])
        gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
        norms.append(math.sqrt(sum(squares)))  # type: ignore[arg-type]
    return norms


def head_parameters(model: LateFusion) -> list[nn.Parameter]:
    return [*model.heads.parameters(), *model.fused.parameters()]


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_gradient_norm_is_that_of_all_heads(modalities: int, weights: tuple[float, float]) -> None:
    model, batch = make_model(modalities, seed=1), make_batch(modalities, seed=2)
    measurer = Measurer(information="gradient_norm", fused_weight=weights[0], unimodal_weight=weights[1])
    with evaluating(model):
        found = measurer.measure(model(batch), batch["label"], batch=batch)
    expected = norms_by_autograd(model, head_parameters(model), batch, weights)
    np.testing.assert_allclose(found.information.numpy(), expected, rtol=1e-4)
    assert min(expected) > 1e-3


def test_gradient_norm_of_rows_that_lack_modalities() -> None:
    model, batch = make_model(3, seed=3), make_batch(3, seed=4)
    batch |= presence_of(3)
    measurer = Measurer(information="gradient_norm", fused_weight=0.3, unimodal_weight=0.8)
    with evaluating(model):
        found = measurer.measure(model(batch), batch["label"], batch=batch)
    expected = norms_by_autograd(model, head_parameters(model), batch, (0.3, 0.8))
    np.testing.assert_allclose(found.information.numpy(), expected, rtol=1e-4)


class Convolutions(nn.Module):
    """Two modalities that share an encoder: convolution, batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.4), nn.Flatten(), nn.Linear(5 * 4 * 4, WIDTH)
        )
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, CLASSES) for name in ("audio", "image")})
        self.fused = nn.Linear(2 * WIDTH, CLASSES)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        features = {name: self.encoder(batch[name]) for name in self.heads}
        features["fused"] = torch.cat(list(features.values()), dim=-1)
        outputs = {name: head(features[name]) for name, head in self.heads.items()}
        return {**outputs, "fused": self.fused(features["fused"]), "features": features}


def make_images(seed: int) -> tuple[Convolutions, dict[str, Tensor]]:
    """A model in eval mode whose batch norm has statistics of its own, and a batch for it."""
    torch.manual_seed(seed)
    model = Convolutions().eval()
    model.encoder[1].running_mean.normal_(0, 0.3)
    model.encoder[1].running_var.uniform_(0.5, 2)
    batch = {name: torch.randn(ROWS, 3, 6, 6) for name in ("audio", "image")}
    return model, {**batch, "label": torch.randint(CLASSES, (ROWS,)), "row_id": torch.arange(ROWS)}


class TestFullGradientNorm:
    MEASURER = Measurer(information="full_gradient_norm", fused_weight=0.3, unimodal_weight=0.8)

    def expected(self, model: nn.Module, batch: Mapping[str, Tensor]) -> list[float]:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return norms_by_autograd(model, trained, batch, (0.3, 0.8))

    def found(self, model: nn.Module, batch: Mapping[str, Tensor]) -> np.ndarray:
        with evaluating(model):
            measures = self.MEASURER.measure(model(batch), batch["label"], batch=batch, model=model)
        return np.asarray(measures.information.numpy())

    def test_row_by_row(self) -> None:
        model, batch = make_images(seed=5)
        np.testing.assert_allclose(self.found(model, batch), self.expected(model, batch), rtol=1e-4)

    def test_frozen_parameters_do_not_count(self) -> None:
        model, batch = make_images(seed=5)
        whole = self.found(model, batch)
        model.encoder[0].requires_grad_(False)
        model.fused.bias.requires_grad_(False)
        frozen = self.found(model, batch)
        np.testing.assert_allclose(frozen, self.expected(model, batch), rtol=1e-4)
        assert (frozen < whole).all()
        for parameter in model.encoder.parameters():
            parameter.requires_grad_(False)
        model.fused.bias.requires_grad_(True)
        heads = Measurer(information="gradient_norm", fused_weight=0.3, unimodal_weight=0.8)
        with evaluating(model):
            by_heads = heads.measure(model(batch), batch["label"], batch=batch).information
        np.testing.assert_allclose(self.found(model, batch), by_heads.numpy(), rtol=1e-4)

    def test_the_default_model(self) -> None:
        model, batch = make_model(3, seed=7), make_batch(3, seed=8)
        np.testing.assert_allclose(self.found(model, batch), self.expected(model, batch), rtol=1e-4)

    def test_rows_that_lack_modalities(self) -> None:
        model, batch = make_images(seed=7)
        batch |= presence_of(2)
        np.testing.assert_allclose(self.found(model, batch), self.expected(model, batch), rtol=1e-4)

    def test_in_several_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, batch = make_images(seed=5)
        whole = self.found(model, batch)
        items = sum(parameter.numel() for parameter in model.parameters())
        monkeypatch.setattr(criteria, "_GRADIENT_ITEMS", 2 * items)  # 9 rows by twos
        np.testing.assert_allclose(self.found(model, batch), whole, rtol=1e-5)
        monkeypatch.setattr(criteria, "_GRADIENT_ITEMS", 1)
        np.testing.assert_allclose(self.found(model, batch), whole, rtol=1e-5)

    def test_the_model_stays_as_it_is(self) -> None:
        model, batch = make_images(seed=9)
        model.train()
        model.encoder[1].eval()
        model.heads["audio"].weight.grad = torch.full_like(model.heads["audio"].weight, 3.0)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        given = {name: values.clone() for name, values in batch.items()}
        found = self.found(model, batch)
        assert np.isfinite(found).all()
        assert [module.training for module in model.modules()] == modes
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad
            if name == "heads.audio.weight":
                assert parameter.grad is not None
                assert (parameter.grad == 3).all()
            else:
                assert parameter.grad is None
        for name, values in batch.items():
            assert torch.equal(values, given[name])
        assert torch.is_grad_enabled()

    def test_needs_the_model(self) -> None:
        assert self.MEASURER.needs_model
        assert not Measurer(similarity="feature", information="gradient_norm").needs_model
        batch = make_batch(2, seed=1)
        outputs = make_model(2, seed=1)(batch)
        with pytest.raises(ConfigError, match=r"information='full_gradient_norm' needs the model itself.*'actors' or"):
            self.MEASURER.measure(outputs, batch["label"], batch=batch)


# ---- kinds of labels -----------------------------------------------------------------------------


class TestKindsOfLabels:
    @pytest.mark.parametrize(
        ("task", "dtype", "classes"),
        [
            ("multiclass", np.int64, 4),
            ("multiclass", np.uint8, 4),
            ("multilabel", np.uint8, 4),
            ("multilabel", np.bool_, 4),
            ("multilabel", np.float32, 4),
            ("multilabel", np.int64, 1),
            ("regression", np.float32, 3),
            ("regression", np.float64, 1),
        ],
    )
    @pytest.mark.parametrize("information", ["loss", "gradient_norm"])
    def test_loss_similarity_and_gradients(self, task: str, dtype: Any, classes: int, information: str) -> None:
        outputs, features = make_outputs(3, seed=20, classes=classes)
        labels = make_labels(task, dtype, seed=21, classes=classes)
        measurer = Measurer(information=information, task=task, fused_weight=0.4, unimodal_weight=1.5)
        reference = Reference(outputs, features, labels, task=task, weights=(0.4, 1.5))
        found = measurer.measure(as_outputs(outputs, features), torch.from_numpy(labels))
        np.testing.assert_allclose(
            found.similarity.numpy(), reference.of_rows(reference.prediction), rtol=1e-5, atol=1e-6
        )
        expected = reference.of_rows(getattr(reference, information))
        np.testing.assert_allclose(found.information.numpy(), expected, rtol=2e-5, atol=1e-6)
        assert expected.std() > 0.05
        training = measurer.loss(as_outputs(outputs, features), torch.from_numpy(labels))
        np.testing.assert_allclose(training.numpy(), reference.of_rows(reference.loss), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("task", ["regression", "multilabel"])
    def test_one_number_a_row_may_come_without_a_column(self, task: str) -> None:
        outputs, features = make_outputs(2, seed=22, classes=1)
        labels = torch.from_numpy(make_labels(task, np.float32, seed=23, classes=1))
        for information in ("loss", "gradient_norm"):
            measurer = Measurer(task=task, information=information)
            column = measurer.measure(as_outputs(outputs, features), labels)
            flat = measurer.measure(as_outputs(outputs, features), labels[:, 0])
            assert torch.equal(column.information, flat.information)
            assert torch.equal(column.similarity, flat.similarity)

    def test_regressions_that_differ_agree_less(self) -> None:
        # A cosine of single numbers would be 1 for all of these.
        outputs = {"audio": torch.ones(3, 1), "image": torch.tensor([[1.0], [2.0], [4.0]]), "fused": torch.ones(3, 1)}
        found = Measurer(task="regression").measure(outputs, torch.zeros(3))
        assert found.similarity.tolist() == pytest.approx([1, 1 / 2, 1 / 10])

    def test_full_gradient_norm_of_a_regression(self) -> None:
        model, batch = make_images(seed=24)
        batch["label"] = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(26))
        measurer = Measurer(task="regression", information="full_gradient_norm")
        with evaluating(model):
            found = measurer.measure(model(batch), batch["label"], batch=batch, model=model)
        expected = norms_by_autograd(model, list(model.parameters()), batch, (0.1, 0.9), F.mse_loss)
        np.testing.assert_allclose(found.information.numpy(), expected, rtol=1e-4)

    @pytest.mark.parametrize(
        ("task", "labels", "expected"),
        [
            ("multiclass", torch.zeros(ROWS, CLASSES, dtype=torch.int64), r"\(B,\); received labels \(9, 4\)"),
            ("multilabel", torch.zeros(ROWS), r"\(B, C\) like the logits; received labels \(9,\) and logits \(9, 4\)"),
            ("multilabel", torch.zeros(ROWS, 3), r"\(B, C\) like the logits; received labels \(9, 3\) and"),
            ("regression", torch.zeros(ROWS), r"\(B, C\) like the logits; received labels \(9,\) and"),
        ],
    )
    def test_labels_of_another_shape(self, task: str, labels: Tensor, expected: str) -> None:
        outputs, _ = make_outputs(2, seed=0)
        with pytest.raises(ModelOutputError, match=f"labels of a {task} task have the shape {expected}"):
            Measurer(task=task).measure(tensors(outputs), labels)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
    def test_classes_are_integers(self, dtype: torch.dtype) -> None:
        outputs, _ = make_outputs(2, seed=0)
        with pytest.raises(DataError, match=rf"integer classes 0..C-1; received dtype {dtype}"):
            Measurer(task="multiclass").measure(tensors(outputs), torch.zeros(ROWS, dtype=dtype))

    def test_unknown_task(self) -> None:
        with pytest.raises(ConfigError, match="unknown task 'multi-label'; did you mean 'multilabel'"):
            Measurer(task="multi-label")


class TestForTask:
    def test_takes_the_task_of_the_data(self) -> None:
        outputs, features = make_outputs(2, seed=30)
        labels = make_labels("multilabel", np.uint8, seed=31)
        settled = Measurer(fused_weight=0.4, unimodal_weight=1.5, information="gradient_norm").for_task("multilabel")
        assert (settled.task, settled.fused_weight, settled.information) == ("multilabel", 0.4, "gradient_norm")
        reference = Reference(outputs, features, labels, task="multilabel", weights=(0.4, 1.5))
        found = settled.measure(as_outputs(outputs, features), torch.from_numpy(labels))
        np.testing.assert_allclose(found.information.numpy(), reference.of_rows(reference.gradient_norm), rtol=2e-5)

    def test_the_original_stays(self) -> None:
        measurer = Measurer()
        measurer.for_task("regression")
        assert measurer.task is None
        assert measurer == Measurer()

    def test_the_same_task_twice(self) -> None:
        assert Measurer(task="regression").for_task("regression").task == "regression"

    def test_another_task(self) -> None:
        with pytest.raises(ConfigError, match="measurer is for task='regression' and the data's columns say task='mul"):
            Measurer(task="regression").for_task("multiclass")

    def test_a_loss_of_the_user_stays(self) -> None:
        outputs, _ = make_outputs(2, seed=32)
        labels = torch.from_numpy(make_labels("regression", np.float32, seed=33))
        measurer = Measurer(loss_function=absolute_error)
        found = measurer.for_task("regression").measure(tensors(outputs), labels).information
        expected = sum(
            weight * np.abs(outputs[name] - labels.numpy()).mean(-1)
            for name, weight in (("fused", 0.1), ("audio", 0.9), ("image", 0.9))
        )
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)


# ---- a loss of the user's own --------------------------------------------------------------------


def absolute_error(values: Tensor, labels: Tensor) -> Tensor:
    """(B,) mean absolute error."""
    return (values - labels).abs().mean(-1)


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) cross entropy with smoothed labels."""
    return F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.2)


def smoothed_gradient(logits: np.ndarray, label: int) -> np.ndarray:
    target = np.full(len(logits), 0.2 / len(logits))
    target[label] += 0.8
    return softmax(logits) - target


class TestLossFunction:
    @pytest.mark.parametrize("given", [smoothed, "tests.unit.test_criteria:smoothed"])
    def test_loss_and_gradient_norm(self, given: Any) -> None:
        outputs, features = make_outputs(2, seed=40)
        labels = make_labels("multiclass", np.int64, seed=41)
        factors = {"fused": 0.4, "audio": 1.5, "image": 1.5}
        losses, norms = np.zeros(ROWS), np.zeros(ROWS)
        for row, label in enumerate(labels):
            for name, factor in factors.items():
                logits, feature = outputs[name][row].astype(float), features[name][row].astype(float)
                target = np.full(CLASSES, 0.2 / CLASSES)
                target[label] += 0.8
                losses[row] -= factor * target @ np.log(softmax(logits))
                gradient = factor * smoothed_gradient(logits, label)
                norms[row] += (gradient @ gradient) * (feature @ feature + 1)
        settings = {"fused_weight": 0.4, "unimodal_weight": 1.5, "loss_function": given}
        for information, expected in (("loss", losses), ("gradient_norm", np.sqrt(norms))):
            measurer = Measurer(information=information, **settings)
            found = measurer.measure(as_outputs(outputs, features), torch.from_numpy(labels))
            np.testing.assert_allclose(found.information.numpy(), expected, rtol=1e-5)

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("smoothed", r"unknown loss_function 'smoothed'; write module:function"),
            ("tests.unit.test_criteria:smothed", r"has no 'smothed'; did you mean 'smoothed'"),
            ("tests.unit.no_such_module:loss", r"cannot import 'tests.unit.no_such_module:loss'"),
            ("tests.unit.test_criteria:ROWS", r"loss_function must be a function; .* is int"),
        ],
    )
    def test_paths_that_lead_nowhere(self, path: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Measurer(loss_function=path)


# ---- missing modalities --------------------------------------------------------------------------


def presence_of(modalities: int) -> dict[str, Tensor]:
    """Rows with all modalities, with some of them, with one, and (the last) with none."""
    has = {name: (np.arange(ROWS) // (place + 1) + place) % 3 != 1 for place, name in enumerate(NAMES[:modalities])}
    columns = {f"has_{name}": torch.from_numpy(np.asarray(values)) for name, values in has.items()}
    assert {int(sum(column[row] for column in columns.values())) for row in range(ROWS)} >= {1, modalities}
    return columns


class TestMissingModalities:
    @pytest.mark.parametrize("modalities", [2, 3])
    @pytest.mark.parametrize("task", ["multiclass", "multilabel", "regression"])
    @pytest.mark.parametrize("information", ["loss", "gradient_norm"])
    def test_against_the_formula(self, modalities: int, task: str, information: str) -> None:
        outputs, features = make_outputs(modalities, seed=50)
        labels = make_labels(task, np.int64 if task == "multiclass" else np.float32, seed=51)
        batch = presence_of(modalities)
        present = {name.removeprefix("has_"): column.numpy() for name, column in batch.items()}
        reference = Reference(outputs, features, labels, task=task, weights=(0.4, 1.5), present=present)
        for similarity in ("prediction", "feature"):
            measurer = Measurer(
                similarity=similarity, information=information, task=task, fused_weight=0.4, unimodal_weight=1.5
            )
            found = measurer.measure(as_outputs(outputs, features), torch.from_numpy(labels), batch=batch)
            np.testing.assert_allclose(
                found.similarity.numpy(), reference.of_rows(getattr(reference, similarity)), rtol=1e-5, atol=1e-6
            )
            np.testing.assert_allclose(
                found.information.numpy(), reference.of_rows(getattr(reference, information)), rtol=2e-5, atol=1e-6
            )
        assert np.isnan(reference.of_rows(reference.prediction)).any()

    def test_equal_heads_give_a_row_with_less_the_same_information(self) -> None:
        logits = torch.from_numpy(make_outputs(2, seed=52)[0]["audio"])
        outputs = dict.fromkeys((*NAMES, "fused"), logits)
        labels = torch.from_numpy(make_labels("multiclass", np.int64, seed=53))
        whole = Measurer().measure(outputs, labels).information
        lacking = Measurer().measure(outputs, labels, batch={"has_text": torch.zeros(ROWS, dtype=torch.bool)})
        torch.testing.assert_close(lacking.information, whole)

    def test_modalities_without_a_column_are_there(self) -> None:
        outputs, _ = make_outputs(3, seed=54)
        labels = torch.from_numpy(make_labels("multiclass", np.int64, seed=55))
        lacking = torch.arange(ROWS) < 4
        only = Measurer().measure(tensors(outputs), labels, batch={"has_text": ~lacking})
        every = {f"has_{name}": torch.ones(ROWS, dtype=torch.bool) for name in ("audio", "image")}
        both = Measurer().measure(tensors(outputs), labels, batch={**every, "has_text": ~lacking})
        for one, other in zip(only, both, strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32])
    def test_columns_of_other_dtypes(self, dtype: torch.dtype) -> None:
        outputs, _ = make_outputs(2, seed=56)
        labels = torch.from_numpy(make_labels("multiclass", np.int64, seed=57))
        expected = Measurer().measure(tensors(outputs), labels, batch=presence_of(2))
        batch = {name: column.to(dtype) for name, column in presence_of(2).items()}
        found = Measurer().measure(tensors(outputs), labels, batch=batch)
        assert torch.equal(found.information, expected.information)
        np.testing.assert_array_equal(found.similarity.numpy(), expected.similarity.numpy())

    @pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e30])
    @pytest.mark.parametrize("similarity", ["prediction", "feature"])
    @pytest.mark.parametrize("information", ["loss", "gradient_norm"])
    @pytest.mark.parametrize("task", ["multiclass", "multilabel", "regression"])
    def test_what_an_absent_modality_gives_does_not_matter(
        self, garbage: float, similarity: str, information: str, task: str
    ) -> None:
        outputs, features = make_outputs(3, seed=58)
        labels = torch.from_numpy(make_labels(task, np.int64 if task == "multiclass" else np.float32, seed=59))
        batch = presence_of(3)
        measurer = Measurer(similarity=similarity, information=information, task=task)
        expected = measurer.measure(as_outputs(outputs, features), labels, batch=batch)
        spoilt = [{name: values.copy() for name, values in arrays.items()} for arrays in (outputs, features)]
        for name in NAMES:
            for arrays in spoilt:
                arrays[name][~batch[f"has_{name}"].numpy()] = garbage
        found = measurer.measure(as_outputs(*spoilt), labels, batch=batch)
        np.testing.assert_array_equal(found.similarity.numpy(), expected.similarity.numpy())
        np.testing.assert_array_equal(found.information.numpy(), expected.information.numpy())
        assert torch.isfinite(found.information).all()

    @pytest.mark.parametrize("garbage", [math.nan, math.inf])
    @pytest.mark.parametrize("task", ["multiclass", "multilabel", "regression"])
    def test_gradients_of_training_stay_finite(self, garbage: float, task: str) -> None:
        # 0 x NaN is NaN: it is not enough that such losses are multiplied by 0, or left out of the sum.
        outputs, _ = make_outputs(3, seed=60)
        labels = torch.from_numpy(make_labels(task, np.int64 if task == "multiclass" else np.float32, seed=61))
        batch = presence_of(3)
        measurer = Measurer(task=task)
        found = []
        for value in (0.0, garbage):
            logits = tensors(outputs)
            for name in NAMES:
                logits[name][~batch[f"has_{name}"]] = value
            leaves = {name: values.requires_grad_() for name, values in logits.items()}
            measurer.loss(leaves, labels, batch=batch).mean().backward()
            found.append({name: leaf.grad for name, leaf in leaves.items()})
        for name in (*NAMES, "fused"):
            clean, spoilt = found[0][name], found[1][name]
            assert clean is not None
            assert spoilt is not None
            assert torch.equal(clean, spoilt)
            if name != "fused":
                assert (spoilt[~batch[f"has_{name}"]] == 0).all()
                assert (spoilt[batch[f"has_{name}"]].abs().sum(-1) > 0).all()

    def test_gradients_of_a_model_stay_finite(self) -> None:
        model, batch = make_model(2, seed=62), make_batch(2, seed=63)
        batch |= presence_of(2)
        outputs = model(batch)
        for name in NAMES[:2]:  # as a logarithm of probabilities would be
            outputs[name] = outputs[name].masked_fill(~batch[f"has_{name}"].unsqueeze(-1), -math.inf)
        Measurer().loss(outputs, batch["label"], batch=batch).mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name


# ---- the registry --------------------------------------------------------------------------------


def overlap(rows: Observation) -> Tensor:
    """Sum over classes of the smaller probability."""
    return rows.over_pairs(lambda a, b: torch.minimum(a, b).sum(-1), rows.predictions)


def confidence(rows: Observation) -> Tensor:
    return rows.predictions["fused"].amax(-1)


def too_many(rows: Observation) -> Tensor:
    return rows.outputs["fused"]


def no_tensor(rows: Observation) -> Any:
    return rows.outputs["fused"].sum(-1).tolist()


@pytest.fixture
def registry() -> Iterator[None]:
    """What is registered in a test is gone after it."""
    before = [(registry, dict(registry)) for registry in (criteria.SIMILARITIES, criteria.INFORMATIONS)]
    yield
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


def expected_overlap(outputs: Arrays) -> np.ndarray:
    a, b = ([softmax(row.astype(float)) for row in outputs[name]] for name in ("audio", "image"))
    return np.array([np.minimum(p, q).sum() for p, q in zip(a, b, strict=True)])


@pytest.mark.usefixtures("registry")
class TestRegistry:
    def test_by_decorator(self) -> None:
        assert register_similarity("overlap")(overlap) is overlap
        register_information("confidence")(confidence)
        self.check(Measurer(similarity="overlap", information="confidence"))

    def test_by_path(self) -> None:
        self.check(
            Measurer(similarity="tests.unit.test_criteria:overlap", information="tests.unit.test_criteria:confidence")
        )

    def check(self, measurer: Measurer) -> None:
        outputs, _ = make_outputs(2, seed=70)
        found = measurer.measure(tensors(outputs), torch.zeros(ROWS, dtype=torch.int64))
        np.testing.assert_allclose(found.similarity.numpy(), expected_overlap(outputs), rtol=1e-5)
        expected = [softmax(row.astype(float)).max() for row in outputs["fused"]]
        np.testing.assert_allclose(found.information.numpy(), expected, rtol=1e-5)
        assert not measurer.needs_model

    def test_unknown_names(self) -> None:
        register_similarity("overlap")(overlap)
        with pytest.raises(ConfigError) as error:
            Measurer(similarity="overlaps")
        assert str(error.value) == (
            "unknown similarity 'overlaps'; did you mean 'overlap'? Choose from: feature, overlap, prediction; or "
            "module:function"
        )
        with pytest.raises(ConfigError, match="unknown information 'gradient_nrm'; did you mean 'gradient_norm'"):
            Measurer(information="gradient_nrm")
        with pytest.raises(ConfigError, match="has no 'overlaps'; did you mean 'overlap'"):
            Measurer(similarity="tests.unit.test_criteria:overlaps")

    def test_a_name_is_taken_once(self) -> None:
        register_similarity("overlap")(overlap)
        register_similarity("overlap")(overlap)  # a module that is imported again
        with pytest.raises(ConfigError, match="a criterion 'overlap' exists already; choose another name"):
            register_similarity("overlap")(confidence)
        with pytest.raises(ConfigError, match="'loss' exists already"):
            register_information("loss")(confidence)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"similarity": "too_many"}, r"similarity='tests.*too_many' must.*\(9,\); it returned \(9, 4\)"),
            ({"information": "too_many"}, r"information='tests.*too_many' must.*\(9,\); it returned \(9, 4\)"),
            ({"information": "no_tensor"}, r"information='tests.*no_tensor' must return one number a row.*list"),
        ],
    )
    def test_not_one_number_a_row(self, settings: dict[str, str], message: str) -> None:
        outputs, _ = make_outputs(2, seed=71)
        settings = {kind: f"tests.unit.test_criteria:{name}" for kind, name in settings.items()}
        with pytest.raises(ConfigError, match=message):
            Measurer(**settings).measure(tensors(outputs), torch.zeros(ROWS, dtype=torch.int64))  # type: ignore[arg-type]

    def test_one_that_needs_the_model(self) -> None:
        @register_information("parameters", needs_model=True)
        def parameters(rows: Observation) -> Tensor:
            assert rows.model is not None
            return torch.full((len(rows.labels),), sum(p.numel() for p in rows.model.parameters()))

        measurer, batch = Measurer(information="parameters"), make_batch(2, seed=72)
        assert measurer.needs_model
        model = make_model(2, seed=73)
        found = measurer.measure(model(batch), batch["label"], batch=batch, model=model).information
        assert found.tolist() == [sum(p.numel() for p in model.parameters())] * ROWS
        with pytest.raises(ConfigError, match="information='parameters' needs the model itself"):
            measurer.measure(model(batch), batch["label"])

    def test_criteria_of_a_script_reach_other_processes(self) -> None:
        # Such a process imports nothing of the script, as one of `__main__`: it must not need the names.
        @register_similarity("overlap of a script")
        def of_script(rows: Observation) -> Tensor:
            return rows.over_pairs(lambda a, b: torch.minimum(a, b).sum(-1), rows.predictions)

        @register_information("of a script", needs_model=True)
        def of_script_too(rows: Observation) -> Tensor:
            return rows.loss * 2

        outputs, _ = make_outputs(2, seed=74)
        labels = make_labels("multiclass", np.int64, seed=75)
        measurer = Measurer(similarity="overlap of a script", information="of a script")
        found = in_another_process(_measure_elsewhere, measurer, outputs, labels)
        np.testing.assert_allclose(found[0], expected_overlap(outputs), rtol=1e-5)
        reference = Reference(outputs, outputs, labels)
        np.testing.assert_allclose(found[1], 2 * reference.of_rows(reference.loss), rtol=1e-5)
        assert found[2] == (True, "multiclass", False)


def _measure_elsewhere(measurer: Measurer, outputs: Arrays, labels: np.ndarray) -> Any:
    settled = measurer.for_task("multiclass")
    found = settled.measure(tensors(outputs), torch.from_numpy(labels), batch={}, model=nn.Identity())
    known = "of a script" in criteria.INFORMATIONS
    return found.similarity.numpy(), found.information.numpy(), (settled.needs_model, settled.task, known)


# ---- the contract with models --------------------------------------------------------------------


class TestCheckOutputs:
    LABELS = torch.zeros(ROWS, dtype=torch.int64)

    def test_features_are_no_modality(self) -> None:
        outputs = {"audio": torch.zeros(ROWS, 3), "fused": torch.zeros(ROWS, 3), "features": {}}
        with pytest.raises(ModelOutputError, match=r"in addition to 'fused'; received the keys \['audio', 'fe"):
            Measurer().measure(outputs, self.LABELS)

    def test_extras_in_the_outputs(self) -> None:
        outputs = {**tensors(make_outputs(2, seed=0)[0]), "attention": torch.zeros(ROWS, 7, 7)}
        with pytest.raises(ModelOutputError, match=r"'attention': \(9, 7, 7\).*other extras not into the outputs"):
            Measurer().measure(outputs, self.LABELS)

    def test_not_even_tensors(self) -> None:
        outputs: dict[str, Any] = {**tensors(make_outputs(2, seed=0)[0]), "loss": 0.25}
        with pytest.raises(ModelOutputError, match=r"same shape \(B, C\).*'loss': 'float'"):
            Measurer().measure(outputs, self.LABELS)

    def test_features_that_are_no_dict(self) -> None:
        none: dict[str, Any] = {**tensors(make_outputs(2, seed=0)[0]), "features": None}
        Measurer().measure(none, self.LABELS)
        outputs = {**tensors(make_outputs(2, seed=0)[0]), "features": torch.zeros(ROWS, 3)}
        with pytest.raises(ModelOutputError, match=r"'features'.*dict \{head: \(B, D\)\}; received Tensor"):
            Measurer().measure(outputs, self.LABELS)

    def test_rows_of_another_number(self) -> None:
        outputs = tensors(make_outputs(2, seed=0)[0])
        with pytest.raises(ModelOutputError, match=r"B = 5 rows of the batch; received.*\(9, 4\)"):
            Measurer().measure(outputs, self.LABELS[:5])
