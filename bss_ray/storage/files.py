"""Paths and URIs as text, and local files that are written completely or not at all."""

from __future__ import annotations

import os
import posixpath
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def is_uri(place: str) -> bool:
    """Whether a place is a URI and not a path."""
    return "://" in place


def absolute(place: str) -> str:
    """A path that means the same in another working folder and for another user; a URI unchanged."""
    return place if is_uri(place) else str(Path(place).expanduser().absolute())


def hidden(uri: str) -> str:
    """A URI without its password."""
    return re.sub(r"(://[^/@:\s]+):[^/@\s]+@", r"\1:***@", uri)


def child(place: str, name: str) -> str:
    """The place of this name in a folder; options of a URI stay after its path."""
    start, options = _cut(place)
    return f"{start.rstrip('/')}/{name}{options}"


def parent(place: str) -> str:
    """The folder that contains the place."""
    start, options = _cut(place)
    return posixpath.dirname(start.rstrip("/")) + options


def _cut(place: str) -> tuple[str, str]:
    """A URI up to its options, and the options with their question mark; a path may contain question marks."""
    if not is_uri(place):
        return place, ""
    start, mark, options = place.partition("?")
    return start, mark + options


Write = Callable[[BinaryIO], object]


def write_local(path: Path, write: Write) -> None:
    """Let `write` fill a local file, which is replaced only when the new content is complete.

    Raises:
        OSError: The disk is full, or the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w+b") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)  # a rename is an entry of the folder
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Flush the names of a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
