"""What Ray says of the cluster: nodes that are there or can be added, and where processes run.

The only use of Ray's private tables for it; what they say is turned into the project's own words here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray._private.label_utils import validate_label_selector
from ray._private.state import state as ray_state
from ray.core.generated import gcs_pb2

from bss_ray.placement.packing import Node

_HEAD = "node:__internal_head__"  # a resource that Ray gives to the head alone
_GROUP_LABEL = "ray.io/node-group"  # the autoscaler's name of a node's kind

# Nodes of a kind without limit: more than any run here asks for.
_NO_LIMIT = 1024


def read_nodes() -> list[Node]:
    """Nodes that are there, and those that the autoscaler can add, if there is one."""
    there = [_node(entry) for entry in ray.nodes() if entry["Alive"]]
    return there + list(_coming(there, _autoscaler_groups()))


def _node(entry: dict[str, Any]) -> Node:
    return Node(
        id=entry.get("NodeID", ""),
        resources=entry["Resources"],
        labels=entry.get("Labels") or {},
        address=entry.get("NodeManagerAddress", ""),
        head=_HEAD in entry["Resources"],
    )


def _autoscaler_groups() -> list[Any]:
    """Kinds of nodes of the cluster's autoscaler, which writes them down for all: `NodeGroupConfig`."""
    config = ray_state.get_cluster_config() if ray.is_initialized() else None
    return [] if config is None else list(config.node_group_configs)


def _coming(there: list[Node], groups: Iterable[Any]) -> Iterable[Node]:
    """Nodes that can still be added of each kind."""
    started = Counter((node.labels or {}).get(_GROUP_LABEL) for node in there)
    for group in groups:
        limit = _NO_LIMIT if group.max_count < 0 else group.max_count
        for index in range(limit - started[group.name]):
            # The autoscaler does not tell which labels its nodes will have.
            yield Node(id=f"{group.name} {index}", resources=dict(group.resources), labels=None, there=False)


def label_problem(selector: Mapping[str, str]) -> str | None:
    """What is wrong with a label selector's syntax, if anything is."""
    problem: str | None = validate_label_selector(dict(selector))
    return problem


@dataclass(frozen=True)
class Process:
    """An actor and where it runs.

    Attributes:
        name: its own; empty where it has none.
        class_name: of its class.
        node: id of its node; empty while it waits for one.
        takes: its resources.
    """

    name: str
    class_name: str
    node: str
    takes: dict[str, float] = field(default_factory=dict)


def read_actors() -> list[Process]:
    """This job's actors that are not dead, from Ray's table of them: one call, and no actor is asked."""
    tables = ray_state._connect_and_get_accessor()
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    entries = map(gcs_pb2.ActorTableData.FromString, tables.get_actor_table(job, None))
    return [
        Process(entry.name, entry.class_name, entry.node_id.hex(), dict(entry.required_resources))
        for entry in entries
        if entry.state != entry.DEAD
    ]


def left_over() -> dict[str, dict[str, float]]:
    """What nobody uses at the moment on each node, by its id."""
    left: dict[str, dict[str, float]] = ray_state.available_resources_per_node()
    return left
