"""Running sums of the training steps of an epoch, on the rank's device until the epoch ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bss_ray.measure.observation import Observation
from bss_ray.runtime.ranks import RankGroup


class Sums(NamedTuple):
    """Sums over observed rows.

    Attributes:
        rows: Number of rows.
        loss: Sum of the method's training loss.
        paired: Number of rows with at least two modalities.
        similarity: Sum of the similarities of these rows.
    """

    rows: float = 0.0
    loss: float = 0.0
    paired: float = 0.0
    similarity: float = 0.0

    def means(self) -> dict[str, float]:
        """Metrics; empty if there are no rows."""
        if not self.rows:
            return {}
        return {"train_loss": self.loss / self.rows, "train_similarity": self.similarity / max(self.paired, 1)}


class Observed:
    """This rank's sums.

    Args:
        device: Device of the outputs; nothing leaves it before `over`.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(len(Sums._fields), dtype=torch.float64, device=device)

    def add(self, rows: Observation, similarity: Tensor, own: Tensor) -> None:
        """Count the rows of a step.

        Args:
            rows: Observation of the batch.
            similarity: (b,) similarities of the batch's rows.
            own: (b,) bool, false for filler rows.
        """
        loss, paired = rows.loss, ~similarity.isnan()
        figures = (torch.ones_like(loss), loss, paired, similarity.nan_to_num())
        self._sums += torch.stack([(values * own).sum(dtype=torch.float64) for values in figures])

    def restore(self, sums: Sequence[float]) -> None:
        """Resume from a checkpoint's sums over all ranks, which one rank continues."""
        self._sums += torch.tensor(sums, dtype=torch.float64, device=self._sums.device)

    def over(self, ranks: RankGroup) -> Sums:
        """Sums over all ranks."""
        return Sums(*ranks.sum(self._sums))

    def reset(self) -> None:
        """Start a new epoch."""
        self._sums.zero_()
