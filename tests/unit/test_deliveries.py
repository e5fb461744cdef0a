"""Measures on their way to the holders: in any order, twice, too late, or of ranks that are gone."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bss_ray.errors import DataError
from bss_ray.measure.measurer import Measurer
from bss_ray.measure.normalise import MinMaxNorm
from bss_ray.measure.score import Accumulation, balance_scores
from bss_ray.runtime.profiling import Profiler
from bss_ray.runtime.ranks import OneRank
from bss_ray.sample.client import LocalHolders, Publication
from bss_ray.sample.coordinator import Coordinator
from bss_ray.sample.holder import Holder
from bss_ray.sample.service import CoordinatorService
from bss_ray.sample.state import Ages, LostStateError, MeasureBatch, PendingMeasures, ScoreBlock
from bss_ray.schedule import Learning
from bss_ray.scoring import engines
from bss_ray.scoring.config import Scoring

ROWS = 12
SPANS = [[(0, 5), (9, 3)], [(5, 4)]]

Measure = tuple[int, int, float, float]  # row, step, information, similarity


def delivery(measures: list[Measure]) -> MeasureBatch:
    rows, step, information, similarity = (
        np.array([measure[place] for measure in measures], kind)
        for place, kind in enumerate((np.int64, np.int32, np.float32, np.float32))
    )
    return MeasureBatch.of(rows, similarity, information, step)


def at(*rows: int, value: float = 1.0, step: int = 0) -> MeasureBatch:
    """A delivery of one measure for some rows."""
    return delivery([(row, step, value, value) for row in rows])


def parts_of(holder: Holder, version: int = 0) -> list[ScoreBlock]:
    return holder.state(version)


def pending(holders: list[Holder], name: str, version: int = 0) -> list[Any]:
    """(N,) a column of what is not yet published; None for rows that are not measured."""
    found: list[Any] = [None] * ROWS
    for part in itertools.chain.from_iterable(holder.state(version) for holder in holders):
        if part.pending is not None:
            values = getattr(part.pending, name).tolist()
            for place in np.flatnonzero(part.pending.measured).tolist():
                found[part.first_row + place] = values[place]
    return found


# ---- one delivery ---------------------------------------------------------------------------------


class TestDelivery:
    def test_rows_in_any_order(self) -> None:
        rows = np.array([7, 2, 5])
        found = MeasureBatch.of(rows, rows / 10, rows * 10.0, np.array([1, 2, 3]))
        assert found.rows.tolist() == [2, 5, 7]
        assert found.similarity.tolist() == [0.2, 0.5, 0.7]
        assert found.information.tolist() == [20, 50, 70]
        assert found.step.tolist() == [2, 3, 1]
        assert found.step.dtype == np.int32

    def test_one_step_for_all(self) -> None:
        found = MeasureBatch.of(np.array([1, 2]), np.zeros(2), np.zeros(2), 9)
        assert found.step.tolist() == [9, 9]
        assert MeasureBatch.of(np.array([1, 2]), np.zeros(2), np.zeros(2)).step.tolist() == [0, 0]

    def test_sound_leaves_nan_rows_out(self) -> None:
        nan = np.nan
        sent = MeasureBatch.of(np.arange(4), np.array([0.1, nan, nan, 0.4]), np.array([1, 2, nan, nan]), np.arange(4))
        found = sent.sound()
        # A similarity of NaN says that there are fewer than two modalities: nothing is wrong with the row.
        assert found.rows.tolist() == [0, 1]
        assert found.information.tolist() == [1, 2]
        assert found.similarity[0] == 0.1
        assert np.isnan(found.similarity[1])
        assert found.step.tolist() == [0, 1]
        assert found.sound() is found

    def test_within(self) -> None:
        sent = at(3, 3, 4, 8, 9)
        assert sent.within(4, 9).rows.tolist() == [4, 8]
        assert sent.within(0, 4).rows.tolist() == [3, 3]
        assert sent.within(5, 8).rows.tolist() == []
        assert sent.within(0, 100).rows.tolist() == [3, 3, 4, 8, 9]


class TestTake:
    """Which of several measures of a row is kept."""

    def take(self, *sent: MeasureBatch) -> PendingMeasures:
        own = PendingMeasures.empty(6)
        for new in sent:
            own.take(new.rows, new)
        return own

    def test_measured(self) -> None:
        own = self.take(at(1, 4))
        assert own.measured.tolist() == [False, True, False, False, True, False]
        assert own.step.tolist() == [-1, 0, -1, -1, 0, -1]

    def test_a_later_step_wins(self) -> None:
        first, second = at(0, 1, value=9, step=3), at(1, 2, value=1, step=4)
        for order in ((first, second), (second, first)):
            own = self.take(*order)
            assert own.information[:3].tolist() == [9, 1, 1]
            assert own.step[:3].tolist() == [3, 4, 4]

    def test_within_one_delivery_too(self) -> None:
        for measures in itertools.permutations([(2, 5, 1.0, 0.1), (2, 7, 0.5, 0.2), (2, 6, 3.0, 0.3)]):
            own = self.take(delivery(list(measures)))
            assert (own.step[2], own.information[2], own.similarity[2]) == (7, np.float32(0.5), np.float32(0.2))

    def test_of_one_step_the_larger_information_wins_as_a_whole(self) -> None:
        low, high = delivery([(3, 4, 1.0, 0.9)]), delivery([(3, 4, 2.0, 0.1)])
        for order in ((low, high), (high, low), (low, high, low)):
            own = self.take(*order)
            # Both numbers are of one measurement.
            assert (own.information[3], own.similarity[3]) == (2.0, np.float32(0.1))

    def test_rows_without_a_similarity(self) -> None:
        nan = np.float32(np.nan)
        both = [delivery([(0, 1, 2.0, nan), (1, 1, 2.0, 0.5)]), delivery([(0, 2, 1.0, 0.5), (1, 2, 1.0, nan)])]
        for order in (both, both[::-1]):
            own = self.take(*order)
            assert own.similarity[0] == 0.5
            assert np.isnan(own.similarity[1])
            assert own.information[:2].tolist() == [1, 1]


# ---- a holder -------------------------------------------------------------------------------------

numbers = st.integers(0, 3).map(float)
late_rows = st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(0, 3), numbers, numbers), unique_by=lambda m: m[0])
new_rows = st.lists(st.tuples(st.integers(0, ROWS - 1), st.integers(1, 4), numbers, numbers), max_size=20)


@given(old=late_rows, new=new_rows, data=st.data())
def test_order_and_repetition_change_nothing(old: list[Measure], new: list[Measure], data: st.DataObject) -> None:
    """Deliveries of an epoch and of the one before it, in any pieces, in any order, some of them twice."""
    sent = []
    for epoch, measures in ((3, old), (4, new)):
        pieces: list[list[Measure]] = [[], [], []]
        for measure in measures:
            pieces[data.draw(st.integers(0, 2))].append(measure)
        sent += [(epoch, piece) for piece in pieces]
    sent = data.draw(st.permutations(sent + data.draw(st.lists(st.sampled_from(sent), max_size=3))))
    holders = [Holder(spans) for spans in SPANS]
    for epoch, piece in sent:
        LocalHolders(holders).deliver(delivery(piece), epoch=epoch)

    kept: dict[int, tuple[Any, ...]] = {}
    for epoch, measures in ((3, old), (4, new)):
        for row, step, information, similarity in measures:
            kept[row] = max(kept.get(row, ()), (epoch, step, information, similarity))
    assert pending(holders, "information") == [kept[row][2] if row in kept else None for row in range(ROWS)]
    assert pending(holders, "similarity") == [kept[row][3] if row in kept else None for row in range(ROWS)]
    # Once the second epoch is known, steps are counted in it.
    expected = {row: step if epoch == 4 else 0 for row, (epoch, step, _, _) in kept.items()}
    assert pending(holders, "step") == [expected.get(row) for row in range(ROWS)]


class TestReceive:
    def test_counts_own_rows(self) -> None:
        holder = Holder(SPANS[0])
        assert holder.receive(at(0, 4, 5, 8, 9, 11)) == 4
        assert holder.receive(at(5, 6)) == 0
        assert pending([holder], "step") == [0, None, None, None, 0, None, None, None, None, 0, None, 0]

    @pytest.mark.parametrize("turned", [False, True])
    def test_a_later_epoch_wins_over_any_step(self, turned: bool) -> None:
        holder = Holder([(0, ROWS)])
        sent = [(at(0, 1, value=9, step=500), 3), (at(1, 2, value=1, step=2), 4)]
        for new, epoch in reversed(sent) if turned else sent:
            assert holder.receive(new, epoch=epoch) == 2
        assert pending([holder], "information")[:4] == [9, 1, 1, None]
        assert pending([holder], "step")[:4] == [0, 2, 2, None]
        # What is of the epoch before counts as measured, and any step of this one replaces it.
        holder.receive(at(0, value=2, step=1), epoch=4)
        assert pending([holder], "information")[0] == 2

    def test_scores_stay_until_they_are_published(self) -> None:
        holder = Holder([(0, ROWS)])
        holder.receive(at(*range(ROWS), value=3))
        (part,) = holder.state(0)
        assert not part.score.any()
        assert not part.information.any()
        assert not part.last_measured.any()

    def test_other_attempts_are_refused_and_counted(self) -> None:
        holder = Holder([(0, ROWS)])
        holder.reset("second")
        assert holder.receive(at(0, 1), attempt="first") == 0
        assert holder.receive(at(0, 1), epoch=99, attempt="") == 0
        assert holder.receive(at(2, value=5), attempt="second") == 1
        assert pending([holder], "information")[:3] == [None, None, 5]
        assert holder.summary("minmax").refused == 2
        # A refused epoch has not begun.
        holder.receive(at(2, value=4, step=7), epoch=1, attempt="second")
        assert pending([holder], "step")[2] == 7

    def test_measures_for_another_version_are_refused_and_counted(self) -> None:
        """Of a scorer that was taken for lost, say, and delivers when its version is out."""
        holder = Holder([(0, ROWS)])
        assert holder.receive(at(*range(ROWS)), version=1) == ROWS
        holder.publish(1, (MinMaxNorm(0, 1), MinMaxNorm(0, 1)), Accumulation())
        assert holder.receive(at(0, value=9), version=1) == 0
        assert holder.receive(at(0, value=9), version=3) == 0
        assert holder.summary("minmax").refused == 2
        assert holder.receive(at(0, value=9), version=2) == 1

    def test_load_names_the_attempt_too(self) -> None:
        holder = Holder([(0, ROWS)])
        holder.load(holder.state(0), 0, "third")
        assert holder.receive(at(0), attempt="second") == 0
        assert holder.receive(at(0), attempt="third") == 1

    def test_forget_and_reset(self) -> None:
        holder = Holder([(0, ROWS)])
        holder.receive(at(0, 1))
        holder.forget()
        assert holder.summary("minmax").measured == 0
        holder.receive(at(0, 1), epoch=5)
        holder.reset()
        assert holder.summary("minmax").measured == 0
        holder.receive(at(0, step=3), epoch=0)  # epochs begin anew
        assert pending([holder], "step")[0] == 3

    def test_what_was_handed_out_stays(self) -> None:
        holder = Holder([(0, ROWS)])
        holder.receive(at(0, 1, value=1))
        (part,) = holder.state(0)
        holder.receive(at(0, 1, 2, value=7, step=4))
        holder.receive(at(3), epoch=2)
        assert part.pending is not None
        assert part.pending.information[:3].tolist() == [1, 1, 0]
        assert part.pending.step[:3].tolist() == [0, 0, -1]

    def test_saved_measures_go_on_elsewhere(self) -> None:
        """Those of a checkpoint in the middle of an epoch, with other holders."""
        first = [Holder(spans) for spans in SPANS]
        holders = LocalHolders(first)
        holders.deliver(at(0, 5, 9, value=2, step=3), epoch=4)
        parts = [part for holder in first for part in holder.state(0)]
        second = [Holder([(0, 7)]), Holder([(7, 5)])]
        for holder in second:
            holder.load(parts, 0, "x")
        LocalHolders(second).deliver(at(5, 6, value=1, step=4), epoch=4, attempt="x")
        LocalHolders(first).deliver(at(5, 6, value=1, step=4), epoch=4)
        assert pending(second, "information") == pending(first, "information")
        assert pending(second, "information")[5:7] == [1, 1]


# ---- publication ----------------------------------------------------------------------------------


class Published:
    """A coordinator over the holders of `SPANS`."""

    def __init__(self, **accumulation: Any) -> None:
        self.each = [Holder(spans) for spans in SPANS]
        self.holders = LocalHolders(self.each)
        self.coordinator = Coordinator(
            self.holders,
            rows=ROWS,
            scheduler=Learning(),
            batch_size=2,
            accumulation=Accumulation(**accumulation),
        )

    def column(self, name: str) -> list[float]:
        parts = sorted(self.coordinator.state(), key=lambda part: part.first_row)
        return [float(value) for part in parts for value in getattr(part, name)]

    def deliver(self, rows: Any, similarity: np.ndarray, information: np.ndarray, epoch: int = 0) -> None:
        index = np.array(rows)
        new = MeasureBatch.of(index, similarity[index], information[index])
        self.holders.deliver(new, epoch=epoch, attempt=self.coordinator.attempt)


def measures(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random(ROWS).astype(np.float32), rng.exponential(size=ROWS).astype(np.float32)


EVERYONE = list(range(ROWS))


class TestPublish:
    def test_rows_that_were_not_measured_keep_score_and_age(self) -> None:
        run = Published(momentum=0.5)
        old, new = measures(1), measures(2)
        run.deliver(EVERYONE, *old)
        assert run.coordinator.publish(1, expected=ROWS) == Publication(1, measured=ROWS)
        before = run.column("score")
        assert before == balance_scores(*old).tolist()
        some = [1, 5, 6, 10]
        run.deliver(some, *new)
        publication = run.coordinator.publish(2)
        assert (publication.version, publication.measured) == (2, 4)
        latest = [np.where(np.isin(EVERYONE, some), b, a) for a, b in zip(old, new, strict=True)]
        mixed = balance_scores(*latest, previous=np.array(before), momentum=0.5).tolist()
        assert run.column("score") == [mixed[row] if row in some else before[row] for row in EVERYONE]
        assert run.column("information") == latest[1].tolist()
        assert run.column("last_measured") == [2 if row in some else 1 for row in EVERYONE]
        ages = sum((holder.ages(2) for holder in run.each), start=Ages())
        assert ages == Ages(scored=ROWS, total=ROWS - 4, oldest=1)

    def test_rows_that_are_measured_for_the_first_time_have_no_memory(self) -> None:
        run = Published(momentum=0.9)
        first, second = measures(3), measures(4)
        run.deliver(EVERYONE[:6], *first)
        run.coordinator.publish(1)
        assert run.column("score")[6:] == [0] * 6
        run.deliver(EVERYONE[6:], *second)
        run.coordinator.publish(2)
        latest = [np.where(np.arange(ROWS) < 6, a, b) for a, b in zip(first, second, strict=True)]
        assert run.column("score")[6:] == balance_scores(*latest).tolist()[6:]
        assert run.column("last_measured") == [1] * 6 + [2] * 6
        assert sum((holder.ages(2) for holder in run.each), start=Ages()) == Ages(ROWS, 6, 1)

    def test_ages_of_rows_that_were_never_measured_do_not_count(self) -> None:
        run = Published()
        run.deliver([2, 3, 7], *measures(5))
        run.coordinator.publish(1)
        assert sum((holder.ages(1) for holder in run.each), start=Ages()) == Ages(3, 0, 0)

    @pytest.mark.parametrize("version", [0, 1, 3, 7])
    def test_stale_doubled_and_early_versions_are_refused_and_counted(self, version: int) -> None:
        run = Published()
        run.deliver(EVERYONE, *measures(6))
        run.coordinator.publish(1)
        before = run.column("score")
        run.deliver(EVERYONE, *measures(7))
        for count in (1, 2, 3):
            found = run.coordinator.publish(version, expected=ROWS)
            assert (found.version, found.measured, found.refused, found.failure) == (1, 0, count, "")
        assert run.column("score") == before
        # The measures are still there.
        assert run.coordinator.publish(2, expected=ROWS)[:3] == (2, ROWS, 3)
        assert run.column("score") == balance_scores(*measures(7)).tolist()

    def test_deliveries_of_other_attempts_are_counted(self) -> None:
        run = Published()
        run.coordinator.reset()
        first = run.coordinator.attempt
        run.coordinator.reset()
        assert run.coordinator.attempt != first
        run.each[0].receive(at(0, 1, value=99), attempt=first)
        run.deliver(EVERYONE, *measures(8))
        run.each[1].receive(at(5, value=99), attempt=first)
        assert run.coordinator.publish(1, expected=ROWS)[:3] == (1, ROWS, 2)
        assert run.column("score") == balance_scores(*measures(8)).tolist()

    def test_a_holder_that_comes_back_empty_before_the_first_version(self) -> None:
        """It has the right version, but neither the attempt of the ranks nor the measures that it had taken."""
        run = Published()
        run.coordinator.reset()
        run.deliver(EVERYONE, *measures(8))
        run.each[1] = Holder(SPANS[1])
        run.holders._holders = run.each
        for call in (lambda: run.coordinator.publish(1), run.coordinator.state):
            with pytest.raises(LostStateError, match="has lost the measures of this attempt of the ranks"):
                call()
        assert run.coordinator.version == 0

    @pytest.mark.parametrize("arrived", [1, ROWS - 1])
    def test_measures_that_are_lost(self, arrived: int) -> None:
        run = Published()
        run.deliver(EVERYONE, *measures(9))
        run.coordinator.publish(1)
        before = run.column("score")
        run.deliver(EVERYONE[:arrived], *measures(10))
        with pytest.raises(LostStateError, match=f"{arrived} of {ROWS} measures for score version 2 have arrived"):
            run.coordinator.publish(2, expected=ROWS)
        assert run.coordinator.version == 1
        assert run.column("score") == before

    def test_more_than_expected(self) -> None:
        # The training pass may have measured rows whose outputs were not finite when all were measured.
        run = Published()
        run.deliver(EVERYONE, *measures(9))
        assert run.coordinator.publish(1, expected=ROWS - 1).measured == ROWS

    def test_nothing_is_measured(self) -> None:
        run = Published()
        run.deliver(EVERYONE, *measures(11))
        run.coordinator.publish(1)
        before = run.column("score")
        found = run.coordinator.publish(2)
        assert (found.version, found.measured, found.failure) == (1, 0, "no rows have been measured")
        assert run.coordinator.version == 1
        assert run.column("score") == before
        run.deliver(EVERYONE, *measures(12))
        run.coordinator.forget()
        assert run.coordinator.publish(2).failure == "no rows have been measured"

    def test_measures_are_published_once(self) -> None:
        run = Published()
        run.deliver(EVERYONE, *measures(13), epoch=5)
        run.coordinator.publish(1)
        assert run.coordinator.publish(2).failure
        run.deliver([0, 1], *measures(14), epoch=0)
        assert run.coordinator.publish(2).measured == 2

    def test_rows_whose_outputs_are_not_finite_keep_their_score(self) -> None:
        run = Published()
        old, (similarity, information) = measures(15), measures(16)
        run.deliver(EVERYONE, *old)
        run.coordinator.publish(1)
        before = run.column("score")
        information[[3, 8]] = np.nan
        sound = MeasureBatch.of(np.array(EVERYONE), similarity, information).sound()
        run.holders.deliver(sound, attempt=run.coordinator.attempt)
        assert run.coordinator.publish(2, expected=ROWS - 2).measured == ROWS - 2
        assert np.isfinite(run.column("score")).all()
        assert [run.column("score")[row] for row in (3, 8)] == [before[row] for row in (3, 8)]
        assert [run.column("last_measured")[row] for row in (2, 3, 8)] == [2, 1, 1]

    def test_rows_without_a_pair(self) -> None:
        similarity, information = measures(17)
        similarity[[4, 6, 10]] = np.nan
        for unpaired in ("neutral", "lowest"):
            run = Published(unpaired=unpaired)
            run.deliver(EVERYONE, similarity, information)
            run.coordinator.publish(1)
            assert run.column("score") == balance_scores(similarity, information, unpaired=unpaired).tolist()  # type: ignore[arg-type]

    def test_rows_without_a_pair_where_that_is_an_error(self) -> None:
        run = Published(unpaired="error")
        run.deliver(EVERYONE, *measures(17))
        run.coordinator.publish(1)
        before = run.column("score")
        similarity, information = measures(18)
        similarity[[4, 6, 10]] = np.nan
        run.deliver(EVERYONE[:-1], similarity, information)
        with pytest.raises(DataError, match=r"two modal.*unpaired=error.*neutral.*\(3 rows; first row ids 4, 6, 10\)"):
            run.coordinator.publish(2)
        assert run.coordinator.version == 1
        assert run.column("score") == before


# ---- the engine that measures while it trains -------------------------------------------------------


class Fixed(nn.Module):
    """Outputs that a row's label and a number tell."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        one = nn.functional.one_hot(batch["label"], 3) * self.sharpness * (1 + batch["row_id"]).unsqueeze(1)
        return {"audio": one, "image": -one, "fused": one}


class TestOnline:
    LABELS = torch.arange(ROWS) % 3

    def batch(self, rows: Any) -> dict[str, Tensor]:
        index = torch.tensor(rows)
        return {"row_id": index, "label": self.LABELS[index]}

    def engine(self, run: Published, **scoring: Any) -> engines.OnlineEngine:
        context = SimpleNamespace(
            coordinator=CoordinatorService(run.holders, lambda _: run.coordinator),
            holders=run.holders,
            attempt=run.coordinator.attempt,
            shards=SimpleNamespace(columns=SimpleNamespace(label="label")),
            loader=SimpleNamespace(rows=lambda batch_size: iter([self.batch(EVERYONE[:7]), self.batch(EVERYONE[7:])])),
            scheduler=Learning(burn_in=0),
            measurer=Measurer(),
            scoring=Scoring(engine="online", **scoring),
            ranks=OneRank(),
            device=torch.device("cpu"),
            profiler=Profiler(False, pytest.fail),
        )
        return engines.OnlineEngine(context)  # type: ignore[arg-type]

    def train(self, engine: engines.OnlineEngine, step: int, rows: Any, sharpness: float) -> None:
        batch = self.batch(rows)
        seen = Measurer().observe(Fixed(sharpness)(batch), batch["label"])
        engine.observe(step, batch["row_id"], seen, Measurer().similarity_of(seen))

    def information(self, rows: Any, sharpness: float) -> list[float]:
        batch = self.batch(rows)
        found: list[float] = Measurer().measure(Fixed(sharpness)(batch), batch["label"]).information.tolist()
        return found

    def test_outputs_of_training_are_the_measures(self) -> None:
        run = Published()
        engine = self.engine(run)
        found = engine.update(-1, 0, Fixed(1.0))
        assert found is not None
        assert found.measured == ROWS  # all, before the first epoch
        self.train(engine, 1, [0, 3, -1, 4], sharpness=0.5)  # -1: a row that belongs to no one
        self.train(engine, 2, [3, 9, -1, -1], sharpness=0.7)
        found = engine.update(0, 1, Fixed(0.9))
        assert found is not None
        assert (found.version, found.measured) == (2, 4)
        expected = self.information(EVERYONE, 1.0)
        for rows, sharpness in (([0, 4], 0.5), ([3, 9], 0.7)):
            for row, value in zip(rows, self.information(rows, sharpness), strict=True):
                expected[row] = value
        assert run.column("information") == pytest.approx(expected, rel=1e-6)
        assert run.column("last_measured") == [2 if row in (0, 3, 4, 9) else 1 for row in EVERYONE]

    def test_a_sweep_replaces_what_training_has_measured(self) -> None:
        """It is made after the epoch, with the model of then."""
        run = Published()
        engine = self.engine(run, sweep_every=2)
        engine.update(-1, 0, Fixed(1.0))
        self.train(engine, 1, [0, 3, 4, 5], sharpness=0.5)
        self.train(engine, 40, [6, 7, 8, 11], sharpness=0.6)
        found = engine.update(0, 1, Fixed(2.0))
        assert found is not None
        assert (found.version, found.measured) == (2, ROWS)
        assert run.column("information") == pytest.approx(self.information(EVERYONE, 2.0), rel=1e-6)
        self.train(engine, 1, [2], sharpness=0.5)  # and the next epoch is measured again
        found = engine.update(1, 2, Fixed(3.0))
        assert found is not None
        assert found.measured == 1
        assert run.column("information")[2] == pytest.approx(self.information([2], 0.5)[0], rel=1e-6)
