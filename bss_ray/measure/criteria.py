"""Criteria: how well the modalities of a row agree, and how much the row can still teach.

A criterion is a function of an `Observation` (outputs, labels, features of a batch) that returns one number
for each row. The two kinds are those of the paper's appendix: *correlation* (here: similarity) and
*information*. A criterion of your own takes a few lines:

    @bss_ray.register_similarity("overlap")
    def overlap(rows):
        return rows.over_pairs(lambda a, b: torch.minimum(a, b).sum(-1), rows.predictions)

    bss_ray.Measurer(similarity="overlap")
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the field's name for it)

from bss_ray.errors import ConfigError, ModelOutputError
from bss_ray.measure.observation import Observation
from bss_ray.names import FEATURES, FUSED

Criterion = Callable[[Observation], Tensor]
AnyCriterion = TypeVar("AnyCriterion", bound=Criterion)

SIMILARITIES: dict[str, Criterion] = {}
INFORMATIONS: dict[str, Criterion] = {}

# Most numbers of per-sample gradients of a whole model that are made at a time (256 MB).
_GRADIENT_ITEMS = 1 << 26


def register_similarity(name: str) -> Callable[[AnyCriterion], AnyCriterion]:
    """Register a function `(observation) -> (B,)` as a similarity of this name.

    A high value means that the modalities agree, NaN that the row has fewer than two modalities.
    """
    return _register(name, SIMILARITIES)


def register_information(name: str, *, needs_model: bool = False) -> Callable[[AnyCriterion], AnyCriterion]:
    """Register a function `(observation) -> (B,)` as an information of this name.

    Args:
        name: Name for `Measurer(information=...)`.
        needs_model: Whether the function uses `observation.model`, so that the outputs of training alone are not
            enough.
    """
    return _register(name, INFORMATIONS, needs_model=needs_model)


def _register(
    name: str, registry: dict[str, Criterion], *, needs_model: bool = False
) -> Callable[[AnyCriterion], AnyCriterion]:
    def register(criterion: AnyCriterion) -> AnyCriterion:
        if name in registry and registry[name] is not criterion:
            raise ConfigError(f"a criterion {name!r} exists already; choose another name")
        criterion.needs_model = needs_model  # type: ignore[attr-defined]
        registry[name] = criterion
        return criterion

    return register


# ---- similarity ---------------------------------------------------------------------------------


@register_similarity("prediction")
def prediction_similarity(rows: Observation) -> Tensor:
    """Mean over pairs of modalities of cos(p_m, p_n), p the softmax (or sigmoid) of the logits: (B,) in [0, 1].

    For a regression 1 / (1 + mean squared difference): the cosine of single numbers is only their sign.
    """
    if rows.task == "regression":
        return rows.over_pairs(lambda a, b: 1 / (1 + (a - b).square().mean(-1)), rows.predictions)
    return rows.over_pairs(_cosine, rows.predictions)


@register_similarity("feature")
def feature_similarity(rows: Observation) -> Tensor:
    """Mean over pairs of modalities of the cosine of their features: (B,) in [-1, 1].

    Raises:
        ModelOutputError: There are no features, or their lengths differ.
    """
    features = {name: rows.feature_of(name) for name in rows.modalities}
    lengths = {name: values.shape[1] for name, values in features.items()}
    if len(set(lengths.values())) > 1:
        raise ModelOutputError(
            f"similarity='feature' compares features of one length; received {lengths}. Project them in the model, or "
            "use similarity='prediction'"
        )
    return rows.over_pairs(_cosine, features)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a, b, dim=-1)


# ---- information --------------------------------------------------------------------------------


@register_information("loss")
def loss(rows: Observation) -> Tensor:
    """The training loss of each row, w_f loss(fused) + w_u sum_m loss(m): (B,)."""
    return rows.loss


@register_information("gradient_norm")
def gradient_norm(rows: Observation) -> Tensor:
    """Exact norm of the loss's gradient with respect to weights and biases of all heads: (B,).

    A head is a separate linear layer z = W h + b, so the gradient of row i with respect to W is the outer product of
    g = dloss/dz and h, with the squared norm |g|^2 |h|^2; that with respect to b is |g|^2. There is no backward pass
    through the encoders.

    Raises:
        ModelOutputError: The model does not return features, the inputs of its heads.
    """
    gradients = _logit_gradients(rows)
    squares = {
        head: gradient.square().sum(-1) * (rows.feature_of(head).square().sum(-1) + 1)
        for head, gradient in gradients.items()
    }
    # Missing modalities raise the weight of the others' losses by a factor: gradients get it once, squares twice.
    unimodal = rows.over_modalities([squares[name] for name in rows.modalities])
    if rows.present is not None:
        unimodal = unimodal * (len(rows.present) / rows.present.sum(0).clamp(min=1))
    return (rows.fused_weight**2 * squares[FUSED] + rows.unimodal_weight**2 * unimodal).sqrt()


def _logit_gradients(rows: Observation) -> dict[str, Tensor]:
    """Gradient (B, C) of each head's loss with respect to its logits."""
    with torch.inference_mode(False), torch.enable_grad():
        # Clones, because tensors made in inference mode can have no gradients.
        logits = {head: values.detach().clone().requires_grad_() for head, values in rows.outputs.items()}
        labels = rows.labels.clone()
        total = torch.stack([rows.head_loss(values, labels).sum() for values in logits.values()]).sum()
        return dict(zip(logits, torch.autograd.grad(total, list(logits.values())), strict=True))


@register_information("full_gradient_norm", needs_model=True)
def full_gradient_norm(rows: Observation) -> Tensor:
    """Norm of the loss's gradient with respect to all parameters, row by row (`torch.func`): (B,).

    Each row costs about a forward and a backward pass, and the memory of the parameters.
    """
    assert rows.model is not None, "Measurer.observe refuses it without a model"
    assert rows.batch is not None
    model = rows.model
    with torch.inference_mode(False):
        parameters = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        batch = {name: value.clone() for name, value in rows.batch.items()}
        labels = rows.labels.clone()

        def row_loss(parameters: dict[str, Tensor], batch: dict[str, Tensor], label: Tensor) -> Tensor:
            one = {name: value.unsqueeze(0) for name, value in batch.items()}
            outputs = torch.func.functional_call(model, {**parameters, **buffers}, (one,))
            logits = {name: value.float() for name, value in outputs.items() if name != FEATURES}
            return _like(rows, logits, label.unsqueeze(0), one).loss.sum()

        def norm(batch: dict[str, Tensor], label: Tensor) -> Tensor:
            gradients = torch.func.grad(row_loss)(parameters, batch, label)
            return torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()

        if not parameters:
            raise ModelOutputError(
                "information='full_gradient_norm' is of the model's parameters, and none of them requires a gradient. "
                "Use information='gradient_norm' or 'loss'"
            )
        items = sum(value.numel() for value in parameters.values())
        chunk = max(1, _GRADIENT_ITEMS // items)
        norms: Tensor = torch.func.vmap(norm, chunk_size=min(chunk, len(labels)))(batch, labels)
    return norms


def _like(rows: Observation, outputs: dict[str, Tensor], labels: Tensor, batch: dict[str, Tensor]) -> Observation:
    """An observation of other rows with the same task, loss and weights."""
    return Observation(
        outputs=outputs,
        labels=labels,
        features=None,
        task=rows.task,
        head_loss=rows.head_loss,
        fused_weight=rows.fused_weight,
        unimodal_weight=rows.unimodal_weight,
        batch=batch,
    )


def check_loss_weights(fused_weight: float, unimodal_weight: float) -> None:
    """Refuse weights with which there is no loss.

    Raises:
        ConfigError: A weight is negative or not finite, or both are 0.
    """
    weights = (fused_weight, unimodal_weight)
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not any(weights):
        raise ConfigError(
            "fused_weight and unimodal_weight must be finite, not negative and not both 0; "
            f"received {fused_weight} and {unimodal_weight}"
        )
