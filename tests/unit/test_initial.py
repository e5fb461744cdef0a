"""Scores that a run begins with: matched row by row, or refused."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bss_ray.data.arrays import ArrayStore
from bss_ray.data.columns import Columns
from bss_ray.data.shards import Feature, Shard, Shards
from bss_ray.errors import DataError
from bss_ray.measure.score import Accumulation, balance_scores
from bss_ray.sample.client import LocalHolders
from bss_ray.sample.coordinator import Coordinator
from bss_ray.sample.holder import Holder
from bss_ray.sample.state import MeasureBatch, ScoreBlock
from bss_ray.schedule import Learning
from bss_ray.train.initial import ScoresFile

ROWS = 30
EDGES = (0, 11, 12, 30)

rng = np.random.default_rng(0)
SCORE = rng.uniform(-1, 1, ROWS).astype(np.float32)
SIMILARITY = rng.random(ROWS).astype(np.float32)
INFORMATION = rng.exponential(size=ROWS).astype(np.float32)
NAMES = np.array([f"clip {7 * row % ROWS}" + "é" * (row % 3) for row in range(ROWS)])
NUMBERS = rng.permutation(1000)[:ROWS]


def shards(ids: np.ndarray | None = None) -> Shards:
    """Training rows in three shards, with an id column or without."""
    arrays = {"audio": np.zeros((ROWS, 2), np.float32), "image": np.zeros((ROWS, 2), np.float32)}
    arrays["label"] = np.zeros(ROWS, np.int64)
    features = {name: Feature(values.shape[1:], str(values.dtype)) for name, values in arrays.items()}
    if ids is not None:
        arrays["clip"] = ids
    spans = list(itertools.pairwise(EDGES))
    return Shards(
        columns=Columns(modalities=("audio", "image"), id=None if ids is None else "clip"),
        parts=tuple(Shard(start, stop - start, "") for start, stop in spans),
        features=features,
        num_classes=1,
        fingerprint="",
        store=ArrayStore([{name: values[start:stop] for name, values in arrays.items()} for start, stop in spans]),
    )


def table(**changed: Any) -> dict[str, Any]:
    """Columns of a scores file of all rows; None leaves one out."""
    columns = {"row_id": np.arange(ROWS), "score": SCORE, "similarity": SIMILARITY, "information": INFORMATION}
    return {name: values for name, values in {**columns, **changed}.items() if values is not None}


def write(path: Path, columns: dict[str, Any], order: np.ndarray | None = None) -> str:
    """A file of these columns, in another order of rows if one is given."""
    rows = pa.table(columns)
    pq.write_table(rows if order is None else rows.take(pa.array(order)), path, row_group_size=8)
    return str(path)


def scores(path: str, data: Shards | None = None, spans: Sequence[tuple[int, int]] = ((0, ROWS),)) -> list[ScoreBlock]:
    file = ScoresFile(path, data or shards())
    return [part for span in spans for part in file.scores(*span)]


def message(path: str, data: Shards | None = None, spans: Sequence[tuple[int, int]] = ((0, ROWS),)) -> str:
    with pytest.raises(DataError) as error:
        scores(path, data, spans)
    return str(error.value)


SHUFFLED = np.random.default_rng(1).permutation(ROWS)


class TestMatching:
    def check(self, parts: list[ScoreBlock], starts: Sequence[int] = (0,)) -> None:
        assert [part.first_row for part in parts] == list(starts)
        for name, expected in (("score", SCORE), ("similarity", SIMILARITY), ("information", INFORMATION)):
            values = np.concatenate([getattr(part, name) for part in parts])
            assert values.dtype == np.float32
            assert values.tolist() == expected[starts[0] :].tolist(), name
        assert all((part.last_measured == 1).all() for part in parts)
        assert not any(part.last_drawn.any() for part in parts)

    @pytest.mark.parametrize("order", [None, SHUFFLED])
    @pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint16])
    def test_by_row_id(self, tmp_path: Path, order: np.ndarray | None, dtype: Any) -> None:
        path = write(tmp_path / "scores.parquet", table(row_id=np.arange(ROWS).astype(dtype)), order)
        self.check(scores(path))

    @pytest.mark.parametrize("ids", [NAMES, NUMBERS])
    def test_by_the_ids_of_the_data(self, tmp_path: Path, ids: np.ndarray) -> None:
        # The rows of the file stand in another order, and its row ids are those of other data.
        path = write(tmp_path / "scores.parquet", table(clip=ids, row_id=np.arange(ROWS)[::-1]), SHUFFLED)
        self.check(scores(path, shards(ids)))
        path = write(tmp_path / "others.parquet", table(clip=ids, row_id=None), SHUFFLED)
        self.check(scores(path, shards(ids)))

    def test_by_row_id_where_the_file_has_no_ids(self, tmp_path: Path) -> None:
        path = write(tmp_path / "scores.parquet", table(), SHUFFLED)
        self.check(scores(path, shards(NAMES)))

    def test_ids_that_the_data_has_not(self, tmp_path: Path) -> None:
        path = write(tmp_path / "scores.parquet", table(clip=NAMES[::-1]), SHUFFLED)
        self.check(scores(path, shards()))

    @pytest.mark.parametrize("ids", [pa.array(NAMES.tolist(), pa.large_string()), pa.array(NAMES).dictionary_encode()])
    def test_other_kinds_of_text(self, tmp_path: Path, ids: pa.Array) -> None:
        path = write(tmp_path / "scores.parquet", table(clip=ids), SHUFFLED)
        self.check(scores(path, shards(NAMES)))

    @pytest.mark.parametrize("ids", [None, NAMES])
    def test_a_folder_of_several_files(self, tmp_path: Path, ids: np.ndarray | None) -> None:
        for part, rows in enumerate(np.array_split(SHUFFLED, 4)):
            write(tmp_path / f"part-{part}.parquet", table(**({} if ids is None else {"clip": ids})), rows)
        self.check(scores(str(tmp_path), shards(ids)))

    @pytest.mark.parametrize("ids", [None, NAMES])
    def test_each_holder_reads_its_own(self, tmp_path: Path, ids: np.ndarray | None) -> None:
        columns = table(**({} if ids is None else {"clip": ids}))
        path = write(tmp_path / "scores.parquet", columns, SHUFFLED)
        self.check(scores(path, shards(ids), [(0, 7), (7, 12), (12, 30)]), starts=(0, 7, 12))
        self.check(scores(path, shards(ids), [(19, 30)]), starts=(19,))

    def test_integers_and_doubles(self, tmp_path: Path) -> None:
        signs = np.arange(ROWS) % 3 - 1
        (part,) = scores(write(tmp_path / "a.parquet", table(score=signs, information=INFORMATION.astype(float))))
        assert part.score.tolist() == signs.tolist()
        assert part.information.tolist() == INFORMATION.tolist()


def nulls(values: np.ndarray, where: np.ndarray) -> pa.Array:
    return pa.array(values, mask=where)


class TestUnscored:
    def test_null_scores(self, tmp_path: Path) -> None:
        missing = np.isin(np.arange(ROWS), [0, 4, 29])
        columns = {
            name: nulls(values, missing)
            for name, values in (("score", SCORE), ("similarity", SIMILARITY), ("information", INFORMATION))
        }
        (part,) = scores(write(tmp_path / "scores.parquet", table(**columns), SHUFFLED))
        assert part.last_measured.tolist() == np.where(missing, 0, 1).tolist()
        for name, values in (("score", SCORE), ("similarity", SIMILARITY), ("information", INFORMATION)):
            assert getattr(part, name).tolist() == np.where(missing, 0, values).tolist()

    def test_nan_is_null(self, tmp_path: Path) -> None:
        score = np.where(np.arange(ROWS) == 3, np.nan, SCORE)
        (part,) = scores(write(tmp_path / "scores.parquet", table(score=score)))
        assert np.flatnonzero(part.last_measured == 0).tolist() == [3]
        assert (part.score[3], part.similarity[3], part.information[3]) == (0, 0, 0)

    def test_rows_without_a_pair_have_a_score_and_no_similarity(self, tmp_path: Path) -> None:
        lacking = np.arange(ROWS) % 4 == 1
        (part,) = scores(write(tmp_path / "scores.parquet", table(similarity=nulls(SIMILARITY, lacking))))
        assert np.isnan(part.similarity).tolist() == lacking.tolist()
        assert part.score.tolist() == SCORE.tolist()
        assert (part.last_measured == 1).all()

    def test_without_measures(self, tmp_path: Path) -> None:
        path = write(tmp_path / "scores.parquet", table(similarity=None, information=None))
        (part,) = scores(path)
        assert part.score.tolist() == SCORE.tolist()
        # No number could stand for them: normalisation would count it.
        assert np.isnan(part.similarity).all()
        assert np.isnan(part.information).all()


class TestRefused:
    def test_another_number_of_rows(self, tmp_path: Path) -> None:
        path = write(tmp_path / "scores.parquet", table(), np.arange(ROWS - 1))
        assert message(path) == (
            f"initial scores must be of the training rows, one each: {path} has 29 rows, the data 30. Score this data "
            "with `bss-ray score`"
        )

    def test_no_score(self, tmp_path: Path) -> None:
        path = write(tmp_path / "scores.parquet", table(score=None, scores=SCORE))
        assert message(path) == (
            f"initial scores need the columns `score` and `row_id` (or the data's id column): {path} has no 'score'; "
            "did you mean 'scores'? Choose from: information, row_id, scores, similarity"
        )

    def test_no_row_id(self, tmp_path: Path) -> None:
        path = write(tmp_path / "scores.parquet", table(row_id=None, rowid=np.arange(ROWS)))
        assert f"{path} has no 'row_id'; did you mean 'rowid'?" in message(path)
        assert "has no 'row_id'" in message(path, shards(NAMES))

    @pytest.mark.parametrize("spans", [[(0, ROWS)], [(0, 12), (12, ROWS)]])
    def test_a_row_that_is_missing(self, tmp_path: Path, spans: list[tuple[int, int]]) -> None:
        rows = np.arange(ROWS)
        rows[[14, 20]] = [900, -1]
        path = write(tmp_path / "scores.parquet", table(row_id=rows))
        assert message(path, spans=spans) == (
            f"initial scores: {path} has none for 2 rows; first row ids 14, 20, matched by 'row_id'"
        )

    def test_an_id_that_is_missing(self, tmp_path: Path) -> None:
        ids = NAMES.copy()
        ids[25] = "another"
        path = write(tmp_path / "scores.parquet", table(clip=ids), SHUFFLED)
        assert message(path, shards(NAMES), [(0, 12), (12, 30)]) == (
            f"initial scores: {path} has none for 1 row; first row ids 25, matched by 'clip'"
        )

    def test_a_row_twice(self, tmp_path: Path) -> None:
        rows = np.arange(ROWS)
        rows[[3, 9, 10]] = [22, 22, 5]
        path = write(tmp_path / "scores.parquet", table(row_id=rows))
        assert message(path) == f"initial scores: {path} holds 2 values of 'row_id' more than once, first 22"

    def test_an_id_twice(self, tmp_path: Path) -> None:
        ids = NAMES.copy()
        ids[7] = ids[19]
        path = write(tmp_path / "scores.parquet", table(clip=ids))
        assert message(path, shards(NAMES)) == (
            f"initial scores: {path} holds 1 value of 'clip' more than once, first {str(NAMES[19])!r}"
        )

    def test_null_ids(self, tmp_path: Path) -> None:
        path = write(tmp_path / "scores.parquet", table(clip=nulls(NUMBERS, np.arange(ROWS) == 6)))
        assert "has none for 1 row; first row ids 6, matched by 'clip'" in message(path, shards(NUMBERS))
        path = write(tmp_path / "others.parquet", table(row_id=nulls(np.arange(ROWS), np.arange(ROWS) == 6)))
        assert "has none for 1 row; first row ids 6, matched by 'row_id'" in message(path)

    @pytest.mark.parametrize("bad", [1.01, -1.5, np.inf, -np.inf, 1e30])
    def test_scores_that_are_none(self, tmp_path: Path, bad: float) -> None:
        score = SCORE.astype(float)
        score[[13, 28]] = bad
        path = write(tmp_path / "scores.parquet", table(score=score), SHUFFLED)
        assert message(path, spans=[(0, 12), (12, ROWS)]) == (
            f"balance scores lie in [-1, 1]: {path} holds others in 2 rows; first row ids 13, 28. Normalise them"
        )

    def test_ids_of_another_kind(self, tmp_path: Path) -> None:
        path = write(tmp_path / "scores.parquet", table(clip=NAMES))
        assert message(path, shards(NUMBERS)) == (
            f"initial scores: column 'clip' of {path} holds string, that of the data int64. Write ids of one kind"
        )

    @pytest.mark.parametrize("name", ["score", "information"])
    def test_text_for_numbers(self, tmp_path: Path, name: str) -> None:
        path = write(tmp_path / "scores.parquet", table(**{name: [f"s{row}" for row in range(ROWS)]}))
        assert message(path) == f"initial scores: column {name!r} of {path} must hold numbers; it holds string"

    def test_no_such_file(self, tmp_path: Path) -> None:
        path = tmp_path / "nowhere.parquet"
        assert message(str(path)) == f"initial scores: no such file or folder: {path}"

    def test_no_parquet(self, tmp_path: Path) -> None:
        path = tmp_path / "scores.parquet"
        path.write_text("row_id,score\n0,0.5\n")
        assert message(str(path)).startswith(f"initial scores cannot be read from {path}: ")

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        assert "has no 'row_id'" in message(str(tmp_path))


class TestThroughTheCoordinator:
    DEALT = ([[(0, ROWS)]], [[(0, 11), (12, 18)], [(11, 1)]])

    def coordinator(self, dealt: Any, **accumulation: Any) -> tuple[Coordinator, LocalHolders]:
        holders = LocalHolders([Holder(spans) for spans in dealt])
        coordinator = Coordinator(
            holders,
            rows=ROWS,
            scheduler=Learning(burn_in=0),
            batch_size=4,
            accumulation=Accumulation(**accumulation),
        )
        return coordinator, holders

    def scores(self, coordinator: Coordinator) -> np.ndarray:
        return np.concatenate([p.score for p in sorted(coordinator.state(), key=lambda part: part.first_row)])

    @pytest.mark.parametrize("dealt", DEALT)
    def test_they_are_the_first_version(self, tmp_path: Path, dealt: Any) -> None:
        coordinator, holders = self.coordinator(dealt, momentum=0.5)
        parts = scores(write(tmp_path / "scores.parquet", table(), SHUFFLED), spans=[(0, 12), (12, 30)])
        coordinator.load(parts, 1)
        assert coordinator.version == 1
        assert self.scores(coordinator).tolist() == SCORE.tolist()
        assert coordinator.plan(0).version == 1
        # The next update goes on from them.
        holders.deliver(MeasureBatch.of(np.arange(ROWS), SIMILARITY, INFORMATION), attempt=coordinator.attempt)
        coordinator.publish(2, expected=ROWS)
        expected = balance_scores(SIMILARITY, INFORMATION, previous=SCORE, momentum=0.5)
        assert self.scores(coordinator).tolist() == expected.tolist()

    def test_rows_without_a_score_have_no_memory(self, tmp_path: Path) -> None:
        missing = np.arange(ROWS) % 5 == 0
        coordinator, holders = self.coordinator(self.DEALT[1], momentum=0.5)
        coordinator.load(scores(write(tmp_path / "scores.parquet", table(score=nulls(SCORE, missing)))), 1)
        holders.deliver(MeasureBatch.of(np.arange(ROWS), SIMILARITY, INFORMATION), attempt=coordinator.attempt)
        coordinator.publish(2)
        fresh = balance_scores(SIMILARITY, INFORMATION)
        mixed = balance_scores(SIMILARITY, INFORMATION, previous=SCORE, momentum=0.5)
        assert self.scores(coordinator).tolist() == np.where(missing, fresh, mixed).tolist()

    @pytest.mark.parametrize("normalise", ["minmax", "rank"])
    def test_rows_without_measures_do_not_count_in_the_norm(self, tmp_path: Path, normalise: Any) -> None:
        coordinator, holders = self.coordinator(self.DEALT[1], normalise=normalise)
        coordinator.load(scores(write(tmp_path / "scores.parquet", table(similarity=None, information=None))), 1)
        some = np.arange(4, 19)
        information = INFORMATION + 50  # far from 0
        holders.deliver(MeasureBatch.of(some, SIMILARITY[some], information[some]), attempt=coordinator.attempt)
        assert coordinator.publish(2).measured == len(some)
        expected = SCORE.copy()
        expected[some] = balance_scores(SIMILARITY[some], information[some], normalise=normalise)
        assert self.scores(coordinator).tolist() == expected.tolist()
