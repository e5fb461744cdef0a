"""Scores on disk: the files of each holder's rows, from which any other holders can read their rows.

A file holds consecutive rows of one holder as plain arrays. It is written under a temporary name, flushed to
the disk, and renamed when it is complete. A manifest with the rows and digests of the files is written after
all of them, so a reader opens only the files it needs, and notices a file that is missing, damaged, or of
another score version.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from bss_ray.errors import CheckpointError, StorageError
from bss_ray.sample.state import PENDING_COLUMNS, STATE_COLUMNS, PendingMeasures, ScoreBlock
from bss_ray.storage.files import write_local

# Prefix of the arrays of measures that are not published yet.
_PENDING = "coming_"

# Rows of one file (268 MB); a reader of some of them reads all of them.
_FILE_ROWS = 1 << 24


@dataclass(frozen=True)
class ScoreFile:
    """The entry of a score file in a manifest.

    Attributes:
        name: Name of the file.
        first_row: Row id of its first row.
        rows: Number of rows.
        digest: BLAKE2 of the content.
    """

    name: str
    first_row: int
    rows: int
    digest: str


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> str:
    """Let `write` fill a file, which is replaced only when the new content is complete.

    Returns:
        BLAKE2 digest of the content.

    Raises:
        StorageError: the disk is full, or the folder cannot be written to.
    """
    found = ""

    def write_and_read(stream: BinaryIO) -> None:
        nonlocal found
        write(stream)
        stream.seek(0)
        found = stream_digest(stream)

    try:
        write_local(path, write_and_read)
    except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError
        raise StorageError(
            f"{path} cannot be written: {error}. Free space on that disk, or choose another folder; what was saved "
            "before is untouched"
        ) from error
    return found


def stream_digest(stream: BinaryIO) -> str:
    """BLAKE2 of the rest of a stream."""
    return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()  # type: ignore[arg-type]


def write_scores(folder: Path, holder: int, version: int, parts: Iterable[ScoreBlock]) -> list[ScoreFile]:
    """Write one holder's scores of `version`.

    Raises:
        StorageError: the disk is full, or the folder cannot be written to.
    """
    files: list[ScoreFile] = []
    for part in parts:
        for start in range(0, len(part.score), _FILE_ROWS):
            rows = slice(start, start + _FILE_ROWS)
            arrays = {name: values[rows] for name, values in part.arrays.items()}
            if part.pending is not None:
                arrays |= {_PENDING + name: values[rows] for name, values in part.pending.arrays.items()}
            place = {"first_row": np.int64(part.first_row + start), "version": np.int64(version)}
            path = folder / f"scores-{holder:05d}-{len(files):05d}.npz"
            found = write_file(path, partial(_save_arrays, {**place, **arrays}))
            files.append(ScoreFile(path.name, part.first_row + start, len(arrays["score"]), found))
    return files


def _save_arrays(arrays: dict[str, Any], stream: BinaryIO) -> None:
    np.savez(stream, **arrays)


def read_scores(
    files: Iterable[ScoreFile], read: Callable[[str], bytes], *, version: int, start: int, stop: int
) -> list[ScoreBlock]:
    """Saved scores that overlap rows [start, stop), whichever holders saved them.

    Args:
        files: All files of the manifest.
        read: Function that returns the content of a file by name, or raises FileNotFoundError.
        version: Score version that the manifest names.
        start: First row id to read.
        stop: Row id after the last row to read.

    Raises:
        CheckpointError: A file is missing or damaged, or has other rows or another version than the manifest says.
    """
    wanted = (file for file in files if file.first_row < stop and file.first_row + file.rows > start)
    return [_read_file(file, read, version) for file in wanted]


def _read_file(file: ScoreFile, read: Callable[[str], bytes], version: int) -> ScoreBlock:
    try:
        content = read(file.name)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.name} cannot be read ({error})") from error
    found = stream_digest(io.BytesIO(content))
    if found != file.digest:
        raise CheckpointError(f"{file.name} cannot be used (its digest is {found}, the manifest says {file.digest})")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in STATE_COLUMNS}
            pending = None
            if _PENDING + PENDING_COLUMNS[0] in saved:
                pending = PendingMeasures(**{name: saved[_PENDING + name] for name in PENDING_COLUMNS})
            place = (int(saved["first_row"]), int(saved["version"]))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:  # written by another program
        raise CheckpointError(f"{file.name} cannot be used ({error})") from error
    if place != (file.first_row, version) or len(arrays["score"]) != file.rows:
        raise CheckpointError(
            f"{file.name} holds {len(arrays['score'])} rows from row {place[0]} of score version {place[1]}; the "
            f"manifest says {file.rows} rows from row {file.first_row} of version {version}"
        )
    return ScoreBlock(place[0], **arrays, pending=pending)
