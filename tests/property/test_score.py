"""Scoring jobs: what holds for all rows, cuts and groupings."""

import itertools

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from bss_ray.measure.score import balance_scores
from bss_ray.score.measure_files import MeasureFile, cut_runs, missing_rows
from bss_ray.score.measuring import Norms, with_row_ids, with_scores
from bss_ray.score.summary import Summary
from tests.scoring import COLUMNS

ROWS = 60


@given(st.sets(st.integers(0, 200)), st.integers(1, 40))
def test_cuts_cover_the_rows_once_and_depend_on_places_alone(rows: set[int], piece_rows: int) -> None:
    row_ids = np.array(sorted(rows), dtype=np.int64)
    cuts = list(cut_runs(row_ids, piece_rows))
    assert [row for _, piece in cuts for row in range(piece.first_row, piece.stop_row)] == sorted(rows)
    for part, piece in cuts:
        assert row_ids[part].tolist() == list(range(piece.first_row, piece.stop_row))
        assert piece.first_row // piece_rows == (piece.stop_row - 1) // piece_rows, "no piece crosses a multiple"
        assert piece.first_row - 1 not in rows or piece.first_row % piece_rows == 0
        assert piece.stop_row not in rows or piece.stop_row % piece_rows == 0


@given(st.sets(st.integers(0, 30)), st.integers(1, 30))
def test_what_is_missing_is_all_that_no_piece_holds(starts: set[int], rows: int) -> None:
    ordered = sorted(start for start in starts if start < rows)
    done = [MeasureFile(low, min(2, high - low)) for low, high in itertools.pairwise([*ordered, rows])]
    held = {row for piece in done for row in range(piece.first_row, piece.stop_row)}
    runs = missing_rows(done, rows)
    assert [row for low, high in runs for row in range(low, high)] == sorted(set(range(rows)) - held)
    assert all(low < high for low, high in runs)


measures = st.tuples(
    arrays.arrays(np.float32, ROWS, elements=st.floats(0, 1, width=32)),
    arrays.arrays(np.float32, ROWS, elements=st.floats(0, 50, width=32)),
)
cut_sets = st.sets(st.integers(1, ROWS - 1), max_size=5)


def make_parts(similarity: np.ndarray, information: np.ndarray, cuts: set[int]) -> list[pa.Table]:
    """Tables of measures, cut into parts; every seventh row has one modality, every eleventh is bad."""
    rows = np.arange(ROWS)
    bad, single = rows % 11 == 3, rows % 7 == 5
    gone = bad | single
    table = pa.table(
        {
            "name": [f"row {row}" for row in rows],
            "label": rows % 3,
            "flag": rows % 2 == 0,
            "similarity": pa.array(similarity, mask=gone),
            "information": pa.array(information, mask=bad),
            "loss_a": pa.array(information, mask=bad),
            "loss_b": pa.array(similarity, mask=gone),
        }
    )
    table = with_row_ids(table, 0)
    return [table.slice(low, high - low) for low, high in itertools.pairwise([0, *sorted(cuts), ROWS])]


@given(measures, cut_sets, st.sampled_from(["minmax", "rank"]), st.sampled_from(["neutral", "lowest"]))
def test_scores_are_the_bits_of_balance_scores_however_rows_are_cut(
    values: tuple[np.ndarray, np.ndarray], cuts: set[int], normalise: str, unpaired: str
) -> None:
    parts = make_parts(*values, cuts)
    norms = Norms.union([Norms.of(part, normalise) for part in parts])  # type: ignore[arg-type]
    scored = pa.concat_tables([with_scores(part, norms, unpaired) for part in parts])  # type: ignore[arg-type]
    good = np.arange(ROWS) % 11 != 3
    similarity = np.where(np.arange(ROWS) % 7 == 5, np.nan, values[0])
    expected = balance_scores(similarity[good], values[1][good], normalise=normalise, unpaired=unpaired)  # type: ignore[arg-type]
    found = scored["score"].to_numpy(zero_copy_only=False)
    np.testing.assert_array_equal(found[good], expected)
    assert np.isnan(found[~good]).all()


@given(measures, cut_sets)
def test_a_summary_does_not_depend_on_the_cuts(values: tuple[np.ndarray, np.ndarray], cuts: set[int]) -> None:
    def summary(parts: list[pa.Table]) -> dict[str, object]:
        norms = Norms.union([Norms.of(part, "minmax") for part in parts])
        return Summary.union([Summary.of(with_scores(part, norms, "neutral"), COLUMNS) for part in parts]).to_json()

    assert summary(make_parts(*values, cuts)) == summary(make_parts(*values, set()))
