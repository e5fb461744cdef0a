"""A file or folder on any file system."""

from __future__ import annotations

import contextlib
import fnmatch
import io
import os
import posixpath
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from bss_ray.errors import ConfigError, StorageError, first_line
from bss_ray.storage.files import Write, absolute, child, hidden, is_uri, parent, write_local

# File systems on which a file appears only when it is complete: no rename is needed, and renaming would copy.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "memory"})

# Time limit in seconds of the first requests to a file system. The clients' own limits can add up to many minutes.
_LIMIT_S = 60.0

_T = TypeVar("_T")


@dataclass(frozen=True, repr=False)
class StoragePath:
    """A file or folder on any file system, with the methods of `pathlib.Path` that a run needs.

    Files are written completely or not at all: an object store does so by itself; elsewhere a file is written under a
    temporary name, flushed and renamed.

    Attributes:
        uri: Path or URI that names the file or folder. It may hold a password, which `str()` does not show.
        system: File system of the path.
        path: Path on that file system.
    """

    uri: str
    system: pyarrow.fs.FileSystem = field(compare=False)
    path: str = field(compare=False)

    @staticmethod
    def of(place: str | os.PathLike[str], system: pyarrow.fs.FileSystem | None = None) -> StoragePath:
        """The place with the path or URI that a user gives.

        Args:
            place: Path or URI; with `system` a path on that file system.
            system: File system, if the place does not tell it.

        Raises:
            ConfigError: No file system takes the URI.
            StorageError: The file system does not answer.
        """
        name = os.fspath(place)
        if system is not None:
            return StoragePath(name, system, name)
        if not is_uri(name):
            name = absolute(name)
            return StoragePath(name, pyarrow.fs.LocalFileSystem(), name)
        try:
            system, path = in_time(lambda: pyarrow.fs.FileSystem.from_uri(name), hidden(name))
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"{hidden(name)} names no file system that is known here ({_line(error)}). Take a path, s3://, gs:// "
                "or abfs://, or fsspec+NAME:// with the package for it installed"
            ) from error
        local = isinstance(system, pyarrow.fs.LocalFileSystem)
        return StoragePath(path if local else name, system, path)

    def __truediv__(self, name: str) -> StoragePath:
        """The place of this name in the folder."""
        return replace(self, uri=child(self.uri, name), path=f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return hidden(self.uri)

    def __repr__(self) -> str:
        return f"StoragePath({self})"

    @property
    def name(self) -> str:
        """The last part of the path."""
        return posixpath.basename(self.path.rstrip("/"))

    @property
    def parent(self) -> StoragePath:
        """The folder that contains the place."""
        return replace(self, uri=parent(self.uri), path=posixpath.dirname(self.path.rstrip("/")))

    @property
    def local(self) -> Path | None:
        """The place as a path of this machine; None on another file system."""
        return _local(self.system, self.path)

    # ---- looking ------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether the file or folder exists.

        Raises:
            StorageError: The file system does not tell; the same holds for the methods below.
        """
        return bool(self._kind() != pyarrow.fs.FileType.NotFound)

    def is_file(self) -> bool:
        """Whether the place is a file."""
        return bool(self._kind() == pyarrow.fs.FileType.File)

    def is_dir(self) -> bool:
        """Whether the place is a folder; on an object store: whether it contains anything."""
        return bool(self._kind() == pyarrow.fs.FileType.Directory)

    def _kind(self) -> pyarrow.fs.FileType:
        def look() -> pyarrow.fs.FileType:
            return self.system.get_file_info(self.path).type

        with self._telling("read"):
            # With a time limit: the first request of many commands. A disk is asked often, so without a thread.
            return look() if self.local is not None else in_time(look, str(self))

    def glob(self, pattern: str = "*") -> list[StoragePath]:
        """Files and folders in the folder whose names fit, sorted; none if there is no folder."""
        with self._telling("read"):
            found = self.system.get_file_info(pyarrow.fs.FileSelector(self.path, allow_not_found=True))
        names = (entry.base_name for entry in found)
        return [self / name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern)]

    # ---- reading ------------------------------------------------------------------------------

    def read_bytes(self) -> bytes:
        """The whole file.

        Raises:
            FileNotFoundError: The file does not exist.
            StorageError: The file cannot be read.
        """
        with self._telling("read"), self.system.open_input_stream(self.path) as stream:
            content: bytes = stream.read()
        return content

    def read_text(self) -> str:
        """The whole file as UTF-8 text."""
        return self.read_bytes().decode()

    def read_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """A Parquet file, or a folder of them in the order of their names."""
        with self._telling("read"):
            names = None if columns is None else list(columns)
            return pq.read_table(self.path, columns=names, filesystem=self.system, partitioning=None)

    def open_parquet(self) -> pq.ParquetFile:
        """A Parquet file that can be read in parts."""
        with self._telling("read"):
            return pq.ParquetFile(self.path, filesystem=self.system)

    # ---- writing ------------------------------------------------------------------------------

    def mkdir(self) -> None:
        """Make the folder and its parents if they do not exist."""
        with self._telling("written"):
            self.system.create_dir(self.path, recursive=True)

    def write(self, write: Write) -> None:
        """Let `write` fill a file, which is replaced only when the new content is complete.

        The folder must exist. Except for a local file the content is in memory once.

        Raises:
            StorageError: The file cannot be written, e.g. because the disk is full or the bucket does not exist.
        """
        with self._telling("written"):
            if self.local is not None:
                write_local(self.local, write)
            else:
                content = io.BytesIO()
                write(content)
                self._put(content.getbuffer())

    def write_bytes(self, content: bytes) -> None:
        """Write a file completely or not at all."""
        self.write(lambda stream: stream.write(content))

    def write_text(self, text: str) -> None:
        """Write a UTF-8 text file completely or not at all."""
        self.write_bytes(text.encode())

    def _put(self, content: memoryview) -> None:
        # In one piece: a stream that an error closes early would leave a part of a file that seems complete.
        target = self if _is_object_store(self.system) else self.parent / f".{self.name}-{uuid.uuid4().hex}"
        with self.system.open_output_stream(target.path) as stream:
            stream.write(content)
        if target is not self:
            self.system.move(target.path, self.path)

    @contextlib.contextmanager
    def replaced(self) -> Iterator[StoragePath]:
        """A folder to fill, which replaces this folder when the block ends without an error.

        An object store cannot rename. There this folder is emptied and filled in place, and a reader sees an incomplete
        folder until the end of the block.
        """
        in_place = _is_object_store(self.system)
        target = self if in_place else self.parent / f".{self.name}-{uuid.uuid4().hex}"
        if in_place:
            self.remove()
        target.mkdir()
        yield target
        if not in_place:
            self.remove()
            with self._telling("written"):
                self.system.move(target.path, self.path)

    def remove(self) -> None:
        """Remove the file, or the folder with its content, if it exists."""
        with self._telling("removed"), contextlib.suppress(FileNotFoundError):
            kind = self.system.get_file_info(self.path).type
            if kind == pyarrow.fs.FileType.Directory:
                self.system.delete_dir(self.path)
            elif kind != pyarrow.fs.FileType.NotFound:
                self.system.delete_file(self.path)

    def check_writable(self) -> None:
        """Make the folder, write a file into it, and remove the file.

        Raises:
            StorageError: This is impossible, or takes too long.
        """
        probe = self / f".probe-{uuid.uuid4().hex}"

        def try_out() -> None:
            self.mkdir()
            probe.write_bytes(b"")
            probe.remove()

        in_time(try_out, str(self))

    @contextlib.contextmanager
    def _telling(self, done: str) -> Iterator[None]:
        """Turn errors of the file system into errors that say what to do, except that a file does not exist."""
        try:
            yield
        except (StorageError, pa.ArrowInvalid):  # the latter is about the content of a file
            raise
        except _FAULTS as error:
            if isinstance(error, FileNotFoundError) and done == "read":
                raise
            remedy = _REMOTE_REMEDY if self.local is None else _LOCAL_REMEDIES[done]
            why = getattr(error, "strerror", None) or _line(error)
            raise StorageError(f"{self} cannot be {done}: {why}. {remedy}") from error


# Arrow's Azure client raises errors that are no OSError.
_FAULTS = (OSError, pa.ArrowException)

_LOCAL_REMEDIES = {
    "read": "Check its permissions, and the disk or server that it is on",
    "written": "Free space on that disk, or choose another folder; what was saved before is untouched",
    "removed": "Remove it by hand",
}
_SERVER_REMEDY = "Look whether its server can be reached from here, and whether there are credentials for it"
_REMOTE_REMEDY = (
    "Look whether the bucket is there, and give every process access to it: by the machine's own role, or in the "
    "environment that Ray starts in (for s3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY). Another endpoint is named in "
    "the URI: ?endpoint_override=HOST:PORT&scheme=http"
)


def in_time(work: Callable[[], _T], place: str, limit_s: float = _LIMIT_S) -> _T:
    """Result of `work`, with a time limit.

    A file system whose server is gone can block its callers forever (a hard NFS mount) or for minutes (an object
    store's retries), and nothing in this process can end such a call, so the call is abandoned in a thread.

    Raises:
        StorageError: `work` takes too long, or the file system raises an error.
    """
    outcome: list[_T | BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="bss-ray-storage", daemon=True)
    thread.start()
    thread.join(limit_s)
    if not outcome:
        raise StorageError(f"{place} has not answered within {limit_s:g} s. {_SERVER_REMEDY}")
    found = outcome[0]
    if isinstance(found, _FAULTS) and not isinstance(found, (StorageError, ValueError)):
        raise StorageError(f"{place} cannot be opened: {_line(found)}. {_REMOTE_REMEDY}") from found
    if isinstance(found, BaseException):
        raise found
    return found


# ---- parts ------------------------------------------------------------------------------------


def _local(system: pyarrow.fs.FileSystem, path: str) -> Path | None:
    if isinstance(system, pyarrow.fs.LocalFileSystem):
        return Path(path)
    if isinstance(system, pyarrow.fs.SubTreeFileSystem):
        return _local(system.base_fs, system.base_path + path)
    return None


def _is_object_store(system: pyarrow.fs.FileSystem) -> bool:
    if isinstance(system, pyarrow.fs.SubTreeFileSystem):
        return _is_object_store(system.base_fs)
    if isinstance(system, pyarrow.fs.PyFileSystem) and isinstance(system.handler, pyarrow.fs.FSSpecHandler):
        protocol = system.handler.fs.protocol
        return not _OBJECT_STORES.isdisjoint([protocol] if isinstance(protocol, str) else protocol)
    return system.type_name in _OBJECT_STORES


def _line(error: BaseException) -> str:
    return hidden(first_line(error))
