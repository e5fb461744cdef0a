"""The promises of every sampler of this project as tests: coverage, order, resume, refusals.

    class TestMine(SamplerContract):
        def make(self, setup: Setup) -> GlobalSampler:
            return MySampler(setup.weights, seed=setup.seed, ...)

pytest collects the subclass. A promise that a sampler does not make is switched off by a class
attribute (`resizable = False`), and its tests are skipped with this reason.
"""

from __future__ import annotations

import abc
import hashlib
import itertools
import json
import pickle
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np

from bss_ray.errors import CheckpointError, optional_import
from bss_ray.testing.processes import in_another_process

pytest: Any = optional_import("pytest", extra="testing", needed_for="the suite of tests for samplers")


def _weights() -> np.ndarray:
    """41 weights over two orders of magnitude; three of them are 0, at the ends and in the middle."""
    weights = np.random.default_rng(0).lognormal(size=41)
    weights[[0, 17, 40]] = 0.0
    return weights


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a sampler is made of.

    Attributes:
        weights: (n,) float64 sampling weights, in the order of row ids.
        seed: Seed of the run.
        ranks: Number of ranks that share each global batch.
        batch_size: Number of rows of a *global* batch. 38 rows in batches of 5 leave a tail that is smaller than 8
            ranks.
        size: Number of rows of an epoch; None for all rows of positive weight.
        rows: Number of rows of the dataset; None for as many as there are weights.
    """

    weights: np.ndarray = field(default_factory=_weights)
    seed: int = 0
    ranks: int = 1
    batch_size: int = 5
    size: int | None = None
    rows: int | None = None

    @property
    def positive(self) -> np.ndarray:
        """Row ids of positive weight, ascending."""
        return np.flatnonzero(self.weights > 0)


class GlobalSampler(Protocol):
    """A sampler as a whole: the parts of all ranks of every global batch."""

    def batches(self, epoch: int) -> Iterator[list[np.ndarray]]:
        """Row ids of each rank's part, global batch by global batch.

        It begins at the sampler's position if this is in `epoch`, otherwise at the epoch's first global batch. The
        position advances before a batch is handed out: in the loop's body the batch counts as done.
        """
        ...

    def state(self) -> Any:
        """The position, and everything needed to resume from it with a sampler of the same setup."""
        ...

    def restore(self, state: Any) -> None:
        """Resume from `state`; a state of another seed or other data is a ValueError."""
        ...


class SlicedSampler(abc.ABC):
    """A sampler made from a function that gives the order of an epoch, which is cut into batches and parts of ranks.

    It is the simplest sampler that keeps the contract, for orders without a sampler of their own.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.position = (0, 0)

    @abc.abstractmethod
    def order(self, epoch: int) -> np.ndarray:
        """(size,) int64 row ids of the epoch, in their order."""

    def batches(self, epoch: int) -> Iterator[list[np.ndarray]]:
        at, start = self.position
        order, size = self.order(epoch), self.setup.batch_size
        for batch in range(start if at == epoch else 0, -(-len(order) // size)):
            self.position = (epoch, batch + 1)
            yield self.parts(order[batch * size : (batch + 1) * size])

    def parts(self, batch: np.ndarray) -> list[np.ndarray]:
        """Each rank's part of a global batch."""
        return [batch[rank :: self.setup.ranks] for rank in range(self.setup.ranks)]

    def state(self) -> dict[str, Any]:
        return {"position": list(self.position), "seed": self.setup.seed, "data": self._data()}

    def restore(self, state: dict[str, Any]) -> None:
        for name, own in (("seed", self.setup.seed), ("data", self._data())):
            if state[name] != own:
                raise CheckpointError(f"this state was made with another {name}: {state[name]}, now {own}")
        epoch, batch = state["position"]
        self.position = (epoch, batch)

    def _data(self) -> str:
        return hashlib.blake2b(self.setup.weights.tobytes(), digest_size=8).hexdigest()


def global_batches(sampler: GlobalSampler, epoch: int) -> list[list[int]]:
    """Sorted row ids of each global batch over all its ranks, from the sampler's position on."""
    return [sorted(int(row) for part in parts for row in part) for parts in sampler.batches(epoch)]


class SamplerContract(abc.ABC):
    """Tests of one sampler.

    Attributes:
        resizable: Whether a state can be resumed with another number of ranks, and global batches do not depend on that
            number.
        picklable: Whether the sampler itself can be pickled, at any step.
        json_state: Whether its state is plain JSON; if not, the state must survive pickling.
        checks_rows: Whether it knows the data's number of rows and refuses weights of another length.
        sees_all_weights: Whether a refusal of bad weights counts all of them; if not, it counts those of one process.
        other_process: Whether it can be made in a fresh process (not if it needs a running cluster).
        seeds, epochs: Numbers whose product is the number of first draws that are compared with the weights.
    """

    resizable: ClassVar[bool] = True
    picklable: ClassVar[bool] = True
    json_state: ClassVar[bool] = True
    checks_rows: ClassVar[bool] = True
    sees_all_weights: ClassVar[bool] = True
    other_process: ClassVar[bool] = True
    seeds: ClassVar[int] = 24
    epochs: ClassVar[int] = 10

    @abc.abstractmethod
    def make(self, setup: Setup) -> GlobalSampler:
        """A new sampler, at the start of epoch 0.

        Bad weights raise a ValueError here or at the first batch.
        """

    # ---- coverage -----------------------------------------------------------------------------

    def test_each_row_of_positive_weight_comes_once(self) -> None:
        for epoch in range(3):
            assert sorted(self._rows(Setup(), epoch)) == Setup().positive.tolist()

    def test_rows_of_weight_zero_never_come(self) -> None:
        weights = np.zeros(41)
        weights[[3, 20, 39]] = 1e-9, 1.0, 1e9
        for epoch in range(5):
            assert sorted(self._rows(Setup(weights=weights), epoch)) == [3, 20, 39]

    def test_a_shorter_epoch_has_no_row_twice(self) -> None:
        for size in (1, 14, 37):
            rows = self._rows(Setup(size=size))
            assert len(rows) == len(set(rows)) == size
            assert set(rows) <= set(Setup().positive.tolist())

    def test_all_global_batches_but_the_last_are_full(self) -> None:
        assert [len(batch) for batch in self._batches(Setup(ranks=2))] == [5] * 7 + [3]

    def test_parts_of_a_batch_differ_by_at_most_one_row(self) -> None:
        for ranks in (1, 2, 3, 8):
            for parts in self.make(Setup(ranks=ranks)).batches(0):
                sizes = [len(part) for part in parts]
                assert len(sizes) == ranks
                assert max(sizes) - min(sizes) <= 1

    def test_row_ids_are_int64(self) -> None:
        kinds = {part.dtype for parts in self.make(Setup(ranks=8)).batches(0) for part in parts}
        assert kinds == {np.dtype(np.int64)}  # also those of empty parts

    # ---- order --------------------------------------------------------------------------------

    def test_same_seed_same_order(self) -> None:
        assert self._rows(Setup()) == self._rows(Setup())

    def test_each_seed_and_each_epoch_has_its_own_order(self) -> None:
        orders = [self._rows(Setup(seed=seed), epoch) for seed in range(4) for epoch in range(4)]
        assert len({tuple(order) for order in orders}) == 16

    def test_same_order_in_another_process(self) -> None:
        self._needs("other_process")
        assert in_another_process(self._rows, Setup(), 1) == self._rows(Setup(), 1)

    def test_order_follows_the_weights(self) -> None:
        """The first two rows of many epochs against their exact probabilities (chi-square)."""
        weights = np.array([1.0, 2.0, 3.0, 0.0, 4.0])
        counts = dict.fromkeys(itertools.permutations(np.flatnonzero(weights).tolist(), 2), 0)
        for seed in range(self.seeds):
            for epoch in range(self.epochs):
                first, second = self._rows(Setup(weights=weights, seed=seed), epoch)[:2]
                counts[first, second] += 1
        total, draws = weights.sum(), self.seeds * self.epochs
        distance = 0.0
        for (first, second), count in counts.items():
            expected = draws * weights[first] / total * weights[second] / (total - weights[first])
            distance += (count - expected) ** 2 / expected
        # 12 outcomes, 11 degrees of freedom: a correct sampler exceeds this once in a million.
        assert distance < 48.9, f"after {draws} draws the first two rows were {counts}"

    def test_only_ratios_of_weights_matter(self) -> None:
        expected = self._rows(Setup())
        for factor in (2.0**-70, 0.5, 2.0**40):
            assert self._rows(Setup(weights=Setup().weights * factor)) == expected

    def test_weights_of_extreme_range(self) -> None:
        # Each weight is 1e50 times the next, so this order is certain.
        weights = 10.0 ** np.array([0, -200, 200, 50, -100, 100, -50, 150, -150])
        assert self._rows(Setup(weights=weights)) == np.argsort(-weights).tolist()

    def test_number_of_ranks_changes_no_global_batch(self) -> None:
        self._needs("resizable")
        expected = self._batches(Setup(ranks=1))
        for ranks in (2, 3, 8):
            assert self._batches(Setup(ranks=ranks)) == expected

    def test_samplers_do_not_disturb_each_other(self) -> None:
        setups = [Setup(seed=1), Setup(seed=2)]
        side_by_side = zip(*(self.make(setup).batches(0) for setup in setups), strict=True)
        both = [[sorted(parts[0].tolist()) for parts in step] for step in side_by_side]
        assert [list(batches) for batches in zip(*both, strict=True)] == [self._batches(setup) for setup in setups]

    def test_global_random_state_is_untouched(self) -> None:
        before = _random_states()
        sampler = self.make(Setup())
        for _ in sampler.batches(0):
            sampler.restore(self._travelled(sampler.state()))
        for name, state in _random_states().items():
            assert state == before[name], f"the global random state of {name} was read or written"

    # ---- state --------------------------------------------------------------------------------

    def test_resume_at_every_step(self) -> None:
        """From each step of an epoch a resumed sampler gives the rest of it and the next epoch, as without a stop."""
        setup = Setup(ranks=2)
        first, second = self._batches(setup, 0), self._batches(setup, 1)
        sampler = self.make(setup)
        states = [self._travelled(sampler.state())]
        for _ in sampler.batches(0):
            states.append(self._travelled(sampler.state()))
        assert len(states) == len(first) + 1
        for done, state in enumerate(states):
            resumed = self._restored(setup, state)
            assert global_batches(resumed, 0) == first[done:], f"resumed after {done} global batches"
            assert global_batches(resumed, 1) == second, f"the epoch after a resume at {done} global batches"

    def test_restore_goes_back(self) -> None:
        sampler = self.make(Setup())
        batches = sampler.batches(0)
        next(batches)
        state = self._travelled(sampler.state())
        list(batches)
        sampler.restore(state)
        assert global_batches(sampler, 0) == self._batches(Setup())[1:]

    def test_resize_in_the_middle_of_an_epoch(self) -> None:
        """8 ranks, then 2, then 8 again."""
        self._needs("resizable")
        seen, state = [], None
        for ranks, steps in ((8, 3), (2, 2), (8, 3)):
            setup = Setup(ranks=ranks)
            sampler = self.make(setup) if state is None else self._restored(setup, state)
            for parts in itertools.islice(sampler.batches(0), steps):
                assert len(parts) == ranks
                seen.append(sorted(np.concatenate(parts).tolist()))
                state = self._travelled(sampler.state())
        assert seen == self._batches(Setup(ranks=1))

    def test_pickling_at_every_step(self) -> None:
        self._needs("picklable")
        setup = Setup(ranks=2)
        sampler = self.make(setup)
        expected = self._batches(setup)
        for done, _ in enumerate(sampler.batches(0), start=1):
            copy = pickle.loads(pickle.dumps(sampler))
            assert global_batches(copy, 0) == expected[done:], f"pickled after {done} global batches"

    def test_state_of_another_seed_is_refused(self) -> None:
        state = self._travelled(self.make(Setup(seed=20_177)).state())
        with pytest.raises(ValueError, match="seed") as caught:
            self.make(Setup(seed=41_414)).restore(state)
        _says(caught.value, r"\b20177\b", r"\b41414\b")

    def test_state_of_other_data_is_refused(self) -> None:
        state = self._travelled(self.make(Setup()).state())
        other = Setup().weights
        other[5] *= 2
        with pytest.raises(ValueError, match="data|weights|fingerprint"):
            self.make(Setup(weights=other)).restore(state)

    # ---- bad weights --------------------------------------------------------------------------

    def test_weights_that_are_not_finite_are_refused(self) -> None:
        for bad in (np.nan, np.inf, -np.inf):
            _says(self._refusal(_with(bad)), "NaN|finite", *self._bad_rows())

    def test_negative_weights_are_refused(self) -> None:
        _says(self._refusal(_with(-1e-9)), "negative", *self._bad_rows())

    def test_weights_that_are_all_zero_are_refused(self) -> None:
        _says(self._refusal(Setup(weights=np.zeros(41))), "weight", r"\b0\b|\bzero\b", r"\b41\b")

    def test_more_rows_than_positive_weights_are_refused(self) -> None:
        _says(self._refusal(Setup(size=39)), "weight", r"\b39\b", r"\b38\b")

    def test_weights_of_another_length_are_refused(self) -> None:
        self._needs("checks_rows")
        for rows in (40, 42):
            _says(self._refusal(Setup(rows=rows)), r"\b41\b|\b40\b", rf"\b{rows}\b")

    # ---- helpers ------------------------------------------------------------------------------

    def _needs(self, promise: str) -> None:
        if not getattr(self, promise):
            pytest.skip(f"{type(self).__name__}.{promise} is False")

    def _batches(self, setup: Setup, epoch: int = 0) -> list[list[int]]:
        return global_batches(self.make(setup), epoch)

    def _rows(self, setup: Setup, epoch: int = 0) -> list[int]:
        """The epoch's row ids in their exact order: batches of one row on one rank."""
        batches = self.make(replace(setup, batch_size=1, ranks=1)).batches(epoch)
        return [int(row) for (part,) in batches for row in part]

    def _travelled(self, state: Any) -> Any:
        """The state after it was written to a file and read."""
        return json.loads(json.dumps(state)) if self.json_state else pickle.loads(pickle.dumps(state))

    def _restored(self, setup: Setup, state: Any) -> GlobalSampler:
        sampler = self.make(setup)
        sampler.restore(state)
        return sampler

    def _bad_rows(self) -> tuple[str, ...]:
        """The text of a refusal about the bad rows of `_with`: their number and their ids."""
        return (r"\b3\b", r"\b6, 11, 30\b") if self.sees_all_weights else (r"\b(6|11|30)\b",)

    def _refusal(self, setup: Setup) -> ValueError:
        with pytest.raises(ValueError) as caught:
            list(self.make(setup).batches(0))
        error: ValueError = caught.value
        return error


def _with(bad: float) -> Setup:
    weights = _weights()
    weights[[6, 11, 30]] = bad
    return Setup(weights=weights)


def _says(error: ValueError, *patterns: str) -> None:
    """Fail unless the message matches all patterns."""
    for pattern in patterns:
        assert re.search(pattern, str(error)), f"the message does not say {pattern!r}: {error}"


def _random_states() -> dict[str, Any]:
    """The global random states of this process, in a form that can be compared."""
    states: dict[str, Any] = {"random": random.getstate(), "numpy": pickle.dumps(np.random.get_state())}
    if "torch" in sys.modules:
        states["torch"] = bytes(sys.modules["torch"].get_rng_state().numpy())
    return states
