"""The coordinator: score versions, the plan of each epoch, and reductions over all holders.

It sees counts, sums and bounds of every holder, and one window of row ids at a time, but never the scores
of all rows. `Coordinator` is a plain class, which `CoordinatorService` calls.
"""

from __future__ import annotations

import collections
import itertools
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Concatenate, NamedTuple, ParamSpec

import numpy as np

from bss_ray.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ScheduleError,
    WeightError,
    nearest,
    raise_first_problem,
)
from bss_ray.measure.normalise import join
from bss_ray.measure.score import Accumulation
from bss_ray.sample.client import Holders, Publication, Review
from bss_ray.sample.holder import WINDOW_ROWS, Holder
from bss_ray.sample.permutation import check_seed, horizon_for, sort_by_key
from bss_ray.sample.plan import TAILS, Draw, Keys, Moments, Plan, Tail
from bss_ray.sample.radix import Window, cut_windows, radix_select
from bss_ray.sample.state import Ages, LostStateError, SavedScores, ScoreBlock
from bss_ray.schedule.schedulers import Scheduler, Uniform

P = ParamSpec("P")

# Number of epochs without a draw after which a row is neglected.
NEGLECT_EPOCHS = 5

# Share of the epoch's size below which the effective sample size is worth a warning.
_PEAKED = 0.1

# Share of all rows above which neglected rows are worth a warning.
_NEGLECTED = 0.1


class _Planned(NamedTuple):
    plan: Plan
    draw: Draw
    windows: list[Window]


class Coordinator:
    """Publishes scores and plans epochs.

    Args:
        holders: Holders of the scores of all rows, each row once.
        rows: Number N of rows of the training set.
        scheduler: Scheduler, from scores to weights and sizes.
        seed: Seed of the run, in [0, 2**64).
        batch_size: Number of rows of a *global* batch.
        tail: Whether to `keep` or `drop` the last, smaller batch of an epoch.
        accumulation: How measures become scores.
        window_rows: Number of rows of the largest window of the order.

    Raises:
        ConfigError: A setting is out of its range, or there are fewer rows than a global batch.
    """

    def __init__(
        self,
        holders: Holders,
        *,
        rows: int,
        scheduler: Scheduler,
        seed: int = 0,
        batch_size: int = 64,
        tail: Tail = "keep",
        accumulation: Accumulation = Accumulation(),  # noqa: B008 (frozen)
        window_rows: int = WINDOW_ROWS,
    ) -> None:
        check_batch_size(batch_size, rows)
        if tail not in TAILS:
            raise ConfigError(f"unknown tail {tail!r}; {nearest(tail, TAILS)}")
        self._holders = holders
        self._rows = rows
        self._scheduler = scheduler
        self._seed = check_seed(seed)
        self._batch_size = batch_size
        self._tail: Tail = tail
        self._accumulation = accumulation
        self._window_rows = window_rows
        self._version = 0
        self._attempt = ""
        self._refused = 0
        # Two epochs, because a rank may still be in an epoch that others have just left.
        self._plans: collections.OrderedDict[int, _Planned] = collections.OrderedDict()
        self._reviews: dict[int, Review] = {}

    # ---- scores -------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Number of publications so far, from 0."""
        return self._version

    @property
    def attempt(self) -> str:
        """Name of the current attempt, set by `reset` or `load`. Measures of other attempts are refused."""
        return self._attempt

    def reset(self) -> None:
        """Start a new attempt without scores."""
        self._attempt = secrets.token_hex(4)  # a number would start from 0 again in a restarted coordinator
        self._holders.map(Holder.reset, self._attempt)
        self._replace(0)

    def publish(self, version: int, *, expected: int | None = None) -> Publication:
        """Publish the measures that holders have received as the scores of `version`.

        Holders keep their scores until all holders have reported: a version exists on all holders or not at all.

        Args:
            version: The next version. Any other version is stale or repeated, so it is refused and counted.
            expected: Smallest number of rows that must have been measured; None: any number. Other rows keep their
                score.

        Raises:
            DataError: Rows have fewer than two modalities, and the settings make this an error.
            LostStateError: A holder was restarted and has lost measures or the earlier scores.
        """
        if version != self._version + 1:
            self._refused += 1
            return Publication(self._version, refused=self._refused)
        similarity, information, measured, unpaired, refused = zip(
            *self._holders.map(Holder.summary, self._accumulation.normalise, self._attempt), strict=True
        )
        found = sum(measured)
        if found == 0:
            return Publication(self._version, failure="no rows have been measured")
        if expected is not None and found < expected:
            raise LostStateError(f"{found} of {expected} measures for score version {version} have arrived")
        if self._accumulation.unpaired == "error":
            problems = sorted(itertools.chain.from_iterable(unpaired), key=lambda problem: problem.first_ids[0])
            raise_first_problem(problems, DataError)
        norms = join(similarity), join(information)
        self._holders.map(Holder.publish, version, norms, self._accumulation)
        self._replace(version)
        return Publication(version, found, self._refused + sum(refused))

    def forget(self) -> None:
        """Forget the measures that are not published."""
        self._holders.map(Holder.forget)

    def load(self, saved: SavedScores | list[ScoreBlock], version: int) -> None:
        """Load saved scores for a new attempt.

        Args:
            saved: The scores, or a place from which each holder reads those of its rows.
            version: The saved version.

        Raises:
            CheckpointError: Some rows have no score.
        """
        self._attempt = secrets.token_hex(4)
        found = sum(self._holders.map(Holder.load, saved, version, self._attempt))
        if found != self._rows:
            raise CheckpointError(
                f"the checkpoint holds scores of {found} of the {self._rows} rows; a part of it is missing. "
                "Go back to an older checkpoint"
            )
        self._replace(version)

    def _replace(self, version: int) -> None:
        """Forget everything that was planned from earlier scores."""
        self._version = version
        self._plans.clear()
        self._reviews.clear()

    def state(self) -> list[ScoreBlock]:
        """Scores and measures of all rows, which are gathered; only for small data and tests."""
        return [part for parts in self._holders.map(Holder.state, self._version, self._attempt) for part in parts]

    # ---- plans --------------------------------------------------------------------------------

    def plan(self, epoch: int) -> Plan:
        """The plan of `epoch`, from the scores of the current version.

        Raises:
            ScheduleError: The scheduler needs scores and there are no scores yet.
            WeightError: Weights are bad, or fewer rows have a positive weight than the epoch presents.
        """
        return self._planned(epoch).plan

    def plan_ahead(self, epoch: int) -> None:
        """Plan the epoch after `epoch`, unless new scores come before it."""
        if not self._scheduler.scores_due_after(epoch):
            self.plan(epoch + 1)

    def _planned(self, epoch: int) -> _Planned:
        if epoch not in self._plans:
            self._plans[epoch] = self._make_plan(epoch)
            while len(self._plans) > 2:
                self._plans.popitem(last=False)
        return self._plans[epoch]

    def window(self, epoch: int, index: int) -> np.ndarray:
        """Window `index` of the order of `epoch`: (rows,) int64 row ids."""
        plan, draw, windows = self._planned(epoch)
        window = windows[index]
        wanted = plan.window_ends[index] - (plan.window_ends[index - 1] if index else 0)
        pieces: list[Keys] = [
            keys for held in self._holders.map(Holder.window, draw, window.low, window.high) for keys in held
        ]
        # Rows ascend within each part and parts do not overlap, so a stable sort breaks ties by row id.
        pieces = sorted((piece for piece in pieces if len(piece.rows)), key=lambda piece: int(piece.rows[0]))
        keys = np.concatenate([piece.keys for piece in pieces])
        rows = np.concatenate([piece.rows for piece in pieces])
        assert len(rows) == window.rows, f"window of {window.rows} rows brought {len(rows)}"
        del pieces  # one window at a time, because the parts take as much memory as their concatenation
        order = sort_by_key(keys)[:wanted]
        self._holders.map(Holder.mark_drawn, draw, window.low, float(keys[order[-1]]), int(rows[order[-1]]))
        return np.asarray(rows[order])

    def review(self, epoch: int) -> Review:
        """Report on `epoch`, all of whose windows have been made."""
        if epoch not in self._reviews:
            rows = sum(self._holders.map(Holder.neglected, epoch, NEGLECT_EPOCHS))
            ages = sum(self._holders.map(Holder.ages, self._version), start=Ages())
            self._reviews = {epoch: Review(rows, ages, _neglect_warnings(epoch, rows, self._rows, self._scheduler))}
        return self._reviews[epoch]

    def _make_plan(self, epoch: int) -> _Planned:
        scheduler = self._scheduler
        if scheduler.is_burn_in(epoch):
            scheduler = Uniform()
        elif scheduler.uses_scores and self._version == 0:
            raise ScheduleError(
                f"epoch {epoch} of {type(scheduler).__name__} is drawn from scores and none have been published. "
                "Set burn_in >= 1, or hand the model over before the first epoch: sampler.epochs(n, model=model)"
            )
        subset = scheduler.subset_size(epoch, self._rows)
        draw = Draw(
            self._seed, epoch, self._version, scheduler, cutoff=self._cutoff(subset) if subset < self._rows else None
        )
        moments = self._moments(draw)
        if scheduler.uniform_mix > 0:
            draw = self._mixed(draw, moments, subset)
            moments = self._moments(draw)
        size = scheduler.epoch_size(epoch, self._rows)
        if moments.positive == 0 or (size > moments.positive and not scheduler.replacement):
            raise WeightError(
                f"epoch {epoch} wants {size} different rows, and {moments.positive} of {self._rows} have a positive "
                "weight. Lower `fraction`, raise `uniform_mix`, or draw with replacement"
            )
        total = float(moments.total)
        if scheduler.replacement:
            draw = replace(draw, horizon=horizon_for(size, total))
        windows = cut_windows(
            lambda prefixes, shift: self._sum(Holder.key_counts, draw, prefixes, shift),
            size=size,
            limit=self._window_rows,
        )
        ends = np.minimum(np.cumsum([window.rows for window in windows]), size)
        plan = Plan(
            epoch=epoch,
            version=self._version,
            size=size,
            batch_size=self._batch_size,
            tail=self._tail,
            window_ends=tuple(int(end) for end in ends),
            diagnostics=_diagnostics(moments, size),
            warnings=_warnings(epoch, moments, size, scheduler),
        )
        return _Planned(plan, draw, windows)

    def _cutoff(self, subset: int) -> tuple[int, int]:
        """The last of the `subset` rows of highest score as (score bits, row id); ties go to the lower row id."""

        def count(prefixes: Sequence[int], shift: int) -> np.ndarray:
            return self._sum(Holder.score_counts, prefixes, shift)

        bits, among_ties = radix_select(count, subset - 1)
        row, _ = radix_select(lambda prefixes, shift: self._sum(Holder.tie_counts, bits, prefixes, shift), among_ties)
        return bits, row

    def _mixed(self, draw: Draw, moments: Moments, subset: int) -> Draw:
        """The uniform mix e / N: weight + c with c N / (total + c N) = e."""
        mix = draw.scheduler.uniform_mix
        if mix == 1:
            return replace(draw, scheduler=Uniform())
        return replace(draw, added_weight=mix / (1 - mix) * float(moments.total) / subset)

    def _moments(self, draw: Draw) -> Moments:
        moments = sum(self._holders.map(Holder.moments, draw), start=Moments())
        raise_first_problem(sorted(moments.problems, key=lambda problem: problem.first_ids[0]), WeightError)
        return moments

    def _sum(
        self, method: Callable[Concatenate[Holder, P], np.ndarray], *args: P.args, **kwargs: P.kwargs
    ) -> np.ndarray:
        """Sum of the holders' integer counts."""
        counts: np.ndarray = np.sum(self._holders.map(method, *args, **kwargs), axis=0)
        return counts


def _diagnostics(moments: Moments, size: int) -> dict[str, float]:
    """Figures of a sampling distribution p = w / sum(w), see `Plan`."""
    total = float(moments.total)
    return {
        "eligible_rows": moments.positive,
        "effective_sample_size": _effective_size(moments),
        "entropy": math.log(total) - float(moments.w_log_w / moments.total),
        "largest_share": moments.largest / total,
        "expected_draws": size / moments.positive,
    }


def _effective_size(moments: Moments) -> float:
    """(sum of w)^2 / sum of w^2: the number of rows of equal weight that would be as diverse."""
    return float(moments.total**2 / moments.squares)


def _warnings(epoch: int, moments: Moments, size: int, scheduler: Scheduler) -> dict[str, str]:
    """Messages to the user about a distribution, in plain words."""
    effective = _effective_size(moments)
    if effective >= _PEAKED * size:
        return {}
    heaviest = moments.largest / float(moments.total)
    text = (
        f"the sampling distribution of epoch {epoch} is very peaked: its effective sample size is {effective:.1f}, and "
        f"the epoch draws {size} of {moments.positive} rows; the heaviest row has {heaviest:.1%} of all weight. "
    )
    return {"peaked": text + scheduler.flatten_hint}


def _neglect_warnings(epoch: int, neglected: int, rows: int, scheduler: Scheduler) -> dict[str, str]:
    # A curriculum leaves rows out on purpose.
    if neglected < _NEGLECTED * rows or scheduler.subset_size(epoch, rows) < rows:
        return {}
    text = (
        f"{neglected} of {rows} rows ({neglected / rows:.0%}) have not been drawn in the {NEGLECT_EPOCHS} epochs up to "
        f"epoch {epoch}. {scheduler.flatten_hint}; or present a larger fraction of the rows in each epoch"
    )
    return {"neglected": text}


def check_batch_size(batch_size: int, rows: int) -> None:
    """Refuse a global batch that the data cannot fill.

    Raises:
        ConfigError: The batch size is below 1, or larger than the dataset.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size counts the rows of a global batch and must be at least 1; received {batch_size}")
    if batch_size > rows:
        raise ConfigError(
            f"a global batch must not be larger than the dataset: batch_size={batch_size}, rows={rows}. "
            "Lower batch_size"
        )
