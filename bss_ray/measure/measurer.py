"""The measurer: criteria, kind of labels and loss."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bss_ray.errors import ConfigError, DataError, check_one_of, nearest
from bss_ray.measure.criteria import INFORMATIONS, SIMILARITIES, check_loss_weights
from bss_ray.measure.observation import TASKS, Observation, Outputs, RowLoss, check_batch_labels, check_outputs
from bss_ray.names import FEATURES, import_name


class Measures(NamedTuple):
    """Raw measures of a batch, before any normalisation; float32 (B,), without gradients.

    `similarity` is NaN for rows with fewer than two modalities.
    """

    similarity: Tensor
    information: Tensor


def per_row_loss(
    outputs: Outputs, labels: Tensor, *, fused_weight: float = 0.1, unimodal_weight: float = 0.9
) -> Tensor:
    """Training loss and information of each row: w_f CE(fused, y) + w_u sum_m CE(m, y).

    Args:
        outputs: Logits (B, C) of each modality and `fused`.
        labels: (B,) int64 classes in 0..C-1.
        fused_weight: Weight w_f of the fused loss; released code: 0.1 for CREMA-D, 1 for its other datasets.
        unimodal_weight: Weight w_u of each unimodal loss; released code: 0.9 for CREMA-D, 1 for its other datasets.

    Returns:
        (B,) with gradients; its mean over a global batch is the training loss.
    """
    return Measurer(fused_weight=fused_weight, unimodal_weight=unimodal_weight).loss(outputs, labels)


@dataclass(frozen=True, kw_only=True)
class Measurer:
    """Measures the balance of rows from a model's outputs.

    Args:
        similarity: Criterion of the agreement between modalities: `prediction`, `feature`, a registered name
            (`register_similarity`), or `module:function`.
        information: Criterion of how much a row can still teach: `loss`, `gradient_norm` (of the heads, from their
            features), `full_gradient_norm` (of the whole model, expensive), a registered name, or `module:function`.
        fused_weight: Weight w_f of the fused loss; released code: 0.1 for CREMA-D, 1 for its other datasets.
        unimodal_weight: Weight w_u of each unimodal loss; released code: 0.9 for CREMA-D, 1 for its other datasets.
        task: Kind of the labels: `multiclass`, `multilabel` or `regression`; None takes the task of the data's columns,
            or `multiclass` if there are no columns.
        loss_function: Your own loss of each row for one head, `(logits (B, C), labels) -> (B,)`, as a function or
            `module:function`; None takes the task's loss (cross entropy, binary cross entropy, squared error).

    Raises:
        ConfigError: A criterion or task is unknown (the error has the nearest name), or a weight is impossible.
    """

    similarity: str = "prediction"
    information: str = "loss"
    fused_weight: float = 0.1
    unimodal_weight: float = 0.9
    task: str | None = None
    loss_function: str | RowLoss | None = None

    def __post_init__(self) -> None:
        if self.task is not None:
            check_one_of("task", self.task, TASKS)
        check_loss_weights(self.fused_weight, self.unimodal_weight)
        # Looked up here and kept as functions: other processes do not know what was registered in this process.
        for kind, registry in (("similarity", SIMILARITIES), ("information", INFORMATIONS)):
            object.__setattr__(self, f"_{kind}", _resolve(kind, getattr(self, kind), registry))
        if isinstance(self.loss_function, str):
            object.__setattr__(self, "_loss", _resolve("loss_function", self.loss_function, {}))
        else:
            object.__setattr__(self, "_loss", self.loss_function or TASKS[self.task or "multiclass"].loss)

    @property
    def needs_model(self) -> bool:
        """Whether the criteria need the model itself and not only its outputs."""
        return any(getattr(self._criterion(kind), "needs_model", False) for kind in ("similarity", "information"))

    def for_task(self, task: str) -> Measurer:
        """This measurer for data with this kind of labels.

        Raises:
            ConfigError: The measurer was made for another kind.
        """
        if self.task not in (None, task):
            raise ConfigError(
                f"the measurer is for task={self.task!r} and the data's columns say task={task!r}; leave the "
                "measurer's out"
            )
        # A copy, not a new measurer: another process does not know the criteria that were registered in this process.
        settled = copy.copy(self)
        object.__setattr__(settled, "task", task)
        if self.loss_function is None:
            object.__setattr__(settled, "_loss", TASKS[task].loss)
        return settled

    def loss(self, outputs: Outputs, labels: Tensor, *, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        """Training loss of each row with this measurer's weights: (B,) with gradients.

        Args:
            outputs: Logits (B, C) of each modality and `fused`.
            labels: Labels of the rows.
            batch: The batch, if rows may lack a modality: a row's loss is then over the modalities it has (see
                `Observation`).
        """
        logits = {name: values for name, values in outputs.items() if name != FEATURES}
        return self._observation(logits, labels, None, batch, None).loss

    def observe(
        self,
        outputs: Outputs,
        labels: Tensor,
        *,
        batch: Mapping[str, Tensor] | None = None,
        model: nn.Module | None = None,
    ) -> Observation:
        """The observation that criteria get; without gradients, in single precision.

        Args:
            outputs: Logits (B, C) of each modality and `fused`, of any floating dtype, and optional `features`.
            labels: Labels of the rows.
            batch: Columns of the batch, if rows may lack a modality.
            model: The model, for criteria that need it.

        Raises:
            ModelOutputError: The outputs break the contract (see `check_outputs`).
            DataError: The labels are not of the task's kind.
        """
        check_outputs(outputs, labels)
        task = self.task or "multiclass"
        if TASKS[task].integers and (labels.is_floating_point() or labels.dtype == torch.bool):
            raise DataError(f"labels must be integer classes 0..C-1; received dtype {labels.dtype}")
        # Half precision is good enough for the forward pass, but not for a cosine or a loss.
        logits = {name: values.detach().float() for name, values in outputs.items() if name != FEATURES}
        check_batch_labels(labels, next(iter(logits.values())), task)
        features = outputs.get(FEATURES)
        detached = None if features is None else {head: values.detach() for head, values in features.items()}
        return self._observation(logits, labels, detached, batch, model)

    @torch.no_grad()
    def measure(
        self,
        outputs: Outputs,
        labels: Tensor,
        *,
        batch: Mapping[str, Tensor] | None = None,
        model: nn.Module | None = None,
    ) -> Measures:
        """Similarity and information of each row of a batch; arguments and errors are those of `observe`.

        Returns:
            Two float32 tensors (B,) on the outputs' device, without gradients.
        """
        return self.measures_of(self.observe(outputs, labels, batch=batch, model=model))

    def measures_of(self, rows: Observation) -> Measures:
        """Similarity and information of the observed rows.

        Raises:
            ConfigError: A criterion needs the model and there is none, or does not return one number for each row.
        """
        return Measures(self.similarity_of(rows), self.information_of(rows))

    def similarity_of(self, rows: Observation) -> Tensor:
        """Similarity (b,) float32 of the observed rows; errors are those of `measures_of`."""
        return self._criterion_of(rows, "similarity")

    def information_of(self, rows: Observation) -> Tensor:
        """Information (b,) float32 of the observed rows; errors are those of `measures_of`."""
        return self._criterion_of(rows, "information")

    def _criterion_of(self, rows: Observation, kind: str) -> Tensor:
        criterion, name = self._criterion(kind), getattr(self, kind)
        if getattr(criterion, "needs_model", False) and (rows.model is None or rows.batch is None):
            raise ConfigError(
                f"{kind}={name!r} needs the model itself and not only its outputs: use the scoring engine 'actors' "
                f"or 'workers', or another {kind}"
            )
        values = criterion(rows)
        if not isinstance(values, Tensor) or values.shape != (len(rows.labels),):
            found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ConfigError(
                f"{kind}={name!r} must return one number a row, ({len(rows.labels)},); it returned {found}"
            )
        return values.float()

    def _observation(
        self,
        logits: Mapping[str, Tensor],
        labels: Tensor,
        features: Mapping[str, Tensor] | None,
        batch: Mapping[str, Tensor] | None,
        model: nn.Module | None,
    ) -> Observation:
        return Observation(
            outputs=logits,
            labels=labels,
            features=features,
            task=self.task or "multiclass",
            head_loss=self._loss,  # type: ignore[attr-defined]
            fused_weight=self.fused_weight,
            unimodal_weight=self.unimodal_weight,
            batch=batch,
            model=model,
        )

    def _criterion(self, kind: str) -> Callable[[Observation], Tensor]:
        criterion: Callable[[Observation], Tensor] = getattr(self, f"_{kind}")
        return criterion


def _resolve(kind: str, name: str, registry: Mapping[str, Any]) -> Any:
    """A criterion by its registered name, or by import path."""
    if name in registry:
        return registry[name]
    if ":" not in name:
        known = f"{nearest(name, registry)}; or" if registry else "write"
        raise ConfigError(f"unknown {kind} {name!r}; {known} module:function")
    found = import_name(name)
    if not callable(found):
        raise ConfigError(f"{kind} must be a function; {name!r} is {type(found).__name__}")
    return found
