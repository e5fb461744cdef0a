"""bss_ray: balance-aware sequence sampling for multi-modal training on Ray.

The public names are imported when they are first used, so that `bss-ray --help` and a script that
needs only `weighted_permutation` do not wait for Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "BalancedTrainer": "bss_ray.train.trainer",
    "BssRayError": "bss_ray.errors",
    "Columns": "bss_ray.data.columns",
    "Heuristic": "bss_ray.schedule.schedulers",
    "Learning": "bss_ray.schedule.schedulers",
    "Measurer": "bss_ray.measure.measurer",
    "Measures": "bss_ray.measure.measurer",
    "RowRandom": "bss_ray.load.randomness",
    "Scoring": "bss_ray.scoring.config",
    "StoreConfig": "bss_ray.data.store",
    "Uniform": "bss_ray.schedule.schedulers",
    "balance_scores": "bss_ray.measure.score",
    "get_sampler": "bss_ray.train.sampler",
    "register_information": "bss_ray.measure.criteria",
    "register_similarity": "bss_ray.measure.criteria",
    "score_dataset": "bss_ray.score.dataset",
    "weighted_permutation": "bss_ray.sample.permutation",
}

__all__ = [
    "BalancedTrainer",
    "BssRayError",
    "Columns",
    "Heuristic",
    "Learning",
    "Measurer",
    "Measures",
    "RowRandom",
    "Scoring",
    "StoreConfig",
    "Uniform",
    "balance_scores",
    "get_sampler",
    "register_information",
    "register_similarity",
    "score_dataset",
    "weighted_permutation",
]

if TYPE_CHECKING:
    from bss_ray.data.columns import Columns
    from bss_ray.data.store import StoreConfig
    from bss_ray.errors import BssRayError
    from bss_ray.load.randomness import RowRandom
    from bss_ray.measure.criteria import register_information, register_similarity
    from bss_ray.measure.measurer import Measurer, Measures
    from bss_ray.measure.score import balance_scores
    from bss_ray.sample.permutation import weighted_permutation
    from bss_ray.schedule.schedulers import Heuristic, Learning, Uniform
    from bss_ray.score.dataset import score_dataset
    from bss_ray.scoring.config import Scoring
    from bss_ray.train.sampler import get_sampler
    from bss_ray.train.trainer import BalancedTrainer


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'bss_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
