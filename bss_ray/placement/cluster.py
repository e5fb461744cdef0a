"""The nodes of the cluster: existing nodes, and nodes that its autoscaler can add."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import ray

from bss_ray.placement.packing import Node
from bss_ray.runtime.ray_internals import NodeGroup, node_groups

_HEAD = "node:__internal_head__"  # a resource that Ray gives only to the head
_GROUP_LABEL = "ray.io/node-group"  # the autoscaler's label for the kind of a node

# Number of nodes of a kind without limit, more than any run needs.
_NO_LIMIT = 1024


def read_nodes() -> list[Node]:
    """Existing nodes, and nodes that the autoscaler can add, if there is one."""
    there = [_node(entry) for entry in ray.nodes() if entry["Alive"]]
    return there + list(_coming(there, node_groups()))


def _node(entry: dict[str, Any]) -> Node:
    return Node(
        id=entry.get("NodeID", ""),
        resources=entry["Resources"],
        labels=entry.get("Labels") or {},
        address=entry.get("NodeManagerAddress", ""),
        head=_HEAD in entry["Resources"],
    )


def _coming(there: list[Node], groups: Iterable[NodeGroup]) -> Iterable[Node]:
    """Nodes that can still be added of each kind."""
    started = Counter((node.labels or {}).get(_GROUP_LABEL) for node in there)
    for group in groups:
        limit = _NO_LIMIT if group.max_count < 0 else group.max_count
        for index in range(limit - started[group.name]):
            # The autoscaler does not tell the labels of its nodes.
            yield Node(id=f"{group.name} {index}", resources=group.resources, labels=None, there=False)
