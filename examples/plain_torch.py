"""The sampler's order in a plain PyTorch script, without Ray.

Run it:  python examples/plain_torch.py
"""

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from bss_ray import Learning, Measurer, balance_scores, weighted_permutation


class TwoHeads(nn.Module):
    """A head per modality, and their sum as the fused prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.audio, self.image = nn.Linear(10, 3), nn.Linear(16, 3)

    def forward(self, audio: torch.Tensor, image: torch.Tensor) -> dict[str, torch.Tensor]:
        a, i = self.audio(audio), self.image(image)
        return {"audio": a, "image": i, "fused": a + i}


generator = torch.Generator().manual_seed(0)
labels = torch.randint(0, 3, (1000,), generator=generator)
audio = torch.randn(1000, 10, generator=generator) + nn.functional.one_hot(labels, 10)
image = torch.randn(1000, 16, generator=generator) + 2 * nn.functional.one_hot(labels, 16)
rows = TensorDataset(audio, image, labels)

torch.manual_seed(0)
model = TwoHeads()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
measurer, scheduler = Measurer(), Learning(temperature=0.25, fraction=0.7, burn_in=1)
scores = None

for epoch in range(5):
    # Before the first scores every row has the same weight.
    weights = np.ones(len(rows)) if scores is None else scheduler.weights(scores)
    size = len(rows) if scores is None else scheduler.epoch_size(epoch, len(rows))
    order = weighted_permutation(weights, seed=0, epoch=epoch, size=size)
    model.train()
    for a, i, y in DataLoader(Subset(rows, order.tolist()), batch_size=50):
        loss = measurer.loss(model(a, i), y).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    similarity, information = measurer.measure(model(audio, image), labels)
    scores = balance_scores(similarity.numpy(), information.numpy(), previous=scores, momentum=0.5)
    print(f"epoch {epoch}: {len(order)} rows, loss {loss.item():.3f}, mean score {scores.mean():.3f}")
