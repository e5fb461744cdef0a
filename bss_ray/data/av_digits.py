"""AV-Digits: the small audio-visual dataset inside the package.

Handwritten digits (8x8 images), each paired with the same digit spoken in noise (32x32 log-mel spectrograms).
`scripts/make_av_digits.py` made the Parquet file next to this module; `docs/av_digits.md` is its data card.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bss_ray.errors import DataError, nearest

FILE = Path(__file__).with_name("av_digits.parquet")
SPLITS = ("train", "validation", "test")

# How the file stores a row. The generating script imports these and copies them into the file's metadata.
IMAGE_SHAPE = (8, 8)
IMAGE_LEVELS = 16  # pixels are 0 (paper) .. 16 (ink)
AUDIO_SHAPE = (32, 32)  # (mel band, frame), low band and early frame first
AUDIO_DB_RANGE = (-65.0, -10.0)  # decibels stored as level 0 and level 255

# Mean and standard deviation over the training split, rounded; fixed, so that no caller fits them on its own subset.
IMAGE_MEAN, IMAGE_STD = 4.9, 6.0  # pixel levels
AUDIO_MEAN, AUDIO_STD = -40.0, 4.6  # decibels


def av_digits(split: str, *, mispaired: float = 0.0, seed: int = 0) -> pa.Table:
    """One split of AV-Digits as an Arrow table, in the row order of `av_digits_table`.

    Arguments, errors and columns are those of `av_digits_table`, with `image` and `audio` as tensors.
    """
    table = av_digits_table(split, mispaired=mispaired, seed=seed)
    return pa.table({name: _to_arrow(column) for name, column in table.items()})


def av_digits_table(split: str, *, mispaired: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
    """One split of AV-Digits as NumPy columns, in the file's (shuffled, fixed) row order.

    Args:
        split: Name of the split: "train", "validation" or "test".
        mispaired: Share of the training rows to re-pair, in [0, 1). One half of these rows gets the audio, the other
            half the image, of a training row with another label; the label stays that of the modality that is kept.
        seed: Seed that chooses the rows to re-pair and the rows whose audio or image they get.

    Returns:
        `image` float32 (N, 1, 8, 8) and `audio` float32 (N, 1, 32, 32), both roughly standardised; `label` int64 (N,);
        `mispaired` bool (N,), True where re-paired; `image_id` int32 (N,) of the image shown; `snr_db` float32 (N,)
        of the audio heard.

    Raises:
        DataError: unknown `split`; `mispaired` outside [0, 1), or above 0 for another split than "train".
    """
    _check(split, mispaired)
    stored = pq.read_table(FILE, filters=pc.field("split") == split)
    table = {
        "image": (_levels(stored["image"], IMAGE_SHAPE) - np.float32(IMAGE_MEAN)) / np.float32(IMAGE_STD),
        "audio": (_decibels(_levels(stored["audio"], AUDIO_SHAPE)) - np.float32(AUDIO_MEAN)) / np.float32(AUDIO_STD),
        "label": stored["label"].to_numpy(),
        "mispaired": np.zeros(len(stored), dtype=bool),
        "image_id": stored["image_id"].to_numpy(),
        "snr_db": stored["snr_db"].to_numpy(),
    }
    return _mispair(table, round(mispaired * len(stored)), seed)


def _mispair(table: dict[str, np.ndarray], count: int, seed: int) -> dict[str, np.ndarray]:
    """A copy of `table` with `count` rows re-paired, always from original rows, so that errors do not chain."""
    label = table["label"]
    rng = np.random.Generator(np.random.Philox(seed))
    rows = rng.permutation(len(label))[:count]
    donors = np.array([rng.choice(np.flatnonzero(label != label[row])) for row in rows], dtype=np.int64)

    mixed = {name: column.copy() for name, column in table.items()}
    mixed["mispaired"][rows] = True
    half = count // 2
    # The columns that describe a modality travel with it.
    for names, part in (("audio", "snr_db"), slice(None, half)), (("image", "image_id"), slice(half, None)):
        for name in names:
            mixed[name][rows[part]] = table[name][donors[part]]
    return mixed


def _check(split: str, mispaired: float) -> None:
    if split not in SPLITS:
        raise DataError(f"AV-Digits has no split {split!r}: {nearest(split, SPLITS)}")
    if not 0 <= mispaired < 1:
        raise DataError(f"mispaired is a share of the rows and must be in [0, 1), got {mispaired}")
    if mispaired > 0 and split != "train":
        raise DataError(
            f"mispaired={mispaired} with split {split!r}: only training rows are re-paired, so that validation and "
            "test stay true; leave mispaired at 0 here"
        )


def _levels(column: pa.ChunkedArray, shape: tuple[int, int]) -> np.ndarray:
    """Stored lists of uint8 levels as float32 (N, 1, height, width)."""
    levels: np.ndarray = column.combine_chunks().flatten().to_numpy()
    return levels.reshape(-1, 1, *shape).astype(np.float32)


def _decibels(levels: np.ndarray) -> np.ndarray:
    low, high = AUDIO_DB_RANGE
    return levels * np.float32((high - low) / 255) + np.float32(low)


def _to_arrow(column: np.ndarray) -> pa.Array:
    # Arrow's own tensor type: Ray Data reads it as a tensor column, without its pickled extension types.
    return pa.array(column) if column.ndim == 1 else pa.FixedShapeTensorArray.from_numpy_ndarray(column)
