"""The default train loop, which `bss-ray train` runs on every rank, built from the public interface only."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from bss_ray.data.shards import Shards
from bss_ray.errors import ConfigError, ModelOutputError, check_one_of
from bss_ray.measure.forward import PRECISIONS, autocast
from bss_ray.measure.snapshot import unwrap_model
from bss_ray.models.weights import load_weights
from bss_ray.names import import_name
from bss_ray.train.backend import Stateful
from bss_ray.train.sampler import Sampler, get_sampler

if TYPE_CHECKING:
    from bss_ray.train.metrics import HeadMetrics

OptimizerName = Literal["adamw", "sgd"]
LrSchedule = Literal["cosine", "constant", "step"]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model by import path, built on every rank.

    Args:
        class_path: Import path of a module that maps a batch to `{modality: logits, ..., "fused": logits}`. If its
            constructor takes `shapes` (`{modality: row shape}`) or `num_classes`, it gets them.
        init_args: Other arguments of the module.
    """

    class_path: str = "bss_ray.models.LateFusion"
    init_args: dict[str, Any] = field(default_factory=dict)

    def build(self, shapes: dict[str, tuple[int, ...]], num_classes: int) -> nn.Module:
        """The module.

        Raises:
            ConfigError: The class cannot be imported, is no `nn.Module`, or does not take the arguments.
        """
        kind = import_name(self.class_path)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            raise ConfigError(f"--model.class_path must name a torch.nn.Module; {self.class_path!r} is {kind!r}")
        known = {"shapes": shapes, "num_classes": num_classes}
        parameters = inspect.signature(kind).parameters
        given = {name: value for name, value in known.items() if name in parameters}
        try:
            inspect.signature(kind).bind(**{**given, **self.init_args})
        except TypeError as error:
            raise ConfigError(
                f"model {self.class_path} cannot be built: {error}; it takes {list(parameters)}"
            ) from None
        return kind(**{**given, **self.init_args})


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Settings of the default loop.

    Args:
        epochs: Number of epochs of the whole run.
        optimizer: Optimiser: `adamw` or `sgd`.
        lr: Learning rate after warm-up.
        weight_decay: Weight decay of the optimiser.
        sgd_momentum: Momentum of `sgd`.
        lr_schedule: Schedule of the learning rate: `cosine` to 0 over the run, `constant`, or `step` (times 0.1 every
            third of the run).
        warmup_epochs: Number of epochs of linear warm-up before the schedule.
        clip_norm: Largest norm of the gradients; None does not clip.
        precision: Precision of training: `auto` (bf16 or fp16 on a GPU that has it, else fp32), `fp32`, `bf16` or
            `fp16`.
        checkpoint_every: Number of batches after which a checkpoint is also saved within an epoch; None saves only at
            the ends of epochs.
        eval_batch_size: Number of rows of a rank's forward pass in evaluation.

    Raises:
        ConfigError: A setting is unknown or out of its range.
    """

    epochs: int = 15
    optimizer: OptimizerName = "adamw"
    lr: float = 2e-3
    weight_decay: float = 0.01
    sgd_momentum: float = 0.9
    lr_schedule: LrSchedule = "cosine"
    warmup_epochs: int = 0
    clip_norm: float | None = 5.0
    precision: str = "auto"
    checkpoint_every: int | None = None
    eval_batch_size: int = 256

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("optimizer", self.optimizer, get_args(OptimizerName)),
            ("lr_schedule", self.lr_schedule, get_args(LrSchedule)),
            ("precision", self.precision, ("auto", *PRECISIONS)),
        ):
            check_one_of(name, value, choices)
        for name in ("epochs", "eval_batch_size", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"loop.{name} must be at least 1; received {value}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ConfigError(f"loop.lr must be a positive number; received {self.lr}")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ConfigError(
                f"loop.warmup_epochs must lie in [0, epochs={self.epochs}); received {self.warmup_epochs}"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ConfigError(f"loop.clip_norm must be positive, or null not to clip; received {self.clip_norm}")


@dataclass(frozen=True, kw_only=True)
class LoopArgs:
    """Arguments of the default loop."""

    loop: LoopConfig
    model: ModelSpec
    seed: int
    initial_checkpoint: str | None = None


def default_loop(args: LoopArgs) -> None:
    """Train one model on this rank: plan, batch, observe, step; evaluate, publish, report."""
    config = args.loop
    sampler = get_sampler()
    precision = resolve_precision(config.precision, sampler.device)

    torch.manual_seed(args.seed)
    model = sampler.prepare(build_model(args.model, sampler.shards))
    optimizer = _optimizer(config, model, sampler.device)
    lr_schedule = _lr_schedule(config, optimizer)
    scaler = torch.amp.GradScaler(sampler.device.type, enabled=precision == "fp16")
    stateful: dict[str, Stateful] = {"optimizer": optimizer, "lr_schedule": lr_schedule, "scaler": scaler}
    sampler.restore(model=model, **stateful)
    validate = _validation(sampler, config, precision) if sampler.has_validation else None

    first = model if args.initial_checkpoint is None else _pretrained(args, args.initial_checkpoint, sampler)
    for epoch in sampler.epochs(config.epochs, model=first):
        model.train()
        for batch in sampler.batches():
            _seed_step(args.seed, sampler)
            with autocast(sampler.device, precision):
                outputs = model(batch)
            sampler.observe(batch, outputs)
            loss = sampler.loss(batch, outputs).mean() * sampler.loss_scale
            fetch_loss = _fetch(loss)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            if not math.isfinite(value := fetch_loss()):
                raise ModelOutputError(
                    f"the loss of epoch {epoch}, batch {sampler.position.batch - 1} is {value}; no step was taken. "
                    "Lower loop.lr or loop.clip_norm, or use a wider loop.precision"
                )
            if config.clip_norm is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            scaler.step(optimizer)
            scaler.update()
            if config.checkpoint_every and sampler.position.batch % config.checkpoint_every == 0:
                sampler.report({}, model=model, **stateful)
        figures = {"lr": optimizer.param_groups[0]["lr"]}
        lr_schedule.step()
        if validate is not None:
            figures |= validate(model)
        sampler.report(figures, model=model, **stateful)


def _validation(sampler: Sampler, config: LoopConfig, precision: str) -> Callable[[nn.Module], dict[str, float]]:
    """Metrics `val_...` of a model over the validation rows; all epochs share their memory."""
    columns = sampler.shards.columns

    @functools.cache
    def metrics() -> HeadMetrics:
        from bss_ray.train.metrics import HeadMetrics  # torchmetrics: only after the first epoch of training

        return HeadMetrics(columns.modalities, sampler.shards.num_classes, sampler.device, columns.task)

    def validate(model: nn.Module) -> dict[str, float]:
        from bss_ray.train.metrics import evaluate

        return evaluate(
            unwrap_model(model),
            sampler.validation_batches(config.eval_batch_size),
            metrics(),
            label=columns.label,
            prefix="val",
            device=sampler.device,
            precision=precision,
        )

    return validate


def _pretrained(args: LoopArgs, checkpoint: str, sampler: Sampler) -> nn.Module:
    """The model with which rows are scored before the first epoch."""
    from bss_ray.train.initial import read_weights  # YAML, for the run folders that a search has left

    model = build_model(args.model, sampler.shards).to(sampler.device)
    load_weights(model, read_weights(checkpoint).state, checkpoint)
    return model


def build_model(spec: ModelSpec, shards: Shards) -> nn.Module:
    """The model for rows of these shapes and classes."""
    shapes = {name: shards.features[name].shape for name in shards.columns.modalities}
    return spec.build(shapes, shards.num_classes)


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` resolved for `device`: bf16 or fp16 if a GPU has it, else fp32."""
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "fp32"
    # `torch.cuda.is_bf16_supported()` is also true for GPUs that only emulate bf16, many times slower.
    has_bf16 = torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if has_bf16 else "fp16"


def _fetch(loss: Tensor) -> Callable[[], float]:
    """The value of a loss, for when the backward pass is queued.

    The copy from a GPU is queued at once, so asking waits for the forward pass alone: the GPU works on the backward
    pass meanwhile, and is never without work; `float(loss)` at that place would wait for everything that is queued.
    """
    if loss.device.type != "cuda":
        return loss.detach().item
    value = loss.detach().to("cpu", non_blocking=True)  # into pinned memory
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def fetch() -> float:
        copied.synchronize()
        return float(value)

    return fetch


def _optimizer(config: LoopConfig, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    # Fused: one kernel instead of one for each operation, and with a scaler (fp16) no wait for the GPU in each step.
    fused = device.type == "cuda" or None
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            lr=config.lr,
            momentum=config.sgd_momentum,
            weight_decay=config.weight_decay,
            fused=fused,
        )
    return torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=fused)


def _lr_schedule(config: LoopConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A schedule per epoch and not per batch, because the scheduler may change the number of batches of an epoch."""
    epochs, warmup = config.epochs - config.warmup_epochs, config.warmup_epochs

    def factor(epoch: int) -> float:
        if epoch < warmup:
            return (epoch + 1) / (warmup + 1)
        done = (epoch - warmup) / epochs
        return {"cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0, "step": 0.1 ** int(3 * done)}[
            config.lr_schedule
        ]

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _seed_step(seed: int, sampler: Sampler) -> None:
    """Seed random operations such as dropout by position, so that a resumed run continues with the same numbers."""
    position = sampler.position
    entropy = [seed, position.epoch, position.batch, sampler.rank]
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
