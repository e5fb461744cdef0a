"""A holder of scores: the state of its own rows, their measures, and their keys.

`Scorer` is a plain class; `bss_ray.sample.actors` puts it into a Ray actor. It keeps 14 bytes a row:
score, similarity and information (float32) and the epoch in which the row was last drawn (uint16).
Weights and keys are made when they are asked for and forgotten again; the keys of one window's worth
of rows are kept, because a holder of more rows than that would otherwise make all its keys once more
for every window of the epoch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from bss_ray.errors import Problem, WeightError
from bss_ray.measure.criteria import Measurer
from bss_ray.measure.forward import measure_rows
from bss_ray.measure.score import Accumulate, Bounds, accumulate_scores, current_scores
from bss_ray.sample.permutation import arrivals, race_keys, weight_problems
from bss_ray.sample.radix import BINS, TOP_SHIFT, digit_counts, exact_sum, ordered_bits, within
from bss_ray.sample.threads import in_threads
from bss_ray.schedule.schedulers import Scheduler

# Rows whose weights and keys are made at a time: they stay in cache, and nothing beside the state grows.
_CHUNK_ROWS = 1 << 17

# Rows of one window: 2^24 keys and ids are 256 MiB.
WINDOW_ROWS = 1 << 24

# `last_drawn` counts epochs from 1 (0: never) and stops at the largest uint16.
_LAST_EPOCH = (1 << 16) - 1


class LostStateError(RuntimeError):
    """A holder or the coordinator was restarted and came back without its scores.

    No error of the user's: the ranks start again, and every start loads the scores of the checkpoint.
    """


@dataclass(frozen=True)
class Draw:
    """All that a holder needs to make the keys of its rows for one epoch.

    Attributes:
        seed: the run's seed.
        epoch: epoch, from 0.
        version: score version that the draw is made from.
        scheduler: gives the weight of a score.
        cutoff: None, or (bits, row): only rows of a score above that of `bits` (`ordered_bits`, of
            the negated score), or of the same score and a row id up to `row`.
        added_weight: the uniform mix: added to each eligible row's weight.
        horizon: None without replacement; else the time of the last arrival.
    """

    seed: int
    epoch: int
    version: int
    scheduler: Scheduler
    cutoff: tuple[int, int] | None = None
    added_weight: float = 0.0
    horizon: float | None = None


@dataclass(frozen=True)
class Moments:
    """Figures of the weights w of some rows.

    Attributes:
        positive: rows with w > 0.
        total: sum of w,
        squares: of w^2, and
        w_log_w: of w log w; all exact, so they do not depend on who holds which row.
        largest: largest w.
        problems: what is wrong with them; the other figures leave such rows out.
    """

    positive: int = 0
    total: Fraction = Fraction(0)
    squares: Fraction = Fraction(0)
    w_log_w: Fraction = Fraction(0)
    largest: float = 0.0
    problems: tuple[Problem, ...] = ()

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.positive + other.positive,
            self.total + other.total,
            self.squares + other.squares,
            self.w_log_w + other.w_log_w,
            max(self.largest, other.largest),
            self.problems + other.problems,
        )

    @staticmethod
    def of(weights: np.ndarray, first_row: int) -> Moments:
        """Of weights (n,) float64 of the rows from `first_row` on."""
        problems = weight_problems(weights, first_row)
        if problems:
            return Moments(problems=tuple(problems))
        positive = weights[weights > 0]
        highest = float(positive.max(initial=0.0))
        # Squares of very large or small weights leave float64's range: take a power of two out first.
        scale = math.frexp(highest)[1]
        squares = exact_sum(np.ldexp(positive, -scale) ** 2) * Fraction(4) ** scale
        w_log_w = exact_sum(positive * np.log(positive))  # np.log: only looked at, nothing is drawn from it
        return Moments(len(positive), exact_sum(positive), squares, w_log_w, highest)


@dataclass(frozen=True)
class PartState:
    """Scores of consecutive rows, as holders keep and save them.

    Attributes:
        first_row: row id of the first.
        score: (n,) float32.
        similarity: (n,) float32, of the last measurement.
        information: (n,) float32, of the last measurement.
        last_drawn: (n,) uint16, epoch + 1 in which the row was last drawn; 0 for never.
    """

    first_row: int
    score: np.ndarray
    similarity: np.ndarray
    information: np.ndarray
    last_drawn: np.ndarray

    @staticmethod
    def empty(first_row: int, rows: int) -> PartState:
        """The state before the first update."""
        score, similarity, information = (np.zeros(rows, np.float32) for _ in range(3))
        return PartState(first_row, score, similarity, information, np.zeros(rows, np.uint16))

    @property
    def stop_row(self) -> int:
        """Row id behind the last."""
        return self.first_row + len(self.score)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in STATE_COLUMNS}


STATE_COLUMNS = ("score", "similarity", "information", "last_drawn")


class _Chunk(NamedTuple):
    """Some consecutive rows of a run."""

    run: PartState
    start: int
    stop: int

    @property
    def first_row(self) -> int:
        return self.run.first_row + self.start


class Keys(NamedTuple):
    """Drawable rows with their keys, for the epoch's race.

    Attributes:
        keys: (k,) float64.
        rows: (k,) int64 row ids, ascending.
    """

    keys: np.ndarray
    rows: np.ndarray

    def within(self, low: int, high: int) -> Keys:
        """Those whose key bits lie in [low, high)."""
        here = within(self.keys.view(np.uint64), low, high)
        return Keys(self.keys[here], self.rows[here])


@dataclass
class _Prepared:
    """Own rows whose key bits lie in [low, high), one `Keys` a run."""

    draw: Draw
    low: int
    high: int
    keys: list[Keys] = field(default_factory=list)


class Scorer:
    """Scores, measures and keys of the rows of some shards.

    Args:
        spans: (first row id, rows) of each shard it holds.
        measurer: how to measure a row.
        label: name of the label column.
        batch_size: rows of a forward pass.
        device: where the model runs.
        precision: `fp32`, `bf16` or `fp16` (autocast).
    """

    def __init__(
        self,
        spans: list[tuple[int, int]],
        *,
        measurer: Measurer | None = None,
        label: str = "label",
        batch_size: int = 256,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
    ) -> None:
        self._spans = spans
        # Neighbouring shards are one run: random numbers are drawn by blocks of 65,536 row ids, and
        # small shards would draw the same block again and again.
        self._runs = [PartState.empty(first, rows) for first, rows in _joined(spans)]
        self._measurer = measurer or Measurer()
        self._label = label
        self._batch_size = batch_size
        self._device = torch.device(device)
        self._precision = precision
        self._version = 0
        self._measured: list[tuple[np.ndarray, np.ndarray]] = []
        self._top_counts: tuple[Draw, np.ndarray] | None = None
        self._prepared: _Prepared | None = None

    # ---- scores -------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all scores: the state before the first update."""
        self._replace([PartState.empty(run.first_row, len(run.score)) for run in self._runs], 0)

    def measure(self, model: nn.Module, read: Callable[[int], dict[str, np.ndarray]]) -> tuple[Bounds, Bounds]:
        """Measure all own rows with `model`; the scores stay as they are until `publish`.

        Args:
            model: maps a batch to outputs; moved to the scorer's device.
            read: columns of the i-th of the own shards, `{name: (rows, ...)}`.

        Returns:
            Bounds of similarity and of information over the own rows.

        Raises:
            ModelOutputError: outputs that cannot be measured, or NaN or infinite logits (row ids named).
        """
        model = model.to(self._device)
        self._measured = [
            measure_rows(
                model,
                read(index),
                label=self._label,
                measurer=self._measurer,
                batch_size=self._batch_size,
                device=self._device,
                precision=self._precision,
                first_row=first_row,
            )
            for index, (first_row, _) in enumerate(self._spans)
        ]
        return (
            Bounds.union([Bounds.of(similarity) for similarity, _ in self._measured]),
            Bounds.union([Bounds.of(information) for _, information in self._measured]),
        )

    def publish(
        self,
        version: int,
        similarity_bounds: Bounds,
        information_bounds: Bounds,
        momentum: float,
        accumulate: Accumulate,
    ) -> None:
        """Turn the measures into the scores of `version`, with bounds over the rows of all holders.

        Raises:
            LostStateError: the scores before, or the measures, are gone.
        """
        self._check_version(version - 1)
        if len(self._measured) != len(self._spans):
            raise LostStateError(f"there are no measures to publish as version {version}")
        measured = {first: values for (first, _), values in zip(self._spans, self._measured, strict=True)}
        runs = []
        for run in self._runs:
            shards = [measured[first] for first, _ in self._spans if run.first_row <= first < run.stop_row]
            similarity, information = (np.concatenate(column) for column in zip(*shards, strict=True))
            score = current_scores(similarity, information, similarity_bounds, information_bounds)
            if self._version:
                score = accumulate_scores(
                    run.score, score, momentum=momentum, accumulate=accumulate, updates=self._version
                )
            runs.append(PartState(run.first_row, score.astype(np.float32), similarity, information, run.last_drawn))
        self._replace(runs, version)

    def state(self, version: int) -> list[PartState]:
        """Scores and measures of all own rows.

        Raises:
            LostStateError: they are not those of `version`.
        """
        self._check_version(version)
        # Marks of drawn rows go on in the arrays at hand; what is handed out stays as it is.
        return [replace(run, last_drawn=run.last_drawn.copy()) for run in self._runs]

    def load(self, parts: list[PartState], version: int) -> int:
        """Take over scores that were saved by any holders; rows of others are passed over.

        Returns:
            How many own rows were found.
        """
        runs = [PartState.empty(run.first_row, len(run.score)) for run in self._runs]
        found = 0
        for own in runs:
            seen = np.zeros(len(own.score), dtype=bool)
            for saved in parts:
                start, stop = max(own.first_row, saved.first_row), min(own.stop_row, saved.stop_row)
                if start >= stop:
                    continue
                here = slice(start - own.first_row, stop - own.first_row)
                there = slice(start - saved.first_row, stop - saved.first_row)
                for name, values in own.arrays.items():
                    values[here] = getattr(saved, name)[there]
                seen[here] = True
            found += int(seen.sum())
        self._replace(runs, version)
        return found

    def _replace(self, runs: list[PartState], version: int) -> None:
        """New scores. The arrays are new as well: the old ones may be part of a state that was handed out."""
        self._runs, self._version, self._measured = runs, version, []
        self._top_counts = self._prepared = None

    def _check_version(self, version: int) -> None:
        if self._version != version:
            raise LostStateError(f"a scorer holds score version {self._version}, not {version}: it was restarted")

    # ---- the draw -----------------------------------------------------------------------------

    def score_counts(self, prefixes: Sequence[int], shift: int) -> np.ndarray:
        """`radix.Counts` of the negated scores: ascending is best score first."""
        return self._count(lambda chunk: _score_bits(chunk), prefixes, shift)

    def tie_counts(self, score_bits: int, prefixes: Sequence[int], shift: int) -> np.ndarray:
        """`radix.Counts` of the ids of the rows whose negated score is exactly that of `score_bits`."""

        def tied(chunk: _Chunk) -> np.ndarray:
            return (chunk.first_row + np.flatnonzero(_score_bits(chunk) == score_bits)).astype(np.uint64)

        return self._count(tied, prefixes, shift)

    def moments(self, draw: Draw) -> Moments:
        """Figures of the own rows' weights, and what is wrong with them: keys can be made only of sound ones."""
        self._check_version(draw.version)

        def look(chunk: _Chunk) -> Moments:
            return Moments.of(_weights(chunk, draw), chunk.first_row)

        return sum(in_threads(look, self._chunks()), start=Moments())

    def key_counts(self, draw: Draw, prefixes: Sequence[int], shift: int) -> np.ndarray:
        """`radix.Counts` of the own rows' keys."""
        self._check_version(draw.version)
        counts = self._count(lambda chunk: _keys(chunk, draw).keys.view(np.uint64), prefixes, shift)
        if shift == TOP_SHIFT:
            self._top_counts = (draw, counts[0])
        return counts

    def window(self, draw: Draw, low: int, high: int) -> list[Keys]:
        """Own rows whose key bits lie in [low, high): one `Keys` for each run of rows."""
        self._check_version(draw.version)
        ready = self._prepared
        if ready is None or ready.draw != draw or not ready.low <= low <= high <= ready.high:
            ready = self._prepare(draw, low, high)
        return [keys.within(low, high) for keys in ready.keys]

    def mark_drawn(self, draw: Draw, low: int, last_key: float, last_row: int) -> None:
        """Note that rows of key bits from `low` up to the row `last_row` of key `last_key` are drawn in this epoch."""
        last = int(np.array(last_key).view(np.uint64))
        for run, found in zip(self._runs, self.window(draw, low, last + 1), strict=True):
            drawn = found.rows[(found.keys < last_key) | (found.rows <= last_row)]
            run.last_drawn[drawn - run.first_row] = min(draw.epoch + 1, _LAST_EPOCH)

    def neglected(self, epoch: int, epochs: int) -> int:
        """How many own rows were not drawn in `epoch` and the epochs before it, `epochs` in all."""
        # After uint16's last epoch there is no telling; 65,535 epochs are far away.
        first = min(epoch + 1, _LAST_EPOCH) - epochs + 1
        return sum(int(np.count_nonzero(run.last_drawn < first)) for run in self._runs) if first > 0 else 0

    def _prepare(self, draw: Draw, low: int, high: int) -> _Prepared:
        """Make the keys of own rows in [low, high), and of as many beyond as one window holds."""
        self._prepared = None  # the old ones go first
        if self._top_counts is None or self._top_counts[0] != draw:
            self.key_counts(draw, [0], TOP_SHIFT)
        assert self._top_counts is not None
        digit = low >> TOP_SHIFT
        below = np.cumsum(self._top_counts[1][digit:])
        reach = digit + int(np.searchsorted(below, WINDOW_ROWS, side="right"))
        ready = _Prepared(draw, low, max(high, min(reach, BINS - 1) << TOP_SHIFT))
        found: dict[int, list[Keys]] = {run.first_row: [] for run in self._runs}

        def collect(chunk: _Chunk) -> tuple[int, Keys]:
            return chunk.run.first_row, _keys(chunk, draw).within(ready.low, ready.high)

        for first_row, keys in in_threads(collect, self._chunks()):
            found[first_row].append(keys)
        for run in self._runs:
            keys, rows = zip(*found.pop(run.first_row), strict=True)
            ready.keys.append(Keys(np.concatenate(keys), np.concatenate(rows)))
        self._prepared = ready
        return ready

    def _count(self, values: Callable[[_Chunk], np.ndarray], prefixes: Sequence[int], shift: int) -> np.ndarray:
        """`radix.Counts` of some uint64 values of the own rows."""
        counts = np.zeros((len(prefixes), BINS), dtype=np.int64)
        for part in in_threads(lambda chunk: digit_counts(values(chunk), prefixes, shift), self._chunks()):
            counts += part
        return counts

    def _chunks(self) -> Iterator[_Chunk]:
        """All own rows in order, cut where blocks of ids end: a block's numbers are drawn once."""
        for run in self._runs:
            edge = -run.first_row % _CHUNK_ROWS
            edges = [0, *range(edge or _CHUNK_ROWS, len(run.score), _CHUNK_ROWS), len(run.score)]
            for start, stop in itertools.pairwise(edges):
                yield _Chunk(run, start, stop)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """(first row id, rows) of maximal runs of consecutive rows, ascending; empty shards are left out."""
    runs: list[tuple[int, int]] = []
    for first, rows in sorted(span for span in spans if span[1]):
        if runs and sum(runs[-1]) == first:
            runs[-1] = (runs[-1][0], runs[-1][1] + rows)
        else:
            runs.append((first, rows))
    return runs


def _scores(chunk: _Chunk) -> np.ndarray:
    """(c,) float64, as schedulers expect them."""
    return chunk.run.score[chunk.start : chunk.stop].astype(np.float64)


def _score_bits(chunk: _Chunk) -> np.ndarray:
    return ordered_bits(-_scores(chunk))


def _weights(chunk: _Chunk, draw: Draw) -> np.ndarray:
    """Weights (c,) float64; 0 for rows that cannot be drawn. `Scorer.moments` has looked whether they are sound."""
    score = _scores(chunk)
    weights = np.asarray(draw.scheduler.weights(score), dtype=np.float64) + draw.added_weight
    if weights.shape != score.shape:
        name = type(draw.scheduler).__name__
        raise WeightError(f"{name}.weights must return one weight a row; {score.shape} scores gave {weights.shape}")
    if draw.cutoff is None:
        return weights
    best, last_tied = draw.cutoff
    bits, rows = ordered_bits(-score), np.arange(chunk.first_row, chunk.first_row + len(score))
    return np.where((bits < best) | ((bits == best) & (rows <= last_tied)), weights, 0.0)


def _keys(chunk: _Chunk, draw: Draw) -> Keys:
    """Keys of the rows that can be drawn; with replacement a row may have several."""
    weights = _weights(chunk, draw)
    place = {"seed": draw.seed, "epoch": draw.epoch, "first_row": chunk.first_row}
    if draw.horizon is not None:
        return Keys(*arrivals(weights, horizon=draw.horizon, **place))
    keys = race_keys(weights, **place)
    drawable = np.flatnonzero(weights)
    return Keys(keys[drawable], chunk.first_row + drawable)
