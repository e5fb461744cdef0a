"""A digest of rows that does not depend on how they are cut into shards.

Each row is hashed with its row id (a multilinear hash over its 64-bit words, then a mixer); the
hashes of all rows add up modulo 2^64. So shards can be digested in parallel, the order of rows
counts, and the cuts do not. It tells data sets apart; it is no protection against an adversary.
"""

from __future__ import annotations

import hashlib

import numpy as np

_MASK = (1 << 64) - 1


def row_hashes(values: np.ndarray, name: str) -> np.ndarray:
    """(n,) uint64 hash of each row of `values` (n, ...), for a column of that name."""
    if values.dtype.kind in "OSU":
        return np.array([_hash_text(str(value)) for value in values], dtype=np.uint64)
    raw = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
    if raw.shape[1] % 8:
        raw = np.pad(raw, ((0, 0), (0, -raw.shape[1] % 8)))
    words = raw.view(np.uint64)
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    factors = np.random.Philox(key=[seed, 0]).random_raw(words.shape[1]) | np.uint64(1)
    return _mix(words @ factors)


def rows_digest(hashes: np.ndarray, first_row: int) -> int:
    """Digest of consecutive rows, to be added to that of others modulo 2^64."""
    ids = np.arange(first_row, first_row + len(hashes), dtype=np.uint64)
    return int(_mix(hashes ^ _mix(ids + np.uint64(1))).sum(dtype=np.uint64))


def add_digests(digests: list[int]) -> int:
    """Digest of all rows from those of parts."""
    return sum(digests) & _MASK


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mix(words: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele et al. 2014): every input bit reaches every output bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(words ^ (words >> np.uint64(31)))
