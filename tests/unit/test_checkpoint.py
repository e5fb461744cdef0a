"""A checkpoint proves what it is of, and says so when it is damaged."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray.train
import torch

from bss_ray.errors import CheckpointError
from bss_ray.sample.scorer import PartState
from bss_ray.train.checkpoint import (
    Manifest,
    Position,
    SavedCheckpoint,
    score_file,
    write_manifest,
    write_scores,
    write_states,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint: two holders of 10 and 7 rows, the second with two shards."""
    score = np.linspace(-1, 1, 17)
    single = score.astype(np.float32)
    digests = write_scores(tmp_path, 0, [PartState(0, score[:10], single[:10], single[:10])])
    digests |= write_scores(
        tmp_path,
        1,
        [
            PartState(10, score[10:12], single[10:12], single[10:12]),
            PartState(12, score[12:], single[12:], single[12:]),
        ],
    )
    digests |= write_states(tmp_path, {"model": torch.nn.Linear(2, 2).state_dict()})
    write_manifest(
        tmp_path,
        Manifest(
            fingerprint="abc",
            seed=3,
            rows=17,
            position=Position(2, 5, 1),
            history=[{"epoch": 0}],
            observed=[0.0, 0.0, 0.0],
            digests=digests,
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
    assert np.concatenate([p.score for p in saved(folder).scores(0, 17)]).tolist() == np.linspace(-1, 1, 17).tolist()


def test_other_data_and_seed_name_both_values(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"other data.*abc.*xyz"):
        saved(folder).manifest_for(fingerprint="xyz", seed=3)
    with pytest.raises(CheckpointError, match=r"another seed: 3, now 4"):
        saved(folder).manifest_for(fingerprint="abc", seed=4)


def test_other_format_names_both_versions(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match=r"format 99.*format 1"):
        saved(folder).manifest()


@pytest.mark.parametrize("file", ["manifest.json", "model.pt", score_file(1)])
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


def test_a_pickle_in_place_of_a_state_is_not_run(folder: Path) -> None:
    digests = write_states(folder, {"model": Path("/")})  # any object that is not plain data
    manifest = saved(folder).manifest()
    write_manifest(folder, replace(manifest, digests={**manifest.digests, **digests}))
    with pytest.raises(CheckpointError, match=r"damaged: model\.pt"):
        saved(folder).state("model")
