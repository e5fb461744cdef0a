"""A checkpoint proves what it is of, and says so when it is damaged."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.fs
import pytest
import ray.train
import torch
from fsspec.implementations.local import LocalFileSystem

from bss_ray.errors import CheckpointError, StorageError
from bss_ray.sample import score_files
from bss_ray.sample.holder import Holder
from bss_ray.sample.score_files import write_scores
from bss_ray.sample.state import MeasureBatch, ScoreBlock
from bss_ray.train.checkpoint import (
    Manifest,
    Position,
    SavedCheckpoint,
    write_manifest,
    write_states,
)

SCORE = np.linspace(-1, 1, 17).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint: two holders of 10 and 7 rows, the second with two shards."""
    parts = [ScoreBlock.empty(first, rows) for first, rows in ((0, 10), (10, 2), (12, 5))]
    for part in parts:
        part.score[:] = SCORE[part.first_row : part.stop_row]
        part.last_drawn[:] = 4
    scores = [*write_scores(tmp_path, 0, 1, parts[:1]), *write_scores(tmp_path, 1, 1, parts[1:])]
    digests = write_states(tmp_path, {"model": torch.nn.Linear(2, 2).state_dict()})
    write_manifest(
        tmp_path,
        Manifest(
            fingerprint="abc",
            seed=3,
            rows=17,
            num_classes=2,
            position=Position(2, 5, 1),
            history=[{"epoch": 0}],
            observed=[0.0, 0.0, 0.0],
            digests=digests,
            scores=scores,
        ),
    )
    return tmp_path


def saved(folder: Path) -> SavedCheckpoint:
    return SavedCheckpoint(ray.train.Checkpoint.from_directory(folder))


def test_round_trip(folder: Path) -> None:
    manifest = saved(folder).manifest_for(fingerprint="abc", seed=3)
    assert manifest.position == Position(2, 5, 1)
    assert manifest.history == [{"epoch": 0}]
    assert saved(folder).state("model").keys() == {"weight", "bias"}
    parts = saved(folder).scores(9, 11)
    assert [part.first_row for part in parts] == [0, 10]
    assert np.concatenate([p.score for p in saved(folder).scores(0, 17)]).tolist() == SCORE.tolist()
    assert parts[0].last_drawn.tolist() == [4] * 10


def test_other_data_and_seed_name_both_values(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"other data.*abc.*xyz"):
        saved(folder).manifest_for(fingerprint="xyz", seed=3)
    with pytest.raises(CheckpointError, match=r"another seed: 3, now 4"):
        saved(folder).manifest_for(fingerprint="abc", seed=4)


def test_other_format_names_both_versions(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match=r"format 99.*format 3"):
        saved(folder).manifest()


@pytest.mark.parametrize("file", ["manifest.json", "model.pt", "scores-00001-00000.npz"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_damage_names_the_file(folder: Path, file: str, damage: str) -> None:
    path = folder / file
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"damaged: {file}"):
        (saved(folder).state("model"), saved(folder).scores(0, 17))


class Refusing(LocalFileSystem):
    """As one whose key has expired."""

    protocol = "refusing"

    def open(self, *args: object, **kwargs: object) -> None:
        raise PermissionError("the key has expired")


def test_a_file_system_that_refuses_is_no_damage(folder: Path) -> None:
    refusing = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(Refusing()))
    there = SavedCheckpoint(ray.train.Checkpoint(str(folder), refusing))
    with pytest.raises(StorageError, match=r"manifest\.json cannot be read: the key has expired\. Look whether"):
        there.manifest()


def test_a_pickle_in_place_of_a_state_is_not_run(folder: Path) -> None:
    digests = write_states(folder, {"model": Path("/")})  # any object that is not plain data
    manifest = saved(folder).manifest()
    write_manifest(folder, replace(manifest, digests={**manifest.digests, **digests}))
    with pytest.raises(CheckpointError, match=r"damaged: model\.pt"):
        saved(folder).state("model")


def test_scores_of_another_version_are_refused(folder: Path) -> None:
    # A whole, sound file, but of a later update than the manifest's.
    (late,) = write_scores(folder, 0, 2, [ScoreBlock.empty(0, 10)])
    manifest = saved(folder).manifest()
    write_manifest(folder, replace(manifest, scores=[late, *manifest.scores[1:]]))
    with pytest.raises(CheckpointError, match=r"of score version 2; the manifest says .* of version 1"):
        saved(folder).scores(0, 17)


def test_only_files_that_are_wanted_are_read(folder: Path) -> None:
    (folder / "scores-00001-00001.npz").unlink()
    assert [part.first_row for part in saved(folder).scores(0, 12)] == [0, 10]
    with pytest.raises(CheckpointError, match=r"damaged: scores-00001-00001\.npz"):
        saved(folder).scores(0, 13)


def test_long_runs_are_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_files, "_FILE_ROWS", 4)
    part = ScoreBlock.empty(3, 10)
    part.score[:] = SCORE[:10]
    files = write_scores(tmp_path, 0, 1, [part])
    assert [(file.first_row, file.rows) for file in files] == [(3, 4), (7, 4), (11, 2)]
    again = score_files.read_scores(files, lambda name: (tmp_path / name).read_bytes(), version=1, start=0, stop=99)
    assert np.concatenate([piece.score for piece in again]).tolist() == part.score.tolist()


def test_measures_that_are_not_published_belong_to_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_files, "_FILE_ROWS", 4)
    measured, unmeasured = Holder([(0, 6)]), Holder([(6, 6)])
    measured.receive(MeasureBatch.of(np.array([4, 1]), np.float32([0.5, 0.25]), np.float32([3, 2]), np.array([7, 5])))
    files = [
        *write_scores(tmp_path, 0, 0, measured.state(0)),
        *write_scores(tmp_path, 1, 0, unmeasured.state(0)),
    ]
    read = score_files.read_scores(files, lambda name: (tmp_path / name).read_bytes(), version=0, start=0, stop=12)
    other = Holder([(0, 12)])
    assert other.load(read, 0) == 12
    (state,) = other.state(0)
    assert state.pending is not None
    assert np.flatnonzero(state.pending.measured).tolist() == [1, 4]
    assert state.pending.step[[1, 4]].tolist() == [5, 7]
    assert state.pending.similarity[[1, 4]].tolist() == [0.25, 0.5]
    assert state.pending.information[[1, 4]].tolist() == [2, 3]


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from bss_ray.errors import StorageError
from bss_ray.sample.state import ScoreBlock
from bss_ray.sample.holder import Holder
from bss_ray.sample.score_files import write_scores
from bss_ray.train.checkpoint import write_states
import torch
from fsspec.implementations.local import LocalFileSystem
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for write in (
    lambda: write_scores(Path(sys.argv[1]), 0, 2, [ScoreBlock.empty(0, 100_000)]),
    lambda: write_states(Path(sys.argv[1]), {"model": {"weight": torch.zeros(100_000)}}),
):
    try:
        write()
    except StorageError as error:
        print(error)
"""


def test_a_full_disk_leaves_the_last_good_state(folder: Path) -> None:
    # A limit on the size of files fails a write in the middle, as a full disk does.
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = subprocess.run([sys.executable, "-c", _FULL_DISK, str(folder)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert "scores-00000-00000.npz cannot be written" in lines[0]
    assert "model.pt cannot be written" in lines[1]
    assert "Free space" in lines[1]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
