"""Stores on the disks of several nodes: rows of other nodes, files found again, and a node that is lost."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.data
from ray.cluster_utils import Cluster

from bss_ray.data import build
from bss_ray.data.build import build_shards
from bss_ray.data.columns import Columns
from bss_ray.data.shards import Shards
from bss_ray.data.store import StoreConfig
from bss_ray.errors import StorageError

pytestmark = [pytest.mark.integration, pytest.mark.fault]

ROLES = Columns(modalities=("a", "b"), id="name")


@pytest.fixture(scope="module")
def cluster(no_ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Path]]:
    """Two nodes, each with a cache folder of its own."""
    root = tmp_path_factory.mktemp("nodes")
    cluster = Cluster()
    for number in range(2):
        cluster.add_node(num_cpus=2, env_vars={**os.environ, "BSS_RAY_CACHE": str(root / f"node{number}")})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield cluster, root
    ray.shutdown()
    cluster.shutdown()


def make_dataset() -> ray.data.Dataset:
    """16 blocks; names are wider in later rows."""

    def make(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        rows = batch["id"]
        inputs = (rows[:, None] * 1000 + np.arange(1000)).astype(np.float32)
        return {"a": inputs, "b": -inputs, "label": rows % 3, "name": np.array([f"row {row:d}" for row in rows])}

    return ray.data.range(320, override_num_blocks=16).map_batches(make, batch_size=None)


@pytest.fixture(scope="module")
def shards(cluster: tuple[Cluster, Path]) -> Shards:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "SHARD_BYTES", 300_000)
        return build_shards(make_dataset(), ROLES, store=StoreConfig(kind="disk"), source_key="x")


def check(shards: Shards) -> None:
    """Rows of all shards, wherever they are asked for."""
    rows = np.random.default_rng(0).permutation(320)[:100]
    batch = shards.gather(rows, ROLES.all)
    np.testing.assert_array_equal(batch["a"][:, 3], rows * 1000 + 3)
    assert batch["name"].tolist() == [f"row {row}" for row in rows]
    for index, part in enumerate(shards.parts):
        np.testing.assert_array_equal(
            shards.read(index)["b"][:, 0], -1000 * np.arange(part.rows) - 1000 * part.first_row
        )


def test_rows_of_other_nodes(cluster: tuple[Cluster, Path], shards: Shards) -> None:
    _, root = cluster
    here = [len(list((root / f"node{number}").glob("*/shard-*"))) for number in range(2)]
    assert sum(here) >= len(shards.parts) > 4
    assert 0 not in here, "both nodes hold some"
    assert len({part.node for part in shards.parts}) == 2
    check(shards)
    ray.get(ray.remote(num_cpus=1)(check).options(scheduling_strategy="SPREAD").remote(shards))


def test_files_of_both_nodes_are_found_again(cluster: tuple[Cluster, Path], shards: Shards) -> None:
    notices: list[str] = []
    found = build_shards(
        make_dataset(), ROLES, store=StoreConfig(kind="disk"), source_key="x", on_notice=notices.append
    )
    assert found.parts == shards.parts
    assert notices == []
    check(found)


def test_a_lost_node_is_a_clear_error_and_the_next_run_recovers(cluster: tuple[Cluster, Path], shards: Shards) -> None:
    nodes, root = cluster
    nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
    with pytest.raises(StorageError, match=r"a node is gone, and with it the shards on its disk.*Run again"):
        check(shards)
    nodes.add_node(num_cpus=2, env_vars={**os.environ, "BSS_RAY_CACHE": str(root / "node2")})
    notices: list[str] = []
    anew = build_shards(make_dataset(), ROLES, store=StoreConfig(kind="disk"), source_key="x", on_notice=notices.append)
    assert "files of the stored dataset are missing: it is made again" in notices[0]
    assert anew.fingerprint == shards.fingerprint
    check(anew)
