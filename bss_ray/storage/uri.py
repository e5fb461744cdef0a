"""Paths and URIs as text."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path


def is_uri(place: str) -> bool:
    """Whether this is a URI and not a path."""
    return "://" in place


def absolute(place: str) -> str:
    """A path that means the same in another working folder and for another user; a URI as it is."""
    return place if is_uri(place) else str(Path(place).expanduser().absolute())


def hidden(uri: str) -> str:
    """A URI without the password in it."""
    return re.sub(r"(://[^/@:\s]+):[^/@\s]+@", r"\1:***@", uri)


def child(place: str, name: str) -> str:
    """What has this name in a folder; options of a URI stay behind its path."""
    start, options = _cut(place)
    return f"{start.rstrip('/')}/{name}{options}"


def parent(place: str) -> str:
    """The folder that it is in."""
    start, options = _cut(place)
    return posixpath.dirname(start.rstrip("/")) + options


def _cut(place: str) -> tuple[str, str]:
    """A URI up to its options, and these with their question mark; a path may hold question marks."""
    if not is_uri(place):
        return place, ""
    start, mark, options = place.partition("?")
    return start, mark + options
