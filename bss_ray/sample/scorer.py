"""A holder of scores: the state of its own rows, their measures, and their keys.

`Scorer` is a plain class; `bss_ray.sample.actors` puts it into a Ray actor. It keeps 16 bytes a row:
score (float64), similarity and information (float32). Weights and keys are made when they are asked
for and forgotten again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import nn

from bss_ray.measure.criteria import Measurer
from bss_ray.measure.forward import measure_rows
from bss_ray.measure.score import Accumulate, Bounds, accumulate_scores, current_scores
from bss_ray.sample.permutation import arrivals, check_weights, race_keys
from bss_ray.sample.radix import digit_counts, exact_sum, ordered_bits
from bss_ray.schedule.schedulers import Scheduler

# Rows whose weights and keys are made at a time: bounds the memory beside the state.
_CHUNK_ROWS = 1 << 20


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
    """Figures of the weights of some rows; sums are exact, so they do not depend on who holds which row."""

    positive: int
    total: Fraction
    squares: Fraction
    largest: float


@dataclass
class _Part:
    """State of the rows of one shard."""

    first_row: int
    score: np.ndarray
    similarity: np.ndarray
    information: np.ndarray

    @property
    def stop_row(self) -> int:
        return self.first_row + len(self.score)

    def clear(self) -> None:
        # New arrays: the old ones may be part of a state that was handed out.
        rows = len(self.score)
        self.score, self.similarity, self.information = (np.zeros(rows, kind) for kind in (float, "f4", "f4"))


@dataclass(frozen=True)
class PartState:
    """Scores of consecutive rows as they are saved.

    Attributes:
        first_row: row id of the first.
        score: (n,) float64.
        similarity: (n,) float32, of the last measurement.
        information: (n,) float32, of the last measurement.
    """

    first_row: int
    score: np.ndarray
    similarity: np.ndarray
    information: np.ndarray


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
        self._parts = [
            _Part(first, np.zeros(rows), np.zeros(rows, np.float32), np.zeros(rows, np.float32))
            for first, rows in spans
        ]
        self._measurer = measurer or Measurer()
        self._label = label
        self._batch_size = batch_size
        self._device = torch.device(device)
        self._precision = precision
        self._version = 0
        self._measured: list[tuple[np.ndarray, np.ndarray]] = []

    # ---- scores -------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget all scores: the state before the first update."""
        for part in self._parts:
            part.clear()
        self._version, self._measured = 0, []

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
                first_row=part.first_row,
            )
            for index, part in enumerate(self._parts)
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
        if len(self._measured) != len(self._parts):
            raise LostStateError(f"there are no measures to publish as version {version}")
        for part, measured in zip(self._parts, self._measured, strict=True):
            part.similarity, part.information = measured
            current = current_scores(part.similarity, part.information, similarity_bounds, information_bounds)
            part.score = (
                accumulate_scores(part.score, current, momentum=momentum, accumulate=accumulate, updates=self._version)
                if self._version
                else current
            )
        self._version, self._measured = version, []

    def state(self, version: int) -> list[PartState]:
        """Scores and measures of all own rows.

        Raises:
            LostStateError: they are not those of `version`.
        """
        self._check_version(version)
        return [PartState(p.first_row, p.score, p.similarity, p.information) for p in self._parts]

    def load(self, parts: list[PartState], version: int) -> int:
        """Take over scores that were saved by any holders; rows of others are passed over.

        Returns:
            How many own rows were found.
        """
        found = 0
        for own in self._parts:
            own.clear()
            seen = np.zeros(len(own.score), dtype=bool)
            for saved in parts:
                start = max(own.first_row, saved.first_row)
                stop = min(own.stop_row, saved.first_row + len(saved.score))
                if start >= stop:
                    continue
                here = slice(start - own.first_row, stop - own.first_row)
                there = slice(start - saved.first_row, stop - saved.first_row)
                own.score[here] = saved.score[there]
                own.similarity[here] = saved.similarity[there]
                own.information[here] = saved.information[there]
                seen[here] = True
            found += int(seen.sum())
        self._version, self._measured = version, []
        return found

    def _check_version(self, version: int) -> None:
        if self._version != version:
            raise LostStateError(f"a scorer holds score version {self._version}, not {version}: it was restarted")

    # ---- the draw -----------------------------------------------------------------------------

    def score_counts(self, prefix: int, shift: int) -> np.ndarray:
        """`radix.Counts` of the negated scores: ascending is best score first."""
        return sum(
            (digit_counts(ordered_bits(-part.score), prefix, shift) for part in self._parts),
            start=np.zeros(1 << 16, dtype=np.int64),
        )

    def tie_counts(self, score_bits: int, prefix: int, shift: int) -> np.ndarray:
        """`radix.Counts` of the ids of the rows whose negated score is exactly that of `score_bits`."""
        counts = np.zeros(1 << 16, dtype=np.int64)
        for part in self._parts:
            tied = np.flatnonzero(ordered_bits(-part.score) == score_bits)
            counts += digit_counts((part.first_row + tied).astype(np.uint64), prefix, shift)
        return counts

    def moments(self, draw: Draw) -> Moments:
        """Figures of the own rows' weights.

        Raises:
            WeightError: a scheduler returned weights from which no order can be drawn.
        """
        self._check_version(draw.version)
        positive, total, squares, largest = 0, Fraction(0), Fraction(0), 0.0
        for _, weights in self._weights(draw):
            positive += int(np.count_nonzero(weights))
            total += exact_sum(weights)
            # Squares of very large or small weights leave float64's range: take a power of two out first.
            highest = float(weights.max(initial=0.0))
            scale = math.frexp(highest)[1]
            squares += exact_sum(np.ldexp(weights, -scale) ** 2) * Fraction(4) ** scale
            largest = max(largest, highest)
        return Moments(positive, total, squares, largest)

    def key_counts(self, draw: Draw, prefix: int, shift: int) -> np.ndarray:
        """`radix.Counts` of the own rows' keys."""
        counts = np.zeros(1 << 16, dtype=np.int64)
        for keys, _ in self._keys(draw):
            counts += digit_counts(keys.view(np.uint64), prefix, shift)
        return counts

    def window(self, draw: Draw, low: int, high: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Own rows whose key bits lie in [low, high).

        Returns:
            A list of (keys (k,) float64, row ids (k,) int64); row ids ascend within a piece, and no
            piece reaches into the rows of another.
        """
        self._check_version(draw.version)
        pieces = []
        for keys, rows in self._keys(draw):
            bits = keys.view(np.uint64)
            here = (bits >= low) & (bits <= high - 1)
            if here.any():
                pieces.append((keys[here], rows[here]))
        return pieces

    def _weights(self, draw: Draw) -> Iterator[tuple[int, np.ndarray]]:
        """(first row id, checked weights (c,) float64) of the own rows, a chunk at a time."""
        for part in self._parts:
            for start in range(0, len(part.score), _CHUNK_ROWS):
                score = part.score[start : start + _CHUNK_ROWS]
                first_row = part.first_row + start
                weights = check_weights(draw.scheduler.weights(score), first_row) + draw.added_weight
                if draw.cutoff is not None:
                    bits, last_tied = ordered_bits(-score), draw.cutoff[1]
                    rows = np.arange(first_row, first_row + len(score))
                    eligible = (bits < draw.cutoff[0]) | ((bits == draw.cutoff[0]) & (rows <= last_tied))
                    weights = np.where(eligible, weights, 0.0)
                yield first_row, weights

    def _keys(self, draw: Draw) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(keys, row ids) of the own rows that can be drawn, a chunk at a time."""
        for first_row, weights in self._weights(draw):
            if draw.horizon is not None:
                yield arrivals(weights, horizon=draw.horizon, seed=draw.seed, epoch=draw.epoch, first_row=first_row)
                continue
            keys = race_keys(weights, seed=draw.seed, epoch=draw.epoch, first_row=first_row)
            drawable = np.flatnonzero(weights)
            yield keys[drawable], first_row + drawable
