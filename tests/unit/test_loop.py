"""The default loop's decisions about devices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bss_ray.train.loop import LoopConfig, _fetch, _optimizer, resolve_precision

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
