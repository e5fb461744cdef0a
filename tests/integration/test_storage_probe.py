"""Two nodes that do not share a folder: told before a run begins, with the node's name.

The second node runs in a mount namespace of its own, where another disk lies over a folder of both.
"""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow.fs
import pytest
import ray
import ray.train

import bss_ray
from bss_ray.errors import StorageError
from bss_ray.storage import StoragePath
from bss_ray.storage.probe import check_storage
from tests.hosts import Cluster
from tests.runs import COLUMNS, make_columns, make_dataset

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("two_nodes")]


@pytest.fixture(scope="module")
def folders(two_nodes: Cluster) -> Path:
    return two_nodes.folder / "mounts"


@pytest.fixture(scope="module")
def node(two_nodes: Cluster) -> str:
    """Id of the second node."""
    if not two_nodes.nodes[1].host.enter:
        pytest.skip("mounting in a namespace of one's own is not allowed here: unshare -m")
    own = ray.get_runtime_context().get_node_id()
    return next(str(node["NodeID"]) for node in ray.nodes() if node["Alive"] and node["NodeID"] != own)


def test_a_shared_folder_passes_and_stays_clean(node: str, folders: Path) -> None:
    check_storage(StoragePath.of(folders / "shared" / "runs" / "mine"))
    assert os.listdir(folders / "shared" / "runs" / "mine") == []


def test_a_node_with_another_disk_there_is_named(node: str, folders: Path) -> None:
    with pytest.raises(StorageError) as caught:
        check_storage(StoragePath.of(folders / "apart" / "mine"))
    text = str(caught.value)
    assert text.startswith(f"all 2 nodes of the cluster must be able to use {folders}/apart/mine:\n")
    (line,) = (line for line in text.splitlines() if line.startswith("  node"))
    assert f"id {node})" in line
    assert "the folder is not shared" in line
    assert "Mount one file system there on all nodes" in text
    assert os.listdir(folders / "apart" / "mine") == []


def test_a_node_that_cannot_write_is_named_with_the_cause(node: str, folders: Path) -> None:
    with pytest.raises(StorageError, match=rf"id {node}\) cannot write there: .*Read-only file system"):
        check_storage(StoragePath.of(folders / "locked"))
    assert os.listdir(folders / "locked") == []


def test_a_node_whose_files_are_not_seen_is_named(node: str, folders: Path) -> None:
    if not (folders / "has-layers").exists():
        pytest.skip("no overlay over this file system")
    with pytest.raises(StorageError, match=rf"id {node}\) writes where this process \(.+\) does not see it"):
        check_storage(StoragePath.of(folders / "layered"))
    assert os.listdir(folders / "layered") == []


def test_a_node_that_does_not_answer_is_named(node: str, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bss_ray.storage.probe._LIMIT_S", 0)
    with pytest.raises(StorageError, match=rf"id {node}\) has not answered within 0 s"):
        check_storage(StoragePath.of(folders / "shared"))


def loop() -> None:
    sampler = bss_ray.get_sampler()
    model = ray.train.torch.prepare_model(bss_ray.models.LateFusion(shapes={"a": (6,), "b": (6,)}, num_classes=3))
    for _ in sampler.epochs(1):
        for batch in sampler.batches():
            sampler.observe(batch, model(batch))
        sampler.report({}, model=model)


def trainer(**run: object) -> bss_ray.BalancedTrainer:
    return bss_ray.BalancedTrainer(
        loop,
        dataset=make_dataset(make_columns()),
        columns=COLUMNS,
        scheduler=bss_ray.Uniform(),
        run_config=ray.train.RunConfig(name="run", **run),
    )


def test_a_trainer_is_stopped_before_its_data_are_read(node: str, folders: Path) -> None:
    with pytest.raises(StorageError, match="the folder is not shared"):
        trainer(storage_path=str(folders / "apart")).fit()


def test_a_trainer_on_a_file_system_that_is_handed_over(node: str, folders: Path) -> None:
    system = pyarrow.fs.SubTreeFileSystem(str(folders), pyarrow.fs.LocalFileSystem())
    result = trainer(storage_path="shared", storage_filesystem=system).fit()
    assert result.checkpoint.path.startswith("shared/run/checkpoint_")
    assert (folders / result.checkpoint.path / "manifest.json").exists()
