"""What only a rank can find out reaches the user as the error itself, and is not tried again."""

from pathlib import Path

import pytest
import ray.train
import torch
from torch import nn

import bss_ray
from bss_ray.errors import ModelOutputError
from bss_ray.train.loop import LoopArgs, LoopConfig, ModelSpec, default_loop
from tests.runs import make_shards

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]


class NotFused(nn.Module):
    """Forgets the fused logits."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"a": self.head(batch["a"]), "b": self.head(batch["b"])}


def test_a_model_without_fused_logits(tmp_path: Path) -> None:
    args = LoopArgs(
        loop=LoopConfig(epochs=2), model=ModelSpec(class_path="tests.integration.test_errors_in_ranks.NotFused"), seed=0
    )
    trainer = bss_ray.BalancedTrainer(
        default_loop,
        dataset=make_shards(2),
        batch_size=16,
        train_loop_config=args,
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(
            name="run", storage_path=str(tmp_path), failure_config=ray.train.FailureConfig(max_failures=5)
        ),
    )
    with pytest.raises(ModelOutputError, match=r"under 'fused'; received the keys \['a', 'b'\]"):
        trainer.fit()
