"""Files of a run on whatever file system: the same behaviour, and errors that say what to do."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tensorboardX.proto.event_pb2 import Event

from bss_ray.errors import ConfigError, StorageError
from bss_ray.storage import StoragePath, absolute, hidden
from bss_ray.storage.path import in_time
from bss_ray.train.folder import Events, RunFolder

KINDS = ("path", "file-uri", "sub-tree", "object-store", "remote-folders")


class Renamed(MemoryFileSystem):
    """In memory, as one whose files are seen while they are written, so that they must be renamed."""

    protocol = "renamed"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoragePath]:
    if request.param == "path":
        yield StoragePath.of(tmp_path / "runs")
    elif request.param == "file-uri":
        yield StoragePath.of(f"file://{tmp_path}/runs")
    elif request.param == "sub-tree":
        yield StoragePath.of("runs", pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem()))
    elif request.param == "object-store":
        yield StoragePath.of(f"fsspec+memory://{tmp_path.name}/runs")
    else:
        system = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(Renamed()))
        yield StoragePath.of(f"/{tmp_path.name}/runs", system)


class TestAnyFileSystem:
    def test_files_are_written_read_listed_and_removed(self, folder: StoragePath) -> None:
        folder.check_writable()
        assert folder.glob() == [], "what was tried out is gone"
        file = folder / "a.txt"
        assert not file.exists()
        with pytest.raises(FileNotFoundError):
            file.read_text()
        file.write_text("Größe")
        file.write_text("größer")  # over the older one
        assert (file.read_text(), file.is_file(), file.is_dir(), folder.is_dir()) == ("größer", True, False, True)
        (folder / "inner").mkdir()
        (folder / "inner" / "b.bin").write_bytes(b"\0")
        assert [path.name for path in folder.glob()] == ["a.txt", "inner"]
        assert folder.glob("*.txt") == [file]
        assert (file.parent, file.name, (folder / "inner" / "b.bin").parent.name) == (folder, "a.txt", "inner")
        for path in (file, folder / "inner", folder / "never there"):
            path.remove()
        assert folder.glob() == (folder / "never there").glob() == []

    def test_a_write_that_fails_leaves_the_older_file_and_nothing_else(self, folder: StoragePath) -> None:
        folder.mkdir()
        (folder / "f").write_text("whole")

        def half(stream: object) -> None:
            stream.write(b"ha")  # type: ignore[attr-defined]
            raise RuntimeError("the process meets an error")

        with pytest.raises(RuntimeError):
            (folder / "f").write(half)
        assert (folder / "f").read_text() == "whole"
        assert [path.name for path in folder.glob()] == ["f"]

    def test_a_folder_of_parquet_files_is_replaced(self, folder: StoragePath) -> None:
        folder.mkdir()
        for rows in ([1, 2, 3], [4]):
            with (folder / "scores.parquet").replaced() as inner:
                for number, row in enumerate(rows):
                    table = pa.table({"row": [row], "name": [f"{row}"]})
                    (inner / f"part-{number}.parquet").write(lambda stream, table=table: pq.write_table(table, stream))
            assert (folder / "scores.parquet").read_table(["row"]).to_pydict() == {"row": rows}
        assert [path.name for path in folder.glob()] == ["scores.parquet"]
        with (folder / "scores.parquet" / "part-0.parquet").open_parquet() as part:
            assert part.metadata.num_rows == 1


def test_the_run_folder_of_an_object_store(tmp_path: Path) -> None:
    run = RunFolder(f"fsspec+memory://{tmp_path.name}/runs", "mine")
    assert not run.claim("seed: 1")
    assert run.claim("seed: 1")
    with pytest.raises(ConfigError, match=r"seed: 1 there, 2 now(.|\n)*with a copy of fsspec\+memory://.*/mine/config"):
        run.claim("seed: 2")
    run.write_metrics([{"epoch": 0, "loss": 1.0}])
    assert (run.path / "metrics.csv").read_text() == "epoch,loss\r\n0,1.0\r\n"
    run.write_result({"chosen_epoch": 0})
    assert run.result() == {"chosen_epoch": 0}
    run.release()
    assert not run.claim("seed: 2"), "a run without checkpoints leaves its name free"


def test_events_of_an_epoch_are_there_at_once(folder: StoragePath) -> None:
    with Events(folder / "tensorboard") as events:
        for epoch, loss in enumerate((0.5, 0.25)):
            events.add({"epoch": epoch, "train_loss": loss, "never": float("nan"), "text": "none"})
            assert read_events(folder / "tensorboard") == [(n, "train/loss", 0.5 / (n + 1)) for n in range(epoch + 1)]
    assert len((folder / "tensorboard").glob()) == 1


def read_events(folder: StoragePath) -> list[tuple[int, str, float]]:
    """Step, tag and value of what is in the file of events, but for the epochs themselves."""
    (file,) = folder.glob("events.out.tfevents.*")
    content, found = file.read_bytes(), []
    while content:  # length, its checksum, the event, its checksum
        length = int.from_bytes(content[:8], "little")
        event = Event.FromString(content[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value if value.tag != "epoch"]
        content = content[16 + length :]
    return found


class TestNames:
    def test_options_of_a_uri_stay_behind_the_path(self) -> None:
        place = StoragePath.of("s3://key:word@bucket/runs?endpoint_override=127.0.0.1:1&scheme=http&region=us-east-1")
        inner = place / "mine" / "config.yaml"
        assert inner.path == "bucket/runs/mine/config.yaml"
        assert inner.uri == place.uri.replace("/runs?", "/runs/mine/config.yaml?")
        assert inner.parent.parent == place
        assert StoragePath.of(inner.uri).path == inner.path
        assert "word" not in f"{inner} {inner!r}", "no password on a screen"
        assert str(inner).startswith("s3://key:***@bucket/runs/mine/config.yaml?endpoint_override=")

    def test_paths_mean_the_same_in_another_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert StoragePath.of("runs?").local == tmp_path / "runs?"
        assert (StoragePath.of("runs?") / "a").uri == str(tmp_path / "runs?" / "a")
        assert absolute("a.pt") == str(tmp_path / "a.pt")
        monkeypatch.setenv("HOME", "/home/me")
        assert StoragePath.of("~/runs").path == "/home/me/runs"
        assert absolute("s3://bucket/a.pt") == "s3://bucket/a.pt"

    def test_what_has_no_password_is_shown_as_it_is(self) -> None:
        for uri in ("abfs://container@account.dfs.core.windows.net/runs", "s3://bucket/a:b@c", "/home/a:b@c"):
            assert hidden(uri) == uri

    def test_unknown_kinds_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="names no file system that is known here") as caught:
            StoragePath.of("s3x://key:word@bucket")
        assert "s3x://key:***@bucket" in str(caught.value)
        assert "word" not in str(caught.value)


class TestErrors:
    def test_of_a_local_folder(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match=r"file/runs cannot be written: .*Free space"):
            StoragePath.of(tmp_path / "file" / "runs").check_writable()
        with pytest.raises(StorageError, match=r"no\.txt cannot be written: No such file"):
            (StoragePath.of(tmp_path / "gone") / "no.txt").write_text("")
        assert os.listdir(tmp_path) == ["file"]

    @pytest.mark.parametrize("error", [PermissionError("the key has expired"), pa.ArrowException("no token.\nMore")])
    def test_of_a_store_that_refuses(self, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_args: object, **_options: object) -> None:
            raise error

        for name in ("info", "mkdir", "_open"):
            monkeypatch.setattr(MemoryFileSystem, name, refuse)
        place = StoragePath.of("fsspec+memory://mine")
        for use, done in (
            (place.exists, "opened"),
            (place.mkdir, "written"),
            (lambda: place.write_text(""), "written"),
        ):
            with pytest.raises(StorageError, match=f"memory://mine cannot be {done}: (the key|no token).* bucket is"):
                use()

    def test_a_file_system_that_never_answers(self) -> None:
        never = threading.Event()
        started = time.monotonic()
        with pytest.raises(StorageError, match=r"s3://gone has not answered within 0\.2 s"):
            in_time(never.wait, "s3://gone", limit_s=0.2)
        assert time.monotonic() - started < 30
        never.set()
