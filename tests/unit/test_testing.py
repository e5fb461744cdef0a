"""The suites of `bss_ray.testing` catch what they are there for: each bad sampler or store fails its test."""

from __future__ import annotations

import errno
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

import bss_ray
from bss_ray import testing
from bss_ray.data.store import Arrays, Store
from bss_ray.testing import Fault, FullDisk, Hang, KillRank, Raise, SamplerContract, Setup, StoreContract
from bss_ray.testing.processes import in_another_process
from tests.unit.test_sampler_contract import PermutationSampler
from tests.unit.test_store_contract import FileStore, MemoryStore, write_files

# How a test fails: an assert, `pytest.raises` without an error, or an error of the thing under test.
FAILURES = (AssertionError, pytest.fail.Exception, Exception)


# ---- bad samplers -------------------------------------------------------------------------------


class DropsARow(PermutationSampler):
    def order(self, epoch: int) -> np.ndarray:
        return super().order(epoch)[:-1]


class RepeatsARow(PermutationSampler):
    def order(self, epoch: int) -> np.ndarray:
        order = super().order(epoch)
        return np.append(order[:-1], order[0])


class RepeatsInAShortEpoch(PermutationSampler):
    """Draws with replacement as soon as it need not present all rows."""

    def order(self, epoch: int) -> np.ndarray:
        order = super().order(epoch)
        return order if self.setup.size is None else order[np.arange(len(order)) // 2]


class DrawsZeroWeights(PermutationSampler):
    """Fills the last batch up with any rows."""

    def order(self, epoch: int) -> np.ndarray:
        order, rest = super().order(epoch), np.flatnonzero(self.setup.weights == 0)
        return np.concatenate([order, rest[: -len(order) % self.setup.batch_size or len(rest)]])


class CutsUnevenBatches(PermutationSampler):
    def batches(self, epoch: int) -> Iterator[list[np.ndarray]]:
        for parts in super().batches(epoch):
            yield [part[:1] for part in parts]
            yield [part[1:] for part in parts]


class SharesUnevenly(PermutationSampler):
    def parts(self, batch: np.ndarray) -> list[np.ndarray]:
        return [batch, *(batch[:0] for _ in range(1, self.setup.ranks))]


class HasFloatRows(PermutationSampler):
    def order(self, epoch: int) -> np.ndarray:
        return super().order(epoch).astype(np.float32)


class AddsUpSeedAndEpoch(PermutationSampler):
    def order(self, epoch: int) -> np.ndarray:
        return bss_ray.weighted_permutation(self.setup.weights, seed=self.setup.seed + epoch, size=self.setup.size)


class DrawsAnew(PermutationSampler):
    drawn: ClassVar[int] = 0

    def order(self, epoch: int) -> np.ndarray:
        DrawsAnew.drawn += 1
        return bss_ray.weighted_permutation(self.setup.weights, seed=self.drawn, epoch=epoch, size=self.setup.size)


class DependsOnTheHashSeed(PermutationSampler):
    def order(self, epoch: int) -> np.ndarray:
        seed = hash(f"{self.setup.seed} {epoch}") % 2**64
        return bss_ray.weighted_permutation(self.setup.weights, seed=seed, size=self.setup.size)


class IgnoresWeights(PermutationSampler):
    def order(self, epoch: int) -> np.ndarray:
        same = (self.setup.weights > 0).astype(float)
        return bss_ray.weighted_permutation(same, seed=self.setup.seed, epoch=epoch, size=self.setup.size)


class WeighsTheFirstRowOnly(PermutationSampler):
    """The first row by weight, the others uniformly."""

    def order(self, epoch: int) -> np.ndarray:
        first = super().order(epoch)[:1]
        rest = IgnoresWeights(self.setup).order(epoch)
        return np.concatenate([first, rest[rest != first]])


class SortsByWeight(PermutationSampler):
    def order(self, epoch: int) -> np.ndarray:
        return np.argsort(-self.setup.weights, kind="stable")[: len(self.setup.positive)]


class PadsWeights(PermutationSampler):
    def order(self, epoch: int) -> np.ndarray:
        setup = self.setup
        padded = np.where(setup.weights > 0, setup.weights + 1e-3, 0)
        return bss_ray.weighted_permutation(padded, seed=setup.seed, epoch=epoch, size=setup.size)


class HasSingleWeights(PermutationSampler):
    def order(self, epoch: int) -> np.ndarray:
        with np.errstate(over="ignore"):
            single = np.clip(self.setup.weights.astype(np.float32), 0, 1e38)
        return bss_ray.weighted_permutation(single, seed=self.setup.seed, epoch=epoch, size=self.setup.size)


class DependsOnTheRanks(PermutationSampler):
    def order(self, epoch: int) -> np.ndarray:
        seed = self.setup.seed + self.setup.ranks
        return bss_ray.weighted_permutation(self.setup.weights, seed=seed, epoch=epoch, size=self.setup.size)


class SharesItsPlace(PermutationSampler):
    """All samplers of a process are at the same place."""

    everyones: ClassVar[dict[str, Any]] = {}

    def batches(self, epoch: int) -> Iterator[list[np.ndarray]]:
        self.everyones["order"] = self.order(epoch)
        for batch in range(-(-len(self.everyones["order"]) // self.setup.batch_size)):
            start = batch * self.setup.batch_size
            yield self.parts(self.everyones["order"][start : start + self.setup.batch_size])


class UsesGlobalNumbers(PermutationSampler):
    def order(self, epoch: int) -> np.ndarray:
        np.random.seed(self.setup.seed)
        return super().order(epoch)


class StartsOver(PermutationSampler):
    def restore(self, state: dict[str, Any]) -> None:
        pass


class CountsLate(PermutationSampler):
    """Moves on when the next batch is asked for: the one at hand is presented twice."""

    def batches(self, epoch: int) -> Iterator[list[np.ndarray]]:
        for parts in super().batches(epoch):
            after, self.position = self.position, (epoch, self.position[1] - 1)
            yield parts
            self.position = after


class CountsBatchesOfARank(PermutationSampler):
    """Its place is in rows of a rank, which mean something else to another number of ranks."""

    def state(self) -> dict[str, Any]:
        epoch, batch = self.position
        return {**super().state(), "position": [epoch, batch * self.setup.ranks]}

    def restore(self, state: dict[str, Any]) -> None:
        epoch, batch = state["position"]
        super().restore({**state, "position": [epoch, batch // self.setup.ranks]})


class NeverGoesBack(PermutationSampler):
    def restore(self, state: dict[str, Any]) -> None:
        before = self.position
        super().restore(state)
        self.position = max(before, self.position)


class CannotBePickled(PermutationSampler):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.key = lambda row: row


class LosesItsPlaceWhenPickled(PermutationSampler):
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.setup,)


class AcceptsAnyState(PermutationSampler):
    def restore(self, state: dict[str, Any]) -> None:
        self.position = tuple(state["position"])


class NamesNoValues(PermutationSampler):
    def restore(self, state: dict[str, Any]) -> None:
        if state["seed"] != self.setup.seed:
            raise ValueError("this state was made with another seed")
        super().restore(state)


class RepairsWeights(PermutationSampler):
    """Takes whatever it is given, and makes something of it."""

    def order(self, epoch: int) -> np.ndarray:
        weights = np.clip(np.nan_to_num(self.setup.weights), 0, 1e200)
        if not weights.any():
            weights = np.ones(len(weights))
        size = self.setup.size and min(self.setup.size, np.count_nonzero(weights))
        return bss_ray.weighted_permutation(weights, seed=self.setup.seed, epoch=epoch, size=size)


class RefusesWithoutAReason(PermutationSampler):
    def order(self, epoch: int) -> np.ndarray:
        if not np.isfinite(self.setup.weights).all():
            raise ValueError("weights must be finite")
        return super().order(epoch)


CAUGHT: list[tuple[type[PermutationSampler], str]] = [
    (DropsARow, "test_each_row_of_positive_weight_comes_once"),
    (RepeatsARow, "test_each_row_of_positive_weight_comes_once"),
    (RepeatsInAShortEpoch, "test_a_shorter_epoch_has_no_row_twice"),
    (DrawsZeroWeights, "test_rows_of_weight_zero_never_come"),
    (CutsUnevenBatches, "test_all_global_batches_but_the_last_are_full"),
    (SharesUnevenly, "test_parts_of_a_batch_differ_by_at_most_one_row"),
    (HasFloatRows, "test_row_ids_are_int64"),
    (DrawsAnew, "test_same_seed_same_order"),
    (AddsUpSeedAndEpoch, "test_each_seed_and_each_epoch_has_its_own_order"),
    (SortsByWeight, "test_each_seed_and_each_epoch_has_its_own_order"),
    (DependsOnTheHashSeed, "test_same_order_in_another_process"),
    (IgnoresWeights, "test_order_follows_the_weights"),
    (WeighsTheFirstRowOnly, "test_order_follows_the_weights"),
    (SortsByWeight, "test_order_follows_the_weights"),
    (PadsWeights, "test_only_ratios_of_weights_matter"),
    (HasSingleWeights, "test_weights_of_extreme_range"),
    (DependsOnTheRanks, "test_number_of_ranks_changes_no_global_batch"),
    (SharesItsPlace, "test_samplers_do_not_disturb_each_other"),
    (UsesGlobalNumbers, "test_global_random_state_is_untouched"),
    (StartsOver, "test_resume_at_every_step"),
    (CountsLate, "test_resume_at_every_step"),
    (NeverGoesBack, "test_restore_goes_back"),
    (DependsOnTheRanks, "test_resize_in_the_middle_of_an_epoch"),
    (CountsBatchesOfARank, "test_resize_in_the_middle_of_an_epoch"),
    (CannotBePickled, "test_pickling_at_every_step"),
    (LosesItsPlaceWhenPickled, "test_pickling_at_every_step"),
    (AcceptsAnyState, "test_state_of_another_seed_is_refused"),
    (NamesNoValues, "test_state_of_another_seed_is_refused"),
    (AcceptsAnyState, "test_state_of_other_data_is_refused"),
    (RepairsWeights, "test_weights_that_are_not_finite_are_refused"),
    (RefusesWithoutAReason, "test_weights_that_are_not_finite_are_refused"),
    (RepairsWeights, "test_negative_weights_are_refused"),
    (RepairsWeights, "test_weights_that_are_all_zero_are_refused"),
    (RepairsWeights, "test_more_rows_than_positive_weights_are_refused"),
    (PermutationSampler, "test_weights_of_another_length_are_refused"),  # it does not look at Setup.rows
]


def contract_of(sampler: type[PermutationSampler]) -> SamplerContract:
    class Contract(SamplerContract):
        def make(self, setup: Setup) -> PermutationSampler:
            return sampler(setup)

    return Contract()


@pytest.mark.parametrize(("sampler", "test"), CAUGHT, ids=[f"{sampler.__name__}-{test}" for sampler, test in CAUGHT])
def test_a_bad_sampler_is_caught(sampler: type[PermutationSampler], test: str) -> None:
    with pytest.raises(FAILURES):
        getattr(contract_of(sampler), test)()


def test_every_test_of_the_contract_catches_something() -> None:
    assert {test for _, test in CAUGHT} == {name for name in dir(SamplerContract) if name.startswith("test_")}


@pytest.mark.parametrize(
    ("promise", "test"),
    [
        ("resizable", "test_resize_in_the_middle_of_an_epoch"),
        ("picklable", "test_pickling_at_every_step"),
        ("checks_rows", "test_weights_of_another_length_are_refused"),
        ("other_process", "test_same_order_in_another_process"),
    ],
)
def test_a_promise_that_is_not_made_is_shown_as_skipped(promise: str, test: str) -> None:
    contract = contract_of(PermutationSampler)
    setattr(contract, promise, False)
    with pytest.raises(pytest.skip.Exception, match=f"{promise} is False"):
        getattr(contract, test)()


# ---- bad stores ---------------------------------------------------------------------------------


class Writable(MemoryStore):
    def read(self, shard: int) -> Arrays:
        return {name: values.copy() for name, values in super().read(shard).items()}


class OffByOne(MemoryStore):
    def take(self, shards: np.ndarray, rows: np.ndarray, out: Arrays) -> None:
        super().take(shards, np.maximum(rows - 1, 0), out)


class CutsText(MemoryStore):
    """Text as wide as the first shard's."""

    def read(self, shard: int) -> Arrays:
        width = super().read(0)["name"].dtype
        return {**super().read(shard), "name": super().read(shard)["name"].astype(width)}


class ChangesDtypes(MemoryStore):
    def __init__(self, shards: Sequence[Arrays]) -> None:
        super().__init__([{**arrays, "label": arrays["label"].astype(np.int32)} for arrays in shards])


class KeepsNumbersOfShards(MemoryStore):
    def only(self, shards: Sequence[int]) -> MemoryStore:
        return self


class HasOneBuffer(MemoryStore):
    """Every batch goes through the same memory."""

    def take(self, shards: np.ndarray, rows: np.ndarray, out: Arrays) -> None:
        self._wanted = (shards, rows)
        time.sleep(1e-4)
        shards, rows = (values[: len(rows)] for values in self._wanted)
        super().take(shards, rows, {name: values[: len(rows)] for name, values in out.items()})


class TakesItsFilesAlong(FileStore):
    def __reduce__(self) -> tuple[Any, ...]:
        return type(self)._again, (self._folders, self._opened)

    @classmethod
    def _again(cls, folders: Sequence[Path], opened: dict[int, Arrays]) -> TakesItsFilesAlong:
        store = cls(folders)
        store._opened = opened
        return store


class StaysInItsProcess(MemoryStore):
    def __reduce__(self) -> tuple[Any, ...]:
        return MemoryStore, ([{name: np.zeros_like(v) for name, v in arrays.items()} for arrays in self._shards],)


CAUGHT_STORES: list[tuple[type[Store], str]] = [
    (ChangesDtypes, "test_read_gives_what_was_stored"),
    (Writable, "test_what_is_read_cannot_be_written"),
    (Writable, "test_reading_twice_gives_the_same_memory"),
    (OffByOne, "test_rows_come_as_they_are_asked_for"),
    (OffByOne, "test_rows_go_into_given_arrays"),
    (CutsText, "test_text_is_as_wide_as_it_needs_to_be"),
    (KeepsNumbersOfShards, "test_some_shards_alone"),
    (HasOneBuffer, "test_threads_do_not_disturb_each_other"),
    (StaysInItsProcess, "test_another_process_reads_the_same"),
    (TakesItsFilesAlong, "test_what_is_opened_does_not_travel"),
]


@pytest.mark.parametrize(("store", "test"), CAUGHT_STORES, ids=[f"{s.__name__}-{t}" for s, t in CAUGHT_STORES])
def test_a_bad_store_is_caught(store: type[Any], test: str, tmp_path: Path) -> None:
    class Contract(StoreContract):
        def make(self, shards: Sequence[Arrays]) -> Store:
            made: Store = store(write_files(tmp_path, shards) if issubclass(store, FileStore) else shards)
            return made

    with pytest.raises(FAILURES):
        getattr(Contract(), test)()


# ---- faults -------------------------------------------------------------------------------------


class TestFaults:
    def test_acts_once_on_one_rank_at_one_place(self, tmp_path: Path) -> None:
        acted: list[int] = []
        fault = Fault(lambda: acted.append(1), marker=tmp_path / "fault", epoch=1, batch=2)
        for epoch in range(3):
            for batch in range(4):
                for rank in range(3):
                    assert fault.happened() == ((epoch, batch, rank) > (1, 2, 2))
                    fault.reached(epoch, batch, rank=rank, ranks=3)
        assert acted == [1]
        assert "epoch 1, global batch 2, on rank 2 of 3" in fault.marker.read_text()
        replace(fault, rank=0).reached(1, 2, rank=0, ranks=3)  # a restarted process comes by again
        assert acted == [1]

    def test_killed(self, tmp_path: Path) -> None:
        fault = Fault(KillRank(), marker=tmp_path / "fault")
        with pytest.raises(RuntimeError, match=f"exit status -{signal.SIGKILL.value}"):
            in_another_process(fault.reached, 0, 0)
        assert fault.happened()
        in_another_process(fault.reached, 0, 0)

    def test_exception(self, tmp_path: Path) -> None:
        fault = Fault(Raise(KeyError("broken")), marker=tmp_path / "fault", rank=0)
        with pytest.raises(KeyError, match="broken"):
            fault.reached(0, 0, rank=0, ranks=2)
        assert fault.happened()

    def test_hang(self) -> None:
        started = time.monotonic()
        Hang(0.05)()
        assert time.monotonic() - started >= 0.05

    def test_full_disk(self, tmp_path: Path) -> None:
        # Python ignores SIGXFSZ, so the write fails and nobody is killed.
        status = in_another_process(_write_until_it_fails, FullDisk(100), tmp_path / "file")
        assert status == (errno.EFBIG, 100)


def _write_until_it_fails(full_disk: Callable[[], None], path: Path) -> tuple[int | None, int]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    full_disk()
    try:
        path.write_bytes(bytes(150))
    except OSError as error:
        return error.errno, path.stat().st_size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)  # the result goes into a file, too
    return None, path.stat().st_size


# ---- the package --------------------------------------------------------------------------------


def test_names() -> None:
    for name in testing.__all__:
        assert getattr(testing, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = testing.Nothing


def test_faults_need_neither_pytest_nor_ray() -> None:
    code = "import bss_ray.testing, sys; bss_ray.testing.Fault; sys.exit(bool({'pytest', 'ray'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
