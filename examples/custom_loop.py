"""A train loop of your own: three modalities, your model, your loss, any number of ranks.

Run it:  python examples/custom_loop.py
The data is made here; put your Ray Dataset in its place. If it is stopped and run again, it resumes the run
in runs/custom-loop.
"""

from pathlib import Path

import numpy as np
import ray
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import bss_ray

MODALITIES = {"audio": 12, "image": 20, "text": 8}


def make_rows(rows: int = 600, classes: int = 4) -> "ray.data.Dataset":
    """Three noisy views of the same class."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, classes, rows)
    means = {name: rng.normal(size=(classes, size)) for name, size in MODALITIES.items()}
    views = {name: (mean[label] + rng.normal(size=(rows, mean.shape[1]))).astype("f4") for name, mean in means.items()}
    return ray.data.from_items([{"label": int(label[i]), **{m: v[i] for m, v in views.items()}} for i in range(rows)])


class ThreeHeads(nn.Module):
    """A head per modality, and their mean as the fused prediction."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(size, classes) for name, size in MODALITIES.items()})

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits = {name: head(batch[name]) for name, head in self.heads.items()}
        return {**logits, "fused": torch.stack(list(logits.values())).mean(0)}


def train_loop(config: dict[str, float]) -> None:
    sampler = bss_ray.get_sampler()
    model = ray.train.torch.prepare_model(ThreeHeads())
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    sampler.restore(model=model, optimizer=optimizer)
    for _epoch in sampler.epochs(int(config["epochs"])):
        for batch in sampler.batches():
            outputs = model(batch)
            loss = sum(F.cross_entropy(logits, batch["label"], label_smoothing=0.1) for logits in outputs.values())
            optimizer.zero_grad()
            (loss * sampler.loss_scale).backward()
            optimizer.step()
            sampler.observe(batch, outputs)
        sampler.report({"loss": float(loss.detach())}, model=model, optimizer=optimizer)


if __name__ == "__main__":
    ray.init(log_to_driver=False)
    result = bss_ray.BalancedTrainer(
        train_loop,
        dataset=make_rows(),
        columns=bss_ray.Columns(modalities=tuple(MODALITIES)),
        scheduler=bss_ray.Learning(temperature=0.5, fraction=0.8),
        batch_size=32,
        train_loop_config={"lr": 0.01, "epochs": 3},
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(name="custom-loop", storage_path=str(Path("runs").absolute())),
    ).fit()
    print({name: round(value, 3) for name, value in result.metrics.items()})
