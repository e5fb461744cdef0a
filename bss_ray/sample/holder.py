"""A holder of scores: the state of its own rows, and their keys.

`Holder` is a plain class; `HolderActor` puts it into a Ray actor. It keeps 16 bytes a row: score,
similarity and information (float32), the epoch in which the row was last drawn and the score version in which
it was last measured (uint16). Measures of the next version take 12 more, from the first that arrives until
they are published, whether scorers, ranks between epochs, or the training pass itself have made them.
Weights and keys are made when they are requested and not kept, except the keys of one window's worth of
rows, because a holder of more rows would otherwise make all its keys again for every window of the epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from bss_ray.errors import Problem, WeightError, find_problem
from bss_ray.measure.normalise import NORMALISATIONS, Norm, Normalise
from bss_ray.measure.score import Accumulation, accumulate_scores, current_scores
from bss_ray.runtime.threads import in_threads
from bss_ray.sample.permutation import arrivals, race_keys
from bss_ray.sample.plan import Draw, Keys, Moments
from bss_ray.sample.radix import BINS, TOP_SHIFT, digit_counts, ordered_bits
from bss_ray.sample.state import Ages, LostStateError, MeasureBatch, PendingMeasures, SavedScores, ScoreBlock

# Number of rows whose weights and keys are made at a time: they stay in cache, and need no memory for all rows.
_CHUNK_ROWS = 1 << 17

# Rows of one window: 2^24 keys and ids are 256 MiB.
WINDOW_ROWS = 1 << 24

_NO_PAIR = (
    "a row needs two modalities for a similarity, as unpaired=error says. Let such rows count as unpaired=neutral or "
    "lowest, or filter them out"
)

# `last_drawn` and `last_measured` count from 1 (0: never) and stop at the largest uint16.
_LAST_COUNT = (1 << 16) - 1


class HolderSummary(NamedTuple):
    """A holder's report on its measures before they are published.

    Attributes:
        similarity: Norm of the similarity of the holder's own rows.
        information: Norm of the information of the holder's own rows.
        measured: Number of rows with a measure of the next version.
        unpaired: Number of these rows that have no similarity.
        refused: Number of deliveries that were refused so far.
    """

    similarity: Norm
    information: Norm
    measured: int
    unpaired: list[Problem]
    refused: int


class _Chunk(NamedTuple):
    """Some consecutive rows of a run."""

    run: ScoreBlock
    start: int
    stop: int

    @property
    def first_row(self) -> int:
        return self.run.first_row + self.start


@dataclass
class _Prepared:
    """Own rows whose key bits are in [low, high), one `Keys` for each run of rows."""

    draw: Draw
    low: int
    high: int
    keys: list[Keys] = field(default_factory=list)


class Holder:
    """Scores, measures and keys of the rows of some shards.

    Args:
        spans: (first row id, rows) of each shard whose rows the holder has.
    """

    def __init__(self, spans: Sequence[tuple[int, int]]) -> None:
        # Neighbouring shards are one run of rows: random numbers are drawn by blocks of 65,536 row ids, and small
        # shards would draw the same block again and again.
        self._runs = [ScoreBlock.empty(first, rows) for first, rows in _joined(spans)]
        self._version = 0
        self._attempt = ""
        self._epoch = -1
        self._refused = 0
        self._top_counts: tuple[Draw, np.ndarray] | None = None
        self._prepared: _Prepared | None = None

    # ---- scores -------------------------------------------------------------------------------

    def reset(self, attempt: str = "") -> None:
        """Forget all scores: the state before the first update."""
        self._attempt = attempt
        self._replace([ScoreBlock.empty(run.first_row, len(run.score)) for run in self._runs], 0)

    def receive(self, delivery: MeasureBatch, *, epoch: int = 0, attempt: str = "", version: int | None = None) -> int:
        """Keep measures until they are published; the scores stay the same. Rows of other holders are ignored.

        Args:
            delivery: The measures.
            epoch: Epoch in which the measures were made; those of a later epoch replace those of an earlier epoch.
            attempt: Attempt of the ranks, as given to `reset` or `load`; measures of another attempt are refused.
            version: Version that the measures are for; measures for another than the next version are refused. None:
                the next version.

        Returns:
            Number of own rows in the delivery; 0 if it was refused.
        """
        if attempt != self._attempt or version not in (None, self._version + 1):
            self._refused += 1
            return 0
        if epoch > self._epoch:
            self._age_pending()
            self._epoch = epoch
        elif epoch < self._epoch:  # a late delivery, whose steps are not those of the current epoch
            delivery = delivery._replace(step=np.minimum(delivery.step, 0))
        found = 0
        for index, run in enumerate(self._runs):
            own = delivery.within(run.first_row, run.stop_row)
            if len(own.rows) == 0:
                continue
            if run.pending is None:
                self._runs[index] = run = replace(run, pending=PendingMeasures.empty(len(run.score)))
            assert run.pending is not None
            run.pending.take(own.rows - run.first_row, own)
            found += len(own.rows)
        return found

    def forget(self) -> None:
        """Forget the measures that are not published."""
        self._runs = [replace(run, pending=None) for run in self._runs]

    def _age_pending(self) -> None:
        """Mark all measures so far as those of an earlier epoch."""
        for run in self._runs:
            if run.pending is not None:
                np.minimum(run.pending.step, 0, out=run.pending.step)

    def summary(self, normalise: Normalise, attempt: str | None = None) -> HolderSummary:
        """The own rows' part of the normalisation over all rows, from their latest measures.

        Raises:
            LostStateError: The measures are not those of this attempt of the ranks.
        """
        self._check(self._version, attempt)
        kind = NORMALISATIONS[normalise]
        norms: list[list[Norm]] = [[], []]
        measured, unpaired = 0, []
        for run in self._runs:
            known = run.last_measured > 0
            if run.pending is not None:
                known |= run.pending.measured
                measured += int(np.count_nonzero(run.pending.measured))
                unpaired += find_problem(
                    _NO_PAIR, np.isnan(run.pending.similarity) & run.pending.measured, run.first_row
                )
            for norm, name in zip(norms, ("similarity", "information"), strict=True):
                values = _latest(run, name)
                norm.append(kind.of(values if known.all() else values[known]))
        similarity, information = (kind.union(norm) for norm in norms)  # type: ignore[arg-type]
        return HolderSummary(similarity, information, measured, unpaired, self._refused)

    def publish(
        self,
        version: int,
        norms: tuple[Norm, Norm],
        accumulation: Accumulation,
    ) -> None:
        """Turn the current measures into the scores of `version`, with norms over the rows of all holders.

        Rows that have not been measured keep their score.

        Raises:
            LostStateError: The earlier scores are lost.
        """
        self._check_version(version - 1)

        def update(chunk: _Chunk) -> None:
            pending = chunk.run.pending
            if pending is None:
                return
            here = slice(chunk.start, chunk.stop)
            old, new = chunk.run, runs[chunk.run.first_row]
            fresh = pending.measured[here]
            similarity, information = pending.similarity[here], pending.information[here]
            current = current_scores(similarity, information, norms, accumulation.unpaired)
            if version > 1:
                mixed = accumulate_scores(old.score[here], current, accumulation, updates=version - 1)
                current = np.where(old.last_measured[here] > 0, mixed, current)
            columns: dict[str, Any] = {
                "score": current,
                "similarity": similarity,
                "information": information,
                "last_measured": min(version, _LAST_COUNT),
            }
            for name, values in columns.items():
                np.copyto(getattr(new, name)[here], values, where=fresh, casting="same_kind")

        # New arrays, because the old arrays may be part of a state that was handed out.
        runs = {run.first_row: run.copy() for run in self._runs}
        for _ in in_threads(update, self._chunks()):
            pass
        self._replace(list(runs.values()), version)

    def ages(self, version: int) -> Ages:
        """Ages of the own rows' scores.

        Raises:
            LostStateError: The scores are not those of `version`.
        """
        self._check_version(version)
        found = Ages()
        for run in self._runs:
            ages = min(self._version, _LAST_COUNT) - run.last_measured[run.last_measured > 0].astype(np.int64)
            found += Ages(len(ages), int(ages.sum()), int(ages.max(initial=0)))
        return found

    def state(self, version: int, attempt: str | None = None) -> list[ScoreBlock]:
        """Scores and measures of all own rows.

        Raises:
            LostStateError: The state is not that of `version`, or not of this attempt of the ranks.
        """
        self._check(version, attempt)
        # Later marks of drawn rows and measures change the arrays of this holder, so copies are handed out.
        return [
            replace(run, last_drawn=run.last_drawn.copy(), pending=None if run.pending is None else run.pending.copy())
            for run in self._runs
        ]

    def load(self, saved: SavedScores | list[ScoreBlock], version: int, attempt: str = "") -> int:
        """Load scores that any holders have saved; rows of other holders are ignored.

        Args:
            saved: The saved scores, or a place from which those that overlap the own rows are read.
            version: Version of the saved scores.
            attempt: Attempt of the ranks; from now on measures of another attempt are refused.

        Returns:
            Number of own rows that were found.
        """
        runs = [ScoreBlock.empty(run.first_row, len(run.score)) for run in self._runs]
        parts = saved if isinstance(saved, list) else saved.scores(runs[0].first_row, runs[-1].stop_row)
        found = 0
        for index, own in enumerate(runs):
            seen = np.zeros(len(own.score), dtype=bool)
            for part in parts:
                start, stop = max(own.first_row, part.first_row), min(own.stop_row, part.stop_row)
                if start >= stop:
                    continue
                here = slice(start - own.first_row, stop - own.first_row)
                there = slice(start - part.first_row, stop - part.first_row)
                for name, values in own.arrays.items():
                    values[here] = getattr(part, name)[there]
                if part.pending is not None:
                    if own.pending is None:
                        runs[index] = own = replace(own, pending=PendingMeasures.empty(len(own.score)))
                    assert own.pending is not None
                    for name, values in own.pending.arrays.items():
                        values[here] = getattr(part.pending, name)[there]
                seen[here] = True
            found += int(seen.sum())
        self._attempt = attempt
        self._replace(runs, version)
        return found

    def _replace(self, runs: list[ScoreBlock], version: int) -> None:
        """Set new scores in new arrays, because the old arrays may be part of a state that was handed out."""
        self._runs, self._version, self._epoch = runs, version, -1
        self._top_counts = self._prepared = None

    def _check(self, version: int, attempt: str | None) -> None:
        """In the first epochs an empty holder has the right version, but measures that it had taken are lost."""
        self._check_version(version)
        if attempt not in (None, self._attempt):
            raise LostStateError("a holder has lost the measures of this attempt of the ranks: it was restarted")

    def _check_version(self, version: int) -> None:
        if self._version != version:
            raise LostStateError(f"a holder has score version {self._version}, not {version}: it was restarted")

    # ---- the draw -----------------------------------------------------------------------------

    def score_counts(self, prefixes: Sequence[int], shift: int) -> np.ndarray:
        """`radix.Counts` of the negated scores, whose ascending order puts the best score first."""
        return self._count(lambda chunk: _score_bits(chunk), prefixes, shift)

    def tie_counts(self, score_bits: int, prefixes: Sequence[int], shift: int) -> np.ndarray:
        """`radix.Counts` of the ids of the rows whose negated score has exactly the bits `score_bits`."""

        def tied(chunk: _Chunk) -> np.ndarray:
            return (chunk.first_row + np.flatnonzero(_score_bits(chunk) == score_bits)).astype(np.uint64)

        return self._count(tied, prefixes, shift)

    def moments(self, draw: Draw) -> Moments:
        """Figures of the own rows' weights, and their problems: keys can be made only from sound weights."""
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
        """Own rows whose key bits are in [low, high), with one `Keys` for each run of rows."""
        self._check_version(draw.version)
        ready = self._prepared
        if ready is None or ready.draw != draw or not ready.low <= low <= high <= ready.high:
            ready = self._prepare(draw, low, high)
        return [keys.within(low, high) for keys in ready.keys]

    def mark_drawn(self, draw: Draw, low: int, last_key: float, last_row: int) -> None:
        """Mark rows with key bits from `low` up to the row `last_row` of key `last_key` as drawn in this epoch."""
        last = int(np.array(last_key).view(np.uint64))
        for run, found in zip(self._runs, self.window(draw, low, last + 1), strict=True):
            drawn = found.rows[(found.keys < last_key) | (found.rows <= last_row)]
            run.last_drawn[drawn - run.first_row] = min(draw.epoch + 1, _LAST_COUNT)

    def neglected(self, epoch: int, epochs: int) -> int:
        """Number of own rows that were not drawn in the `epochs` epochs up to `epoch`."""
        # Unknown after the last epoch of uint16, 65,535.
        first = min(epoch + 1, _LAST_COUNT) - epochs + 1
        return sum(int(np.count_nonzero(run.last_drawn < first)) for run in self._runs) if first > 0 else 0

    def _prepare(self, draw: Draw, low: int, high: int) -> _Prepared:
        """Make the keys of own rows in [low, high), and of later rows up to one window's worth."""
        self._prepared = None  # the old keys are freed first
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
        """All own rows in order, divided where blocks of ids end, so that each block's numbers are drawn once."""
        for run in self._runs:
            edge = -run.first_row % _CHUNK_ROWS
            edges = [0, *range(edge or _CHUNK_ROWS, len(run.score), _CHUNK_ROWS), len(run.score)]
            for start, stop in itertools.pairwise(edges):
                yield _Chunk(run, start, stop)


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(first row id, rows) of maximal runs of consecutive rows, ascending; empty shards are left out."""
    runs: list[tuple[int, int]] = []
    for first, rows in sorted(span for span in spans if span[1]):
        if runs and sum(runs[-1]) == first:
            runs[-1] = (runs[-1][0], runs[-1][1] + rows)
        else:
            runs.append((first, rows))
    return runs


def _latest(run: ScoreBlock, name: str) -> np.ndarray:
    """(n,) latest measures of a run of rows, published or not."""
    published: np.ndarray = getattr(run, name)
    if run.pending is None:
        return published
    pending: np.ndarray = getattr(run.pending, name)
    return pending if run.pending.measured.all() else np.where(run.pending.measured, pending, published)


def _scores(chunk: _Chunk) -> np.ndarray:
    """Scores (c,) float64, as schedulers expect them."""
    return chunk.run.score[chunk.start : chunk.stop].astype(np.float64)


def _score_bits(chunk: _Chunk) -> np.ndarray:
    return ordered_bits(-_scores(chunk))


def _weights(chunk: _Chunk, draw: Draw) -> np.ndarray:
    """Weights (c,) float64; 0 for rows that cannot be drawn. `Holder.moments` has checked that they are sound."""
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
    """Keys of the rows that can be drawn; with replacement a row may have several keys."""
    weights = _weights(chunk, draw)
    place = {"seed": draw.seed, "epoch": draw.epoch, "first_row": chunk.first_row}
    if draw.horizon is not None:
        return Keys(*arrivals(weights, horizon=draw.horizon, **place))
    keys = race_keys(weights, **place)
    drawable = np.flatnonzero(weights)
    return Keys(keys[drawable], chunk.first_row + drawable)
