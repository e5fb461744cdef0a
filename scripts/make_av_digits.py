"""Make `av_digits.parquet`: handwritten digits paired with spoken ones.

    python scripts/make_av_digits.py [--out FILE] [--seed 0]

Needs scikit-learn (the images) and Debian's espeak-ng 1.51 (the voices); using the file needs neither.
Every row draws from its own random stream, so a row can be made again without the others, and the same
seed and versions (NumPy, pyarrow, espeak-ng) give the same bytes.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import wave
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bss_ray.data.av_digits import AUDIO_DB_RANGE, AUDIO_SHAPE, FILE, IMAGE_LEVELS, IMAGE_SHAPE, SPLITS
from bss_ray.errors import BssRayError, DataError, MissingDependencyError, optional_import

VERSION = "1"
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TAKES = 2  # spoken versions of every image's digit
SPLIT_ENDS = (0.6, 0.8)  # of each digit's images: train, then validation, then test

# espeak-ng silently falls back to its default voice on a name it does not know: all of these are in 1.51.
ACCENTS = (
    "en-us",
    "en-us-nyc",
    "en-gb",
    "en-gb-scotland",
    "en-gb-x-gbclan",
    "en-gb-x-gbcwmd",
    "en-gb-x-rp",
    "en-029",
)
VARIANTS = ("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5")
SPEEDS = range(120, 441, 20)  # words per minute, slow to as fast as espeak-ng goes
PITCHES = range(20, 81, 5)  # espeak-ng's scale, 0..99
SNR_DB = (-12.0, 15.0)  # power of the word over power of the noise, uniform

SAMPLE_RATE = 22_050  # what espeak-ng writes
WINDOW = 1024
HOP = 536
MEL_HZ = (50.0, 8_000.0)
MEL_BANDS, FRAMES = AUDIO_SHAPE
CLIP = WINDOW + HOP * (FRAMES - 1)  # 17,640 samples = exactly 0.8 s
SILENCE = 0.01  # a word starts and ends where it passes this share of its peak
LEVEL_DB = -20.0  # every clip is scaled to this power, so that loudness does not tell how noisy it is

SCHEMA = pa.schema(
    {
        "image": pa.list_(pa.uint8(), IMAGE_SHAPE[0] * IMAGE_SHAPE[1]),
        "audio": pa.list_(pa.uint8(), MEL_BANDS * FRAMES),
        "label": pa.int64(),
        "split": pa.dictionary(pa.int8(), pa.string()),
        "image_id": pa.int32(),
        "voice": pa.string(),
        "snr_db": pa.float32(),
        "speed": pa.int32(),
        "pitch": pa.int32(),
    }
)

Row = dict[str, Any]


def make_table(seed: int, *, progress: Callable[[int, int], None] = lambda done, total: None) -> pa.Table:
    """All rows, in their shuffled order; `progress(done, total)` is called after each.

    Raises:
        MissingDependencyError: espeak-ng or scikit-learn is not installed.
        DataError: espeak-ng failed, or does not write what is expected.
    """
    version = espeak_version()  # first, so that a missing program is told before any work
    images, labels = load_images()
    splits = split_images(labels, seed)
    order = _generator(seed, stream=1).permutation(TAKES * len(labels))

    rows: list[Row] = []
    for utterance in order.tolist():
        image_id = utterance // TAKES
        row = speak_row(int(labels[image_id]), utterance, seed)
        row |= {"image": images[image_id].ravel(), "image_id": image_id, "split": splits[image_id]}
        rows.append(row)
        progress(len(rows), len(order))
    return pa.Table.from_pylist(rows, SCHEMA.with_metadata(_metadata(seed, version)))


def load_images() -> tuple[np.ndarray, np.ndarray]:
    """The images, uint8 (1797, 8, 8) with values 0..16, and their digits, int64 (1797,)."""
    datasets = optional_import("sklearn.datasets", extra="dev", needed_for="making AV-Digits")
    digits = datasets.load_digits()
    return digits.images.astype(np.uint8), digits.target.astype(np.int64)


def split_images(labels: np.ndarray, seed: int) -> list[str]:
    """The split of every image, stratified by digit: all rows of an image share it."""
    rng = _generator(seed, stream=2)
    splits = [""] * len(labels)
    for digit in range(len(WORDS)):
        images = rng.permutation(np.flatnonzero(labels == digit))
        ends = [round(end * len(images)) for end in SPLIT_ENDS]
        for split, part in zip(SPLITS, np.split(images, ends), strict=True):
            for image in part.tolist():
                splits[image] = split
    return splits


def speak_row(digit: int, utterance: int, seed: int) -> Row:
    """The columns of one row that concern its audio, and its label.

    Args:
        digit: what is said, 0..9.
        utterance: number of the row before shuffling; with `seed` it decides everything drawn here.
    """
    rng = _generator(seed, stream=0, row=utterance)
    voice = f"{rng.choice(ACCENTS)}+{rng.choice(VARIANTS)}"
    speed, pitch = int(rng.choice(SPEEDS)), int(rng.choice(PITCHES))
    word = speak(WORDS[digit], voice, speed, pitch)[:CLIP]

    snr_db = rng.uniform(*SNR_DB)
    clip = draw_noise(rng)
    clip *= np.sqrt(np.mean(word**2) / np.mean(clip**2) / 10 ** (snr_db / 10))
    start = rng.integers(CLIP - len(word) + 1)
    clip[start : start + len(word)] += word
    return {
        "audio": quantise(log_mel(clip)).ravel(),
        "label": digit,
        "voice": voice,
        "snr_db": snr_db,
        "speed": speed,
        "pitch": pitch,
    }


@cache
def speak(word: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """One word from espeak-ng, float64 (samples,), read-only, without the silence before and after it."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    with wave.open(io.BytesIO(_run(command))) as file:
        if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (SAMPLE_RATE, 1, 2):
            raise DataError(f"espeak-ng wrote {file.getparams()}; expected mono 16-bit at {SAMPLE_RATE} Hz")
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2").astype(np.float64)
    loud = np.flatnonzero(np.abs(samples) > SILENCE * np.abs(samples).max())
    samples = samples[loud[0] : loud[-1] + 1]
    samples.flags.writeable = False  # the cache hands out the same array again
    return samples


def draw_noise(rng: np.random.Generator) -> np.ndarray:
    """Pink noise (power ~ 1/frequency, as long-term speech roughly has), (CLIP,), at any level.

    It is confined to the mel bands: what they do not see would count in the SNR and disturb nobody.
    """
    hertz = np.fft.rfftfreq(CLIP, 1 / SAMPLE_RATE)
    heard = (hertz >= MEL_HZ[0]) & (hertz <= MEL_HZ[1])
    spectrum = np.fft.rfft(rng.standard_normal(CLIP))
    spectrum[heard] /= np.sqrt(hertz[heard])
    spectrum[~heard] = 0
    return np.fft.irfft(spectrum, CLIP)


def log_mel(clip: np.ndarray) -> np.ndarray:
    """Log-mel spectrogram in decibels, (mel band, frame), of a clip (CLIP,) brought to `LEVEL_DB`.

    Every FFT bin is divided by the window's gain, so 0 dB is a sine of amplitude 2 at a band's peak; the floor
    is that of the stored range.
    """
    clip = clip * np.sqrt(10 ** (LEVEL_DB / 10) / np.mean(clip**2))
    window = np.hanning(WINDOW + 1)[:-1]  # periodic, as usual for spectra
    frames = np.lib.stride_tricks.sliding_window_view(clip, WINDOW)[::HOP]
    power = np.abs(np.fft.rfft(frames * window)) ** 2 / window.sum() ** 2
    mel = mel_filters() @ power.T
    decibels: np.ndarray = 10 * np.log10(np.maximum(mel, 10 ** (AUDIO_DB_RANGE[0] / 10)))
    return decibels


@cache
def mel_filters() -> np.ndarray:
    """Triangles of height 1, evenly spaced on the mel scale 2595 log10(1 + f/700), (mel band, FFT bin)."""
    low, high = 2595 * np.log10(1 + np.array(MEL_HZ) / 700)
    edges = 700 * (10 ** (np.linspace(low, high, MEL_BANDS + 2) / 2595) - 1)
    left, peak, right = (edges[i : i + MEL_BANDS, None] for i in range(3))
    hertz = np.fft.rfftfreq(WINDOW, 1 / SAMPLE_RATE)
    return np.clip(np.minimum((hertz - left) / (peak - left), (right - hertz) / (right - peak)), 0, None)


def quantise(decibels: np.ndarray) -> np.ndarray:
    """Decibels as levels 0..255 of `AUDIO_DB_RANGE`; what lies outside is clipped."""
    low, high = AUDIO_DB_RANGE
    return np.clip(np.rint((decibels - low) * (255 / (high - low))), 0, 255).astype(np.uint8)


def espeak_version() -> str:
    """Version of the installed espeak-ng, such as "1.51"."""
    if shutil.which("espeak-ng") is None:
        raise MissingDependencyError(
            "making AV-Digits needs the program 'espeak-ng', which speaks the digits; it is not on the PATH. "
            "Install it with: apt install espeak-ng"
        )
    # "eSpeak NG text-to-speech: 1.51  Data at: ..."; where its data lie would differ between machines.
    return _run(["espeak-ng", "--version"]).decode().split(":")[1].split()[0]


def _run(command: list[str]) -> bytes:
    try:
        return subprocess.run(command, check=True, capture_output=True).stdout
    except subprocess.CalledProcessError as error:
        raise DataError(f"{' '.join(command)!r} failed: {error.stderr.decode().strip()}") from error


def _generator(seed: int, *, stream: int, row: int = 0) -> np.random.Generator:
    # The counter's low word counts draws, so streams and rows never overlap.
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, row, stream, 0]))


def _metadata(seed: int, version: str) -> dict[str, str]:
    """What a reader of the file alone must know: decibels = low + level * (high - low) / 255."""
    return {
        "name": "AV-Digits",
        "version": VERSION,
        "seed": str(seed),
        "generator": f"espeak-ng {version}",
        "licence": "CC BY 4.0; images: UCI Optical Recognition of Handwritten Digits, Alpaydin and Kaynak, 1998",
        "image_shape": "x".join(map(str, IMAGE_SHAPE)),
        "image_levels": str(IMAGE_LEVELS),
        "audio_shape": "x".join(map(str, AUDIO_SHAPE)),
        "audio_db_low": str(AUDIO_DB_RANGE[0]),
        "audio_db_high": str(AUDIO_DB_RANGE[1]),
    }


def _show_progress(done: int, total: int) -> None:
    print(f"\r{done:>6,} / {total:,} rows", end="" if done < total else "\n", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the AV-Digits data set.")
    parser.add_argument("--out", type=Path, default=FILE, help="Parquet file to write (default: the package's own)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        table = make_table(arguments.seed, progress=_show_progress)
    except BssRayError as error:
        sys.exit(f"error: {error}")
    pq.write_table(table, arguments.out, compression="zstd", compression_level=19)
    print(f"{arguments.out}: {table.num_rows:,} rows, {arguments.out.stat().st_size / 2**20:.2f} MiB")


if __name__ == "__main__":
    main()
