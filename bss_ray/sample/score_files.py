"""Scores on disk: the files of each holder's rows, and how any other holders find theirs again.

A file holds consecutive rows of one holder as plain arrays. It appears under its name only when it is
whole: it is written beside, flushed to the disk, and renamed. What a manifest says of the files (their
rows and digests) is written after all of them, so a reader asks for no more files than it needs, and
notices one that is missing, damaged, or of another score version.
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

# Prefix of the arrays of measures that are not yet published.
_PENDING = "coming_"

# Rows of one file (268 MB): whoever wants some of them reads them all.
_FILE_ROWS = 1 << 24


@dataclass(frozen=True)
class ScoreFile:
    """What a manifest says of a file of scores.

    Attributes:
        name: file name.
        first_row: row id of its first row.
        rows: number of rows.
        digest: BLAKE2 of its content.
    """

    name: str
    first_row: int
    rows: int
    digest: str


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> str:
    """Let `write` fill a file that is there whole or not at all; an older one stays until then.

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
        found = digest(stream)

    try:
        write_local(path, write_and_read)
    except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError
        raise StorageError(
            f"{path} cannot be written: {error}. Free space on that disk, or choose another folder; what was saved "
            "before is untouched"
        ) from error
    return found


def digest(stream: BinaryIO) -> str:
    """BLAKE2 of what is left in a stream."""
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
    """Saved scores that overlap rows [start, stop), whoever held them.

    Args:
        files: all files of the manifest.
        read: content of a file by name; a FileNotFoundError where there is none.
        version: score version that the manifest names.
        start: first row id wanted.
        stop: row id behind the last one wanted.

    Raises:
        CheckpointError: a file is missing or damaged, or holds other rows or another version than the manifest says.
    """
    wanted = (file for file in files if file.first_row < stop and file.first_row + file.rows > start)
    return [_read_file(file, read, version) for file in wanted]


def _read_file(file: ScoreFile, read: Callable[[str], bytes], version: int) -> ScoreBlock:
    try:
        content = read(file.name)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.name} cannot be read ({error})") from error
    found = digest(io.BytesIO(content))
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
