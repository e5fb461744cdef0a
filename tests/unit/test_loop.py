"""The default loop's decisions about devices, and losses that are not finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bss_ray.data.arrays import shards_of_arrays
from bss_ray.data.columns import Columns
from bss_ray.errors import ModelOutputError
from bss_ray.schedule import Uniform
from bss_ray.testing.cluster import LocalCluster
from bss_ray.train.checkpoint import SavedCheckpoint
from bss_ray.train.loop import LoopArgs, LoopConfig, ModelSpec, _fetch, _optimizer, default_loop, resolve_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("capability", "precision"), [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((8, 9), "bf16")]
)
def test_auto_precision_is_that_of_the_rank_s_own_gpu(
    capability: tuple[int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability if device == GPU else (9, 0))
    assert resolve_precision("auto", GPU) == precision
    assert resolve_precision("fp32", GPU) == "fp32"
    assert resolve_precision("auto", CPU) == "fp32"


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_optimizers_are_fused_on_gpus_alone(name: str) -> None:
    model = nn.Linear(2, 2)
    config = LoopConfig(optimizer=name)  # type: ignore[arg-type]
    assert _optimizer(config, model, CPU).param_groups[0]["fused"] is None
    assert _optimizer(config, model, GPU).param_groups[0]["fused"] is True


def test_the_value_of_a_loss_is_that_before_the_backward_pass() -> None:
    weight = torch.tensor([2.0, 3.0], requires_grad=True)
    loss = (weight * weight).sum()
    fetch = _fetch(loss)
    loss.backward()
    assert fetch() == 13.0


class Fragile(nn.Module):
    """Linear heads that return NaN for row `broken`; `made` are all models of the process."""

    made: ClassVar[list[Fragile]] = []

    def __init__(self, num_classes: int, broken: int = -1) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(3, num_classes) for name in ("a", "b")})
        self.broken = broken
        self.last: dict[str, Tensor] = {}
        Fragile.made.append(self)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.last = {name: value.detach().clone() for name, value in self.state_dict().items()}
        sick = (batch["row_id"] == self.broken).unsqueeze(-1)
        logits = {name: head(batch[name]).masked_fill(sick, torch.nan) for name, head in self.heads.items()}
        return {**logits, "fused": logits["a"] + logits["b"]}


def local_cluster(folder: Path) -> LocalCluster:
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(40, 3)).astype(np.float32) for name in ("a", "b")}
    shards = shards_of_arrays({**arrays, "label": np.arange(40) % 4}, Columns(modalities=("a", "b")))
    return LocalCluster(shards, folder, scheduler=Uniform(), batch_size=8)


def loop_args(epochs: int, broken: int = -1) -> LoopArgs:
    model = ModelSpec(class_path=f"{__name__}.Fragile", init_args={"broken": broken})
    return LoopArgs(loop=LoopConfig(epochs=epochs), model=model, seed=0)


def test_a_loss_that_is_not_finite_ends_the_run_before_its_step(tmp_path: Path) -> None:
    Fragile.made.clear()
    with pytest.raises(ModelOutputError, match=r"the loss of epoch 0, batch \d is nan; no step was taken. Lower"):
        local_cluster(tmp_path).run(default_loop, loop_args(1, broken=11))
    (model,) = Fragile.made
    assert model.last
    assert all(torch.equal(value, model.last[name]) for name, value in model.state_dict().items())
    assert not local_cluster(tmp_path).checkpoints()


def test_counts_of_steps_are_restored_where_optimizers_keep_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local_cluster(tmp_path).run(default_loop, loop_args(1))
    asked: dict[str, Any] = {}
    real = SavedCheckpoint.state

    def state(self: SavedCheckpoint, name: str, *, map_location: torch.device | str = "cpu") -> Any:
        asked[name] = map_location
        return real(self, name, map_location=map_location)

    monkeypatch.setattr(SavedCheckpoint, "state", state)
    local_cluster(tmp_path).run(default_loop, loop_args(2))
    assert asked == {"model": CPU, "optimizer": "cpu", "lr_schedule": CPU, "scaler": CPU}
