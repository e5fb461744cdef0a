"""Two nodes that do not share a folder: told before a run begins, with the node's name.

The second node is started in a mount namespace of its own, where another disk lies over a folder of both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs
import pytest
import ray
import ray.train
from ray.cluster_utils import Cluster

import bss_ray
from bss_ray.errors import StorageError
from bss_ray.storage import StoragePath
from bss_ray.storage.probe import check_storage
from tests.runs import COLUMNS, make_columns, make_dataset

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_ray_session")]

# Another disk over `apart`; `locked` takes no writes; what is written to `layered` goes to a layer of the node's own.
_MOUNT = """
set -e
mount -t tmpfs apart "$0/apart"
mount --bind "$0/locked" "$0/locked"
mount -o remount,bind,ro "$0/locked"
mount -t tmpfs layer "$0/layer"
mkdir "$0/layer/upper" "$0/layer/work"
if mount -t overlay -o lowerdir="$0/layered",upperdir="$0/layer/upper",workdir="$0/layer/work" layers "$0/layered"
then touch "$0/has-layers"; fi
exec "$@"
"""


def namespaces() -> bool:
    """Whether this process may mount in a namespace of its own."""
    try:
        done = subprocess.run(
            ["unshare", "-m", "mount", "-t", "tmpfs", "try", "/mnt"], capture_output=True, check=False
        )
    except FileNotFoundError:
        return False
    return done.returncode == 0


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("storage")
    for name in ("shared", "apart", "locked", "layered", "layer"):
        (folder / name).mkdir()
    return folder


@pytest.fixture(scope="module")
def node(folders: Path, no_ray_session: None) -> Iterator[str]:
    """Id of the second node of a cluster of two."""
    if not namespaces():
        pytest.skip("mounting in a namespace of one's own is not allowed here: unshare -m")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    words = ["-m", "ray.scripts.scripts", "start", f"--address={cluster.address}", "--num-cpus=1", "--block"]
    second = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", _MOUNT, str(folders), sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        own = ray.get_runtime_context().get_node_id()
        yield _wait_for_another(own, second)
    finally:
        ray.shutdown()
        second.terminate()  # `ray start --block` ends what it has started
        second.communicate(timeout=60)
        cluster.shutdown()


def _wait_for_another(own: str, process: subprocess.Popen[str]) -> str:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        for node in ray.nodes():
            if node["Alive"] and node["NodeID"] != own:
                return str(node["NodeID"])
        time.sleep(0.2)
    raise AssertionError("no second node within 120 s")


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
