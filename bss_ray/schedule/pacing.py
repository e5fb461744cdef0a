"""Pacing functions: the share of the training rows that an epoch may see.

All of them grow from `initial` to 1 in `grow_epochs` epochs and are capped at 1. `t` counts epochs
after burn-in, from 1 (BSS, section on the heuristic scheduler; the shapes other than root are from
the curriculum-learning literature).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Literal, get_args

from bss_ray.errors import ScheduleError, nearest

Shape = Literal["root", "linear", "geometric", "step"]
SHAPES: tuple[str, ...] = get_args(Shape)


def pacing(
    t: int, *, initial: float, grow_epochs: int, power: float = 2.0, shape: Shape = "root", steps: int = 5
) -> float:
    """Share of the training rows that epoch `t` may see.

    `root`: `((1 - initial**p) * t / grow_epochs + initial**p) ** (1 / p)`; p = 2 is the released code.
    It grows fast at first, so that the subset soon has enough rows. `linear` is root with p = 1,
    `geometric` grows by a constant factor, `step` is linear in `steps` equal jumps.

    Args:
        t: Epoch after burn-in, from 1.
        initial: Share of rows before the first epoch, in (0, 1].
        grow_epochs: Number of epochs until the share is 1.
        power: Exponent p of the shape `root`; no effect on the other shapes.
        shape: One of `SHAPES`.
        steps: Number of jumps of the shape `step`; no effect on the other shapes.

    Returns:
        A share in (0, 1].

    Raises:
        ScheduleError: A setting is out of its range, or `t` < 1.
    """
    check_pacing(initial=initial, grow_epochs=grow_epochs, power=power, shape=shape, steps=steps)
    if t < 1:
        raise ScheduleError(f"epochs after burn-in count from 1; received t={t}")
    if t >= grow_epochs:
        return 1.0  # exactly, whatever the shape's rounding
    return min(1.0, _SHAPES[shape](Fraction(t, grow_epochs), initial, power, steps))


def check_pacing(*, initial: float, grow_epochs: int, power: float, shape: str, steps: int) -> None:
    """Refuse settings that no epoch could use.

    Raises:
        ScheduleError: A setting is out of its range; the error names the setting, its range and the value.
    """
    if shape not in SHAPES:
        raise ScheduleError(f"unknown pacing shape {shape!r}; {nearest(shape, SHAPES)}")
    if not 0 < initial <= 1:
        raise ScheduleError(f"initial share must lie in (0, 1]; received {initial}")
    if grow_epochs < 1:
        raise ScheduleError(f"grow_epochs must be at least 1; received {grow_epochs}")
    if not (power > 0 and math.isfinite(power)):
        raise ScheduleError(f"power must be a positive number; received {power}")
    if steps < 1:
        raise ScheduleError(f"steps must be at least 1; received {steps}")


def _root(progress: Fraction, initial: float, power: float, _steps: int) -> float:
    start = initial**power
    return float(((1 - start) * float(progress) + start) ** (1 / power))


def _linear(progress: Fraction, initial: float, _power: float, _steps: int) -> float:
    return (1 - initial) * float(progress) + initial


def _geometric(progress: Fraction, initial: float, _power: float, _steps: int) -> float:
    return float(initial ** (1 - float(progress)))


def _step(progress: Fraction, initial: float, _power: float, steps: int) -> float:
    # The fraction keeps the jumps on time: 49 * (1 / 49) is below 1 in floating point.
    return (1 - initial) * math.floor(progress * steps) / steps + initial


_SHAPES: dict[str, Callable[[Fraction, float, float, int], float]] = {
    "root": _root,
    "linear": _linear,
    "geometric": _geometric,
    "step": _step,
}
