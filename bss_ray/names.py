"""Fixed names that data, models and measures agree on, so that none of them has to know the others."""

from __future__ import annotations

# What a model returns beside the logits of each modality: the fused logits, and (optional) the inputs of the heads.
FUSED = "fused"
FEATURES = "features"

# Beginnings of the names of an epoch's figures that the clock makes: all others are the same in a run that is repeated.
CLOCKED = ("seconds_", "loader_stall_share", "scoring_rows_per_second")


def presence_column(modality: str) -> str:
    """Boolean column (rows,) of a batch: does the row have this modality? Only where some row has not."""
    return f"has_{modality}"


def loss_column(modality: str) -> str:
    """Column (rows,) of score files: loss of this modality's own head."""
    return f"loss_{modality}"
