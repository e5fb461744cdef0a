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
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from bss_ray.errors import ConfigError, StorageError, first_line
from bss_ray.storage.files import Write, absolute, child, hidden, is_uri, parent, write_local

# File systems on which a file appears at once when it is complete: nothing has to be renamed, and renaming is copying.
_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "memory"})

# Until it has answered, a file system is asked for so long. The clients' own limits can add up to many minutes.
_LIMIT_S = 60.0

_T = TypeVar("_T")


@dataclass(frozen=True, repr=False)
class StoragePath:
    """A file or folder on any file system; what a run needs of `pathlib.Path`.

    Every write is whole or not at all: on an object store by nature, elsewhere beside, flushed and renamed.

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
        """The place that a user names.

        Args:
            place: Path or URI; with `system` a path on that file system.
            system: File system, if the place does not tell it.

        Raises:
            ConfigError: a URI that no file system takes.
            StorageError: its file system does not answer.
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
        """What has this name in the folder."""
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
        """The folder that it is in."""
        return replace(self, uri=parent(self.uri), path=posixpath.dirname(self.path.rstrip("/")))

    @property
    def local(self) -> Path | None:
        """As a path of this machine; None where it is none."""
        return _local(self.system, self.path)

    # ---- looking ------------------------------------------------------------------------------

    def exists(self) -> bool:
        """Whether it is there.

        Raises:
            StorageError: the file system does not tell; likewise below.
        """
        return bool(self._kind() != pyarrow.fs.FileType.NotFound)

    def is_file(self) -> bool:
        """Whether it is a file."""
        return bool(self._kind() == pyarrow.fs.FileType.File)

    def is_dir(self) -> bool:
        """Whether it is a folder; on an object store: whether there is anything in it."""
        return bool(self._kind() == pyarrow.fs.FileType.Directory)

    def _kind(self) -> Any:
        def look() -> Any:
            return self.system.get_file_info(self.path).type

        with self._telling("read"):
            # In time, as the first question that many commands ask; a disk is asked often, and at once.
            return look() if self.local is not None else in_time(look, str(self))

    def glob(self, pattern: str = "*") -> list[StoragePath]:
        """What is in the folder under such a name, sorted; nothing where there is no folder."""
        with self._telling("read"):
            found = self.system.get_file_info(pyarrow.fs.FileSelector(self.path, allow_not_found=True))
        names = (entry.base_name for entry in found)
        return [self / name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern)]

    # ---- reading ------------------------------------------------------------------------------

    def read_bytes(self) -> bytes:
        """The whole file.

        Raises:
            FileNotFoundError: there is none.
            StorageError: it cannot be read.
        """
        with self._telling("read"), self.system.open_input_stream(self.path) as stream:
            content: bytes = stream.read()
        return content

    def read_text(self) -> str:
        """The whole file, in UTF-8."""
        return self.read_bytes().decode()

    def read_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """A Parquet file, or a folder of them in the order of their names."""
        with self._telling("read"):
            names = None if columns is None else list(columns)
            return pq.read_table(self.path, columns=names, filesystem=self.system, partitioning=None)

    def open_parquet(self) -> pq.ParquetFile:
        """A Parquet file, to be read in parts."""
        with self._telling("read"):
            return pq.ParquetFile(self.path, filesystem=self.system)

    # ---- writing ------------------------------------------------------------------------------

    def mkdir(self) -> None:
        """Make the folder and those it is in, where they are not there."""
        with self._telling("written"):
            self.system.create_dir(self.path, recursive=True)

    def write(self, write: Write) -> None:
        """Let `write` fill a file that is there whole or not at all; an older one stays until then.

        The folder must be there. But for a local file the content is in memory once.

        Raises:
            StorageError: the disk is full, the bucket is gone, the key may not write, and the like.
        """
        with self._telling("written"):
            if self.local is not None:
                write_local(self.local, write)
            else:
                content = io.BytesIO()
                write(content)
                self._put(content.getbuffer())

    def write_bytes(self, content: bytes) -> None:
        """Write a file whole or not at all."""
        self.write(lambda stream: stream.write(content))

    def write_text(self, text: str) -> None:
        """Write a file whole or not at all, in UTF-8."""
        self.write_bytes(text.encode())

    def _put(self, content: memoryview) -> None:
        # In one piece: a stream that is closed early, by an error, would leave a part of a file that seems whole.
        target = self if _is_object_store(self.system) else self.parent / f".{self.name}-{uuid.uuid4().hex}"
        with self.system.open_output_stream(target.path) as stream:
            stream.write(content)
        if target is not self:
            self.system.move(target.path, self.path)

    @contextlib.contextmanager
    def replaced(self) -> Iterator[StoragePath]:
        """A folder to be filled, which takes the place of this one when the block ends without an error.

        An object store cannot rename: there this folder is emptied and filled in place, and until the end of the block
        a reader sees a part.
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
        """Remove the file, or the folder with all that is in it; nothing to do where there is none."""
        with self._telling("removed"), contextlib.suppress(FileNotFoundError):
            kind = self.system.get_file_info(self.path).type
            if kind == pyarrow.fs.FileType.Directory:
                self.system.delete_dir(self.path)
            elif kind != pyarrow.fs.FileType.NotFound:
                self.system.delete_file(self.path)

    def check_writable(self) -> None:
        """Make the folder, write a file in it, and remove that again.

        Raises:
            StorageError: that cannot be done, or takes too long.
        """
        probe = self / f".probe-{uuid.uuid4().hex}"

        def try_out() -> None:
            self.mkdir()
            probe.write_bytes(b"")
            probe.remove()

        in_time(try_out, str(self))

    @contextlib.contextmanager
    def _telling(self, done: str) -> Iterator[None]:
        """Errors of the file system as errors that say what to do; a file that is not there is none of them."""
        try:
            yield
        except (StorageError, pa.ArrowInvalid):  # the latter is of what is in a file
            raise
        except _FAULTS as error:
            if isinstance(error, FileNotFoundError) and done == "read":
                raise
            remedy = _REMOTE_REMEDY if self.local is None else _LOCAL_REMEDIES[done]
            why = getattr(error, "strerror", None) or _line(error)
            raise StorageError(f"{self} cannot be {done}: {why}. {remedy}") from error


# Arrow's Azure client has errors that are none of the system's.
_FAULTS = (OSError, pa.ArrowException)

_LOCAL_REMEDIES = {
    "read": "Look at its permissions, and at the disk or server that it is on",
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
    """What `work` returns, if it does so in time.

    A file system whose server is gone can keep its callers for ever (a hard NFS mount) or for minutes (an object
    store's retries), and nothing in this process can end such a call: it is left behind in a thread.

    Raises:
        StorageError: it takes too long, or the file system has an error of its own.
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
