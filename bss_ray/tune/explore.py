"""Population-based training: how the settings of a good trial are changed for the one that goes on in its place."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

# Dotted setting: its range, and whether it is changed by a factor or by a step.
_FACTOR, _STEP = 1.25, 0.1
_MOMENTUM = "scoring.momentum"
_KNOBS: dict[str, tuple[float, float, bool]] = {
    "scheduler.init_args.temperature": (0.05, 2.0, True),
    "scheduler.init_args.fraction": (0.3, 1.0, False),
    _MOMENTUM: (0.0, 0.9, False),
}
_RESAMPLE = 0.25


class Explore:
    """Changes temperature, fraction and momentum, where they act in a trial; Ray Tune's `custom_explore_fn`.

    Each is made a step larger or smaller, or drawn anew once in four times.

    Args:
        seed: of the random numbers.
    """

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        """The changed copy of `{"trial": {"settings": ...}}`."""
        config = copy.deepcopy(config)
        settings = config["trial"]["settings"]
        for name, (low, high, by_factor) in _KNOBS.items():
            value = settings.get(name)
            if value is not None and (name != _MOMENTUM or _has_memory(settings)):
                settings[name] = round(self._changed(float(value), low, high, by_factor), 6)
        return config

    def _changed(self, value: float, low: float, high: float, by_factor: bool) -> float:
        if self._random.random() < _RESAMPLE:
            drawn = self._random.random()
            return low * (high / low) ** drawn if by_factor else low + (high - low) * drawn
        sign = 1 if self._random.random() < 0.5 else -1
        changed = value * _FACTOR**sign if by_factor else value + _STEP * sign
        return min(max(changed, low), high)


def _has_memory(settings: dict[str, Any]) -> bool:
    """Whether scores are updated, and by a moving average: a sum refuses a momentum."""
    return settings.get("scoring.accumulate") != "sum" and settings.get("scheduler.init_args.update_interval") != 0
