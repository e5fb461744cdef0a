"""Schedulers: from balance scores to sampling weights and the size of an epoch.

A scheduler is a frozen description that is sent to every holder; it has no state. It answers four
questions, and `bss_ray.sample` computes everything else from the answers (thresholds over all rows,
the mixing weight, the draw itself):

* `scores_due_after(epoch)`: are new scores needed between this epoch and the next?
* `subset_size(epoch, rows)`: how many rows of highest score may be drawn at all?
* `epoch_size(epoch, rows)`: how many rows does the epoch present?
* `weights(score)`: what is the sampling weight of a row, before the uniform mix?

Epochs count from 0; the first `burn_in` of them are uniform over all rows. The method's t = 1, 2, ...
is `epoch - burn_in + 1`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal, get_args

import numpy as np

from bss_ray.errors import ScheduleError, nearest

# ---- pacing: the share of the training rows that an epoch may see ------------------------------
#
# All shapes grow from `initial` to 1 in `grow_epochs` epochs and are capped at 1. `t` counts epochs after burn-in, from
# 1 (BSS, section on the heuristic scheduler; the shapes other than root are from the curriculum-learning literature).

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


# ln 2 in two parts: the first has 21 trailing zero bits, so that k * _LN2_HIGH is exact for |k| < 2^20.
_LN2_HIGH = 0.693147180369123816490
_LN2_LOW = 1.90821492927058770002e-10
# Taylor on |r| <= ln(2) / 2: the next term is below 2^-57 of the result.
_COEFFICIENTS = [1.0 / math.factorial(power) for power in range(13, -1, -1)]


def stable_exp(x: np.ndarray) -> np.ndarray:
    """exp(x) to about 1e-16, by operations that IEEE 754 defines to the last bit.

    `np.exp` uses other code with AVX-512 than on older CPUs, and the last bits differ; the weights of
    rows, and so their order, must not depend on the node of a cluster that computes them.

    Args:
        x: (n,) float64, within [-700, 700].

    Returns:
        (n,) float64.
    """
    k = np.rint(x / math.log(2))
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    result = np.full_like(x, _COEFFICIENTS[0])
    for coefficient in _COEFFICIENTS[1:]:  # in place: twice as fast as new arrays
        result *= r
        result += coefficient
    # times 2^k, by its exponent bits: the result is a normal number, and np.ldexp would take as long as all the rest
    result.view(np.int64)[...] += k.astype(np.int64) << 52
    return result


# exp(score / temperature) with scores in [-1, 1]: at 0.01 the weights span a factor of e^200, which float64 keys
# still order exactly. A lower temperature would be a hard choice of the best rows: use Heuristic.
MIN_TEMPERATURE = 0.01


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """Base of all schedulers: uniform over all rows. Override the methods that differ.

    Attributes:
        burn_in: Number of first epochs that are uniform over all rows; 0 scores the untrained model.
        update_interval: Number of epochs between two updates of the scores after burn-in; 0 means no update.
    """

    burn_in: int = 0
    update_interval: int = 0

    uses_scores: ClassVar[bool] = False
    # Not annotated, so no fields (and no options) of the schedulers that do not declare them.
    replacement = False
    uniform_mix = 0.0

    def __post_init__(self) -> None:
        if self.burn_in < 0:
            raise ScheduleError(f"burn_in counts epochs and cannot be negative; received {self.burn_in}")
        if self.update_interval < 0:
            raise ScheduleError(
                f"update_interval counts epochs and cannot be negative (0 means never); received {self.update_interval}"
            )

    def is_burn_in(self, epoch: int) -> bool:
        """Whether `epoch` (from 0) is uniform because no scores are in use yet."""
        return epoch < self.burn_in

    def scores_due_after(self, epoch: int) -> bool:
        """Whether new scores are needed after `epoch` (from 0; -1 means before the first epoch)."""
        t = epoch + 1 - self.burn_in
        if t == 0:
            return self.uses_scores
        return t > 0 and self.update_interval > 0 and t % self.update_interval == 0

    def subset_size(self, epoch: int, rows: int) -> int:
        """Number of rows of highest score that may be drawn in `epoch` (after burn-in)."""
        return rows

    def epoch_size(self, epoch: int, rows: int) -> int:
        """Number of rows that `epoch` presents (after burn-in)."""
        return rows

    @property
    def flatten_hint(self) -> str:
        """What a user can do about a distribution that is too peaked."""
        return "Let the scheduler return weights that differ less"

    def weights(self, score: np.ndarray) -> np.ndarray:
        """Sampling weights of rows; elementwise, so that each holder can call it for its own rows.

        Args:
            score: (n,) float64 balance scores in [-1, 1].

        Returns:
            (n,) float64, finite and positive.
        """
        return np.ones(len(score))


@dataclass(frozen=True, kw_only=True)
class Uniform(Scheduler):
    """Uniform sampling, the control: weight 1 for all rows, and all rows in each epoch.

    Args:
        update_interval: Number of epochs between two updates of the scores, which are only recorded and change nothing;
            0 means no update.
    """


@dataclass(frozen=True, kw_only=True)
class Heuristic(Scheduler):
    """BSS-H: the rows of highest score, a growing share of them, in uniform order.

    Weight 1 for the floor(lambda(t) N) rows of highest score (ties: lower row id first), 0 for the
    other rows; see `bss_ray.schedule.schedulers` for lambda. The defaults are those of the released code, except
    `burn_in`: the released code scores the untrained model (`burn_in=0`).

    Args:
        initial: Share of rows before the first epoch, in (0, 1].
        grow_epochs: Number of epochs until all rows are in use.
        power: Exponent p of the shape `root`.
        shape: Shape of the growth: `root`, `linear`, `geometric` or `step`.
        steps: Number of jumps of the shape `step`.

    Raises:
        ScheduleError: A setting is out of its range.
    """

    burn_in: int = 1
    initial: float = 0.1
    grow_epochs: int = 40
    power: float = 2.0
    shape: Shape = "root"
    steps: int = 5

    uses_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pacing(
            initial=self.initial,
            grow_epochs=self.grow_epochs,
            power=self.power,
            shape=self.shape,
            steps=self.steps,
        )

    def share(self, epoch: int) -> float:
        """lambda(t) of `epoch` (from 0, after burn-in)."""
        return pacing(
            epoch - self.burn_in + 1,
            initial=self.initial,
            grow_epochs=self.grow_epochs,
            power=self.power,
            shape=self.shape,
            steps=self.steps,
        )

    def subset_size(self, epoch: int, rows: int) -> int:
        # At least one row: a share that rounds to nothing would be an epoch without data.
        return max(1, math.floor(self.share(epoch) * rows))

    def epoch_size(self, epoch: int, rows: int) -> int:
        return self.subset_size(epoch, rows)


@dataclass(frozen=True, kw_only=True)
class Learning(Scheduler):
    """BSS-L: a sampling distribution that follows the model while it learns.

    Weight = 1 + score + 0.01 (`temperature=None`, the released code) or exp(score / temperature);
    the epoch is the first `round(fraction * N)` rows of a weighted permutation, in the order drawn.

    Args:
        temperature: Positive number that sharpens (small) or flattens (large) the distribution; None is the linear
            weight of the released code.
        fraction: Share of the rows that an epoch presents, in (0, 1]; with `grow_epochs` its initial value.
        uniform_mix: Share e in [0, 1] of the uniform distribution e / N that is mixed in, so that every row can be
            drawn.
        replacement: Whether rows are drawn with replacement.
        grow_epochs: Number of epochs in which `fraction` grows to 1; None keeps it constant.
        power: Exponent p of the shape `root` of that growth.
        shape: Shape of that growth.
        steps: Number of jumps of the shape `step`.

    Raises:
        ScheduleError: A setting is out of its range.
    """

    burn_in: int = 1
    update_interval: int = 1
    temperature: float | None = None
    fraction: float = 1.0
    uniform_mix: float = 0.0
    replacement: bool = False
    grow_epochs: int | None = None
    power: float = 2.0
    shape: Shape = "root"
    steps: int = 5

    uses_scores: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature is not None and not MIN_TEMPERATURE <= self.temperature < math.inf:
            raise ScheduleError(
                f"temperature must be at least {MIN_TEMPERATURE} and finite, or None for the linear weight "
                f"1 + score + 0.01; received {self.temperature}. For a hard choice of the best rows use Heuristic"
            )
        if not 0 <= self.uniform_mix <= 1:
            raise ScheduleError(f"uniform_mix is a share and must lie in [0, 1]; received {self.uniform_mix}")
        if not 0 < self.fraction <= 1:
            raise ScheduleError(f"fraction is a share of the rows and must lie in (0, 1]; received {self.fraction}")
        check_pacing(
            initial=self.fraction,
            grow_epochs=1 if self.grow_epochs is None else self.grow_epochs,
            power=self.power,
            shape=self.shape,
            steps=self.steps,
        )

    def share(self, epoch: int) -> float:
        """Share of the rows that `epoch` (from 0, after burn-in) presents."""
        if self.grow_epochs is None:
            return self.fraction
        return pacing(
            epoch - self.burn_in + 1,
            initial=self.fraction,
            grow_epochs=self.grow_epochs,
            power=self.power,
            shape=self.shape,
            steps=self.steps,
        )

    def epoch_size(self, epoch: int, rows: int) -> int:
        return max(1, round(self.share(epoch) * rows))

    @property
    def flatten_hint(self) -> str:
        temperature = "" if self.temperature is None else f"Raise temperature (now {self.temperature:g}), or "
        return f"{temperature}mix in the uniform distribution by uniform_mix (now {self.uniform_mix:g})".capitalize()

    def weights(self, score: np.ndarray) -> np.ndarray:
        score = np.asarray(score, dtype=np.float64)  # holders keep float32
        if self.temperature is None:
            return 1.0 + score + 0.01
        return stable_exp(score / self.temperature)
