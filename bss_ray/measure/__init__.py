"""How balanced is each row? Criteria per batch, and scores over all rows: pure, no state."""

from bss_ray.measure.criteria import register_information, register_similarity
from bss_ray.measure.measurer import Measurer, Measures, per_row_loss
from bss_ray.measure.observation import Observation
from bss_ray.measure.score import balance_scores

__all__ = [
    "Measurer",
    "Measures",
    "Observation",
    "balance_scores",
    "per_row_loss",
    "register_information",
    "register_similarity",
]
