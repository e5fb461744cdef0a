"""How balanced is each row? Criteria per batch, scores over all rows, a model over rows."""

from bss_ray.measure.criteria import Measurer, Measures, per_row_loss
from bss_ray.measure.score import balance_scores

__all__ = ["Measurer", "Measures", "balance_scores", "per_row_loss"]
