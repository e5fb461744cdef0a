"""Random numbers that belong to rows: the published Philox, streams that never meet, right distributions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from bss_ray.errors import ConfigError
from bss_ray.load.randomness import RowRandom, philox

ROWS = torch.arange(2_000)

# Random123, kat_vectors: philox4x32 with 10 rounds. Counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_is_the_published_one(counter: list[int], key: list[int], result: list[int]) -> None:
    words = philox([torch.tensor(word) for word in counter], key[0] | key[1] << 32)
    assert words.tolist() == result


def test_the_parts_of_the_counter_stand_where_they_should() -> None:
    # Seed, epoch and row id above 32 bits and different: (block, epoch, row id low, row id high).
    seed, epoch, row = 0x299F31D0A4093822, 0x85A308D3, 0x0370734413198A2E
    random = RowRandom(seed, epoch, torch.tensor([row]))
    random._blocks = 0x243F6A88
    assert random._words(4).tolist() == [KNOWN[2][2]]


def test_a_row_has_its_numbers_in_any_batch() -> None:
    alone, shuffled = torch.tensor([17]), torch.tensor([900, 17, 3, 17])
    for draw in (
        lambda random: random.uniform(5),
        lambda random: random.normal(2, 3),
        lambda random: random.integers(-3, 9, 7),
        lambda random: torch.tensor([random.generator(i).random() for i in range(len(random._row_ids))]),
    ):
        one = draw(RowRandom(5, 2, alone))[0]
        many = draw(RowRandom(5, 2, shuffled))
        assert torch.equal(many[1], one)
        assert torch.equal(many[3], one)
        assert not torch.equal(many[0], one)


def test_seed_epoch_row_and_call_draw_anew() -> None:
    draws = [
        random.uniform(4).flatten()
        for random in (RowRandom(seed, epoch, ROWS[:50]) for seed in (0, 1, 2**32) for epoch in (0, 1))
        for _ in range(3)
    ]
    numbers = torch.cat(draws)
    # 24-bit numbers: 3,600 of them collide 0.4 times on average.
    assert len(numbers.unique()) >= len(numbers) - 4


def test_a_call_of_part_of_a_block_wastes_the_rest() -> None:
    random, again = RowRandom(1, 0, ROWS[:3]), RowRandom(1, 0, ROWS[:3])
    together = random.uniform(8)
    assert torch.equal(together[:, :1], again.uniform(1))
    assert torch.equal(together[:, 4:6], again.uniform(2))


def test_distributions() -> None:
    random = RowRandom(3, 1, ROWS)
    uniform, normal = random.uniform(50).double(), random.normal(51).double()
    assert uniform.dtype == torch.float64
    assert 0 <= uniform.min() < uniform.max() < 1
    assert stats.kstest(uniform.flatten(), "uniform").pvalue > 1e-3
    assert stats.kstest(normal.flatten(), "norm").pvalue > 1e-3
    counts = torch.bincount(random.integers(0, 7, 50).flatten(), minlength=7)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    # Neither neighbours nor the two halves of Box and Muller go together.
    assert abs(np.corrcoef(uniform[:-1, 0], uniform[1:, 0])[0, 1]) < 0.08
    assert abs(np.corrcoef(normal[:, 0], normal[:, 26])[0, 1]) < 0.08


def test_integers_cover_their_range() -> None:
    random = RowRandom(0, 0, ROWS)
    assert random.integers(-2, 3, 10).unique().tolist() == [-2, -1, 0, 1, 2]
    wide = random.integers(-(2**30), 2**30, 10)
    assert -(2**30) <= wide.min() < -(2**29)
    assert 2**29 < wide.max() < 2**30
    assert random.integers(4, 5).tolist() == [4] * len(ROWS)


def test_shapes() -> None:
    random = RowRandom(0, 0, ROWS[:6])
    assert random.uniform().shape == (6,)
    assert random.normal(3, 1, 5).shape == (6, 3, 1, 5)
    assert random.integers(0, 2, 0).shape == (6, 0)
    assert RowRandom(0, 0, ROWS[:0]).uniform(4).shape == (0, 4)
    assert random.uniform(2).dtype == random.normal(2).dtype == torch.float32
    assert random.integers(0, 2).dtype == torch.int64


def test_a_filler_row_has_numbers_too() -> None:
    random = RowRandom(0, 0, torch.tensor([-1]))
    assert random.uniform(3).min() >= 0
    assert 0 <= random.generator(0).random() < 1


def test_no_global_generator_is_touched() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    RowRandom(0, 0, ROWS).normal(3)
    RowRandom(0, 0, ROWS).generator(0).random()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # type: ignore[index]


def test_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"seed must lie in \[0, 2\*\*64\); received -1"):
        RowRandom(-1, 0, ROWS)
    with pytest.raises(ConfigError, match=r"epoch must lie in \[0, 2\*\*32\)"):
        RowRandom(0, 2**32, ROWS)
    with pytest.raises(ConfigError, match="low=3, high=3"):
        RowRandom(0, 0, ROWS).integers(3, 3)
