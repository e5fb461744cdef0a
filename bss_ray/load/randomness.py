"""Random numbers for augmentation that belong to rows, not to batches.

Row i of epoch e draws from its own stream, a function of (seed, e, i) only. So augmented data does not
depend on the batch that a row is in, on the number of ranks, or on the position at which a run was resumed.

The numbers come from Philox4x32-10 (Salmon et al. 2011, *Parallel random numbers: as easy as 1, 2, 3*):
ten rounds of integer arithmetic turn a counter and a key into four random words. The key is the seed and
the counter is (block, epoch, row id), so there is no state, all rows are drawn at once, and a GPU
makes the same bits as a CPU.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bss_ray.errors import ConfigError
from bss_ray.sample.permutation import check_seed

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

# The generators of `permutation` have streams 0 and 1 of the same seed.
_STREAM = 2


class RowRandom:
    """Random numbers of the rows of one batch.

    Each call draws new numbers in the order of the calls, so make the same calls for every batch, whatever its
    content. A row that occurs twice in an epoch (with replacement) has the same numbers twice.

    Args:
        seed: Seed of the run, in [0, 2**64).
        epoch: Epoch, in [0, 2**32).
        row_ids: (B,) int64; numbers are made on the device of this tensor. Filler rows (-1) have numbers too.

    Raises:
        ConfigError: Seed or epoch is out of range.

    Example:
        >>> random = RowRandom(seed=0, epoch=3, row_ids=torch.tensor([17, 4]))
        >>> random.uniform(2, 3).shape
        torch.Size([2, 2, 3])
    """

    def __init__(self, seed: int, epoch: int, row_ids: Tensor) -> None:
        if not 0 <= epoch <= _WORD:
            raise ConfigError(f"epoch must lie in [0, 2**32) to be part of a counter; received {epoch}")
        self._seed = check_seed(seed)
        self._epoch = epoch
        self._row_ids = row_ids
        self._blocks = 0  # number of words of each row drawn so far

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) float32, uniform on [0, 1): multiples of 2^-24, the same bits on every device."""
        return self._fractions(math.prod(shape)).view(self._shape(shape))

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) float32, standard normal.

        Box and Muller (1958), from uniform numbers that are the same on every device; the last bits of logarithm
        and cosine may differ between devices.
        """
        count = math.prod(shape)
        half = (count + 1) // 2
        # In (0, 1]: a logarithm of 0 would be infinite. All 32 bits: 24 would end the tail at 5.8.
        radius = (self._words(half) + 1).to(torch.float32).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = self._fractions(half).mul_(2 * math.pi)
        both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return both[:, :count].reshape(self._shape(shape))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """(B, *shape) int64, uniform on [low, high); the same on every device.

        Raises:
            ConfigError: The range is empty or wider than 2^31.
        """
        width = high - low
        if not 0 < width <= 2**31:
            raise ConfigError(f"integers(low, high) needs 0 < high - low <= 2**31; received low={low}, high={high}")
        count = math.prod(shape)
        words = self._words(2 * count).view(len(self._row_ids), 2, count)
        # floor(u * width) for a 64-bit fraction u has a bias below 2^-32; that of a 32-bit fraction would show.
        scaled = (words[:, 0] * width + ((words[:, 1] * width) >> 32)) >> 32
        return scaled.add_(low).view(self._shape(shape))

    def generator(self, index: int) -> np.random.Generator:
        """A NumPy generator of the row at `index` of the batch, for libraries that need one.

        Each call returns the generator at its start. On a GPU the call waits for the row id.
        """
        row_id = int(self._row_ids[index]) % 2**64
        key = np.array([self._seed, _STREAM], dtype=np.uint64)
        counter = np.array([0, 0, row_id, self._epoch], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=counter))

    def _shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return len(self._row_ids), *shape

    def _fractions(self, count: int) -> Tensor:
        """(B, count) float32 on [0, 1)."""
        return (self._words(count) >> 8).to(torch.float32).mul_(2.0**-24)

    def _words(self, count: int) -> Tensor:
        """The next `count` words of every row: (B, count) int64 in [0, 2^32)."""
        first, blocks = self._blocks, -(-count // 4)
        self._blocks += blocks
        assert self._blocks <= _WORD, "a row has 2^32 blocks of words"
        block = torch.arange(first, self._blocks, device=self._row_ids.device)
        low, high = (self._row_ids & _WORD)[:, None], ((self._row_ids >> 32) & _WORD)[:, None]
        words = philox([block[None], torch.full_like(block[None], self._epoch), low, high], self._seed)
        return words.reshape(len(self._row_ids), 4 * blocks)[:, :count]


def philox(counter: list[Tensor], key: int) -> Tensor:
    """Philox4x32-10.

    Args:
        counter: Four words, int64 in [0, 2^32), of shapes that broadcast.
        key: 64 bits, the lower word first.

    Returns:
        (..., 4) int64 in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _WORD, key >> 32
    for _ in range(10):
        # A product has 64 bits. int64 wraps around as two's complement, so the bits are right.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD, ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    words = torch.broadcast_tensors(c0, c1, c2, c3)  # type: ignore[no-untyped-call]
    return torch.stack(words, dim=-1)
