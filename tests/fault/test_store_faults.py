"""Stores on the disks of several nodes: rows of other nodes, files found again, and a node that is lost."""

from typing import Any

import numpy as np
import pytest
import ray
import ray.data

from bss_ray.data import build
from bss_ray.data.build import build_shards
from bss_ray.data.columns import Columns
from bss_ray.data.shards import Shards
from bss_ray.data.store import StoreConfig
from bss_ray.errors import StorageError
from tests.hosts import Cluster, Host, Node

pytestmark = [pytest.mark.integration, pytest.mark.fault, pytest.mark.usefixtures("two_nodes")]

ROLES = Columns(modalities=("a", "b"), id="name")


def make_dataset() -> ray.data.Dataset:
    """16 blocks; names are wider in later rows."""

    def make(batch: dict[str, np.ndarray]) -> dict[str, Any]:
        rows = batch["id"]
        inputs = (rows[:, None] * 1000 + np.arange(1000)).astype(np.float32)
        return {"a": inputs, "b": -inputs, "label": rows % 3, "name": np.array([f"row {row:d}" for row in rows])}

    return ray.data.range(320, override_num_blocks=16).map_batches(make, batch_size=None)


@pytest.fixture(scope="module")
def third(two_nodes: Cluster) -> Node:
    """A node that will be lost."""
    return two_nodes.add_node(Host())


@pytest.fixture(scope="module")
def shards(third: Node) -> Shards:
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


def files_of(cluster: Cluster, number: int) -> int:
    return len(list(cluster.cache(number).glob("*/shard-*")))


def test_rows_of_other_nodes(two_nodes: Cluster, third: Node, shards: Shards) -> None:
    here = [files_of(two_nodes, number) for number in range(len(two_nodes.nodes))]
    assert sum(here) >= len(shards.parts) > 4
    assert here[two_nodes.nodes.index(third)] > 0, "the node that will be lost holds some"
    assert len({part.node for part in shards.parts}) == sum(count > 0 for count in here) > 1
    check(shards)
    ray.get(ray.remote(num_cpus=1)(check).options(scheduling_strategy="SPREAD").remote(shards))


def test_files_of_all_nodes_are_found_again(shards: Shards) -> None:
    notices: list[str] = []
    found = build_shards(
        make_dataset(), ROLES, store=StoreConfig(kind="disk"), source_key="x", on_notice=notices.append
    )
    assert found.parts == shards.parts
    assert notices == []
    check(found)


def test_a_lost_node_is_a_clear_error_and_the_next_run_recovers(
    two_nodes: Cluster, third: Node, shards: Shards
) -> None:
    two_nodes.lose(third)
    with pytest.raises(StorageError, match=r"a node is gone, and with it the shards on its disk.*Run again"):
        check(shards)
    notices: list[str] = []
    anew = build_shards(make_dataset(), ROLES, store=StoreConfig(kind="disk"), source_key="x", on_notice=notices.append)
    assert "files of the stored dataset are missing: it is made again" in notices[0]
    assert anew.fingerprint == shards.fingerprint
    check(anew)
