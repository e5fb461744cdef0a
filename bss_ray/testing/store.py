"""The promises of every store of this project as tests: rows as they were given, in any order, unharmed.

    class TestMine(StoreContract):
        def make(self, shards: Sequence[Arrays]) -> Store:
            return MyStore(shards)

The tests read through `Shards.gather`, as loaders do, over a store of four shards of 41 rows.
"""

from __future__ import annotations

import abc
import itertools
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, ParamSpec, TypeVar

import numpy as np

from bss_ray.data.columns import Columns
from bss_ray.data.shards import Feature, Shard, Shards
from bss_ray.data.store import Arrays, Store
from bss_ray.errors import optional_import
from bss_ray.names import presence_column
from bss_ray.testing.processes import in_another_process

pytest: Any = optional_import("pytest", extra="testing", needed_for="the suite of tests for stores")

P = ParamSpec("P")
T = TypeVar("T")

ROWS = 41
CUTS = (0, 7, 8, 29, 41)  # one shard of a single row
ROLES = Columns(modalities=("audio", "image"), id="name", extra=("truth",))
INPUTS = (*ROLES.inputs, presence_column("audio"))  # columns of a batch; some rows have no audio

# Row ids that a batch may request.
WANTED: dict[str, list[int]] = {
    "ascending": [2, 5, 11, 40],
    "any order": [33, 7, 0, 40, 12, 8],
    "repeated": [9, 9, 3, 9, 3],
    "repeated, ascending": [3, 3, 9, 9, 9],
    "across the edges of shards": [6, 7, 8, 28, 29],
    "the shard of one row": [7],
    "first and last": [0, 40],
    "one shard": [10, 11, 12, 28],
    "all": list(range(ROWS)),
    "all, backwards": list(range(ROWS))[::-1],
    "none": [],
}


def make_columns() -> Arrays:
    """Columns of several dtypes and shapes, with text that is wider in some shards than in others."""
    rng = np.random.default_rng(0)
    has_audio = np.arange(ROWS) % 4 != 1
    names = [f"row {row}" + "é" * (row // 10) for row in range(ROWS)]
    return {
        "audio": rng.normal(size=(ROWS, 6)).astype(np.float32) * has_audio[:, None],
        "image": rng.integers(0, 256, size=(ROWS, 3, 4, 2), dtype=np.uint8),
        "label": rng.integers(0, 5, size=ROWS),
        "name": np.array(names),
        "truth": rng.random(ROWS) < 0.5,
        presence_column("audio"): has_audio,
    }


def cut_columns(columns: Arrays, cuts: Sequence[int] = CUTS) -> list[Arrays]:
    """The columns of each shard, whose text is as wide as its widest text."""
    shards = []
    for start, stop in itertools.pairwise(cuts):
        parts = {name: values[start:stop].copy() for name, values in columns.items()}
        shards.append({name: np.array(v.tolist()) if v.dtype.kind == "U" else v for name, v in parts.items()})
    return shards


def shards_over(store: Store, columns: Arrays, cuts: Sequence[int] = CUTS) -> Shards:
    """A dataset over a store that holds `cut_columns(columns, cuts)`."""
    return Shards(
        columns=ROLES,
        parts=tuple(Shard(start, stop - start, "") for start, stop in itertools.pairwise(cuts)),
        features={name: Feature(columns[name].shape[1:], columns[name].dtype.str) for name in INPUTS},
        num_classes=5,
        fingerprint="",
        store=store,
    )


class StoreContract(abc.ABC):
    """Tests of one store.

    Attributes:
        views: Whether `read` gives views of what is stored, the same memory each time, and not copies.
    """

    views: ClassVar[bool] = True

    @abc.abstractmethod
    def make(self, shards: Sequence[Arrays]) -> Store:
        """A store of these shards, `{column: (rows, ...)}` each.

        A store that needs a folder takes it from a fixture: `@pytest.fixture(autouse=True)`.
        """

    def elsewhere(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in another process; a store in a cluster overrides it by a task of the cluster."""
        return in_another_process(function, *args, **kwargs)

    # ---- reading ------------------------------------------------------------------------------

    def test_read_gives_what_was_stored(self) -> None:
        shards = cut_columns(make_columns())
        store = self.make(shards)
        for index in (2, 0, 1, 3, 2):
            _check_equal(store.read(index), shards[index], f"shard {index}")

    def test_what_is_read_cannot_be_written(self) -> None:
        store = self._store()
        for index in range(len(CUTS) - 1):
            for name, values in store.read(index).items():
                assert not values.flags.writeable, f"column {name!r} of shard {index} can be written"

    def test_reading_twice_gives_the_same_memory(self) -> None:
        if not self.views:
            pytest.skip(f"{type(self).__name__}.views is False")
        store = self._store()
        for name in INPUTS:
            assert np.shares_memory(store.read(2)[name], store.read(2)[name]), f"column {name!r} is a copy"

    # ---- batches ------------------------------------------------------------------------------

    def test_rows_come_as_they_are_asked_for(self) -> None:
        columns, shards = make_columns(), self._shards()
        for case, rows in WANTED.items():
            ids = np.array(rows, dtype=np.int64)
            _check_equal(shards.gather(ids), _rows(columns, ids, INPUTS), case)

    def test_text_is_as_wide_as_it_needs_to_be(self) -> None:
        columns, shards = make_columns(), self._shards()
        for case, rows in WANTED.items():
            ids = np.array(rows, dtype=np.int64)
            batch = shards.gather(ids, ("name", "truth"))
            assert batch["name"].tolist() == columns["name"][ids].tolist(), case
            assert batch["truth"].tolist() == columns["truth"][ids].tolist(), case

    def test_rows_go_into_given_arrays(self) -> None:
        columns, shards = make_columns(), self._shards()
        for case, rows in WANTED.items():
            ids = np.array(rows, dtype=np.int64)
            expected = _rows(columns, ids, INPUTS)
            out = {name: np.zeros_like(values) for name, values in expected.items()}
            batch = shards.gather(ids, out=out)
            _check_equal(out, expected, case)
            assert all(batch[name] is out[name] for name in INPUTS), f"{case}: other arrays came back"

    def test_writing_into_a_batch_changes_nothing_stored(self) -> None:
        columns, shards = make_columns(), self._shards()
        ids = np.arange(ROWS)
        for rows in (ids, ids[::-1].copy(), ids[10:12]):
            batch = shards.gather(rows)
            for name in INPUTS:
                batch[name][...] = 1
            _check_equal(shards.gather(ids), _rows(columns, ids, INPUTS), "after writing into a batch")

    def test_batches_share_no_memory(self) -> None:
        shards = self._shards()
        first, second = shards.gather(np.array([9, 10])), shards.gather(np.array([9, 10]))
        assert not any(np.shares_memory(first[name], second[name]) for name in INPUTS)

    def test_rows_that_do_not_exist_are_refused(self) -> None:
        shards = self._shards()
        for rows in ([-1], [ROWS], [3, ROWS, 5], [5, -7, 3]):
            with pytest.raises(IndexError, match=str(min(rows) if min(rows) < 0 else ROWS)):
                shards.gather(np.array(rows))

    # ---- travel -------------------------------------------------------------------------------

    def test_another_process_reads_the_same(self) -> None:
        columns, shards = make_columns(), self._shards()
        shards.gather(np.arange(ROWS))  # what this process has opened must not travel
        ids = np.array(WANTED["any order"])
        batch = self.elsewhere(_gather, shards, ids, ROLES.all)
        _check_equal(batch, _rows(columns, ids, ROLES.all), "in another process")

    def test_what_is_opened_does_not_travel(self) -> None:
        shards = self._shards()
        before = len(self.packed(shards.store))
        shards.gather(np.arange(ROWS))
        assert len(self.packed(shards.store)) <= before + 64

    def packed(self, store: Store) -> bytes:
        """The store after pickling."""
        return pickle.dumps(store)

    def test_some_shards_alone(self) -> None:
        columns, shards = make_columns(), self._shards()
        some = shards.only([1, 3])
        ids = np.array([40, 7, 29, 33, 7])
        _check_equal(some.gather(ids), _rows(columns, ids, INPUTS), "shards 1 and 3")
        _check_equal(some.read(1), cut_columns(columns)[3], "shard 3, now number 1")
        _check_equal(self.elsewhere(_gather, some, ids, INPUTS), some.gather(ids), "in another process")

    def test_rows_of_shards_left_out_are_refused(self) -> None:
        some = self._shards().only([1, 2])  # rows 7..28
        for row in (6, 29):
            with pytest.raises(IndexError, match=str(row)):
                some.gather(np.array([row]))

    # ---- threads ------------------------------------------------------------------------------

    def test_threads_do_not_disturb_each_other(self) -> None:
        columns, shards = make_columns(), self._shards()
        rng = np.random.default_rng(1)
        wanted = [rng.integers(0, ROWS, size) for size in rng.integers(1, 60, 200)]
        with ThreadPoolExecutor(8) as threads:
            for ids, batch in zip(wanted, threads.map(shards.gather, wanted), strict=True):
                _check_equal(batch, _rows(columns, ids, INPUTS), "in eight threads")

    # ---- helpers ------------------------------------------------------------------------------

    def _store(self) -> Store:
        return self.make(cut_columns(make_columns()))

    def _shards(self) -> Shards:
        return shards_over(self._store(), make_columns())


def _gather(shards: Shards, row_ids: np.ndarray, columns: tuple[str, ...]) -> Arrays:
    return shards.gather(row_ids, columns)


def _rows(columns: Arrays, row_ids: np.ndarray, names: Sequence[str]) -> Arrays:
    return {name: columns[name][row_ids] for name in names}


def _check_equal(found: Arrays, expected: Arrays, where: str) -> None:
    """Fail unless names, shapes, values and (but for text, whose width may differ) dtypes are equal."""
    assert set(found) == set(expected), where
    for name, values in expected.items():
        if values.dtype.kind != "U":
            assert found[name].dtype == values.dtype, f"{where}: dtype of {name!r}"
        np.testing.assert_array_equal(found[name], values, err_msg=f"{where}: column {name!r}")
