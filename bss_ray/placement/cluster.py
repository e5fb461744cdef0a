"""What Ray says of the cluster: nodes that are there or can be added, and which process of a run is where."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray

from bss_ray.placement.packing import Node
from bss_ray.runtime.messages import NodeProcesses, PlacementMap
from bss_ray.runtime.ray_internals import (
    CONTROLLER,
    Actor,
    NodeGroup,
    actors,
    draining_nodes,
    free_resources,
    node_groups,
)

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


def read_room(prefix: str) -> tuple[list[Node], dict[str, Counter[str]]]:
    """What a run may take of the nodes at this moment, and where its actors are.

    Args:
        prefix: Prefix of the names of the run's actors.

    Returns:
        Nodes that are there to stay, with what is free or taken by the run's own actors; and how many `holders` and
        `scorers` are on each node.
    """
    taken: dict[str, Counter[str]] = defaultdict(Counter)
    standing: dict[str, Counter[str]] = defaultdict(Counter)
    for actor in actors():
        if actor.name.startswith(prefix) and actor.node:
            taken[actor.node].update(actor.takes)
            standing[role_of(actor.name, prefix)][actor.node] += 1
    free, leaving = free_resources(), draining_nodes()
    nodes = [
        # Ray hears of what is taken a moment later than of who has taken it.
        replace(
            node,
            resources={
                name: min(amount, free[node.id].get(name, 0) + taken[node.id][name])
                for name, amount in node.resources.items()
            },
        )
        for node in read_nodes()
        if node.id in free and node.id not in leaving
    ]
    return nodes, standing


def role_of(name: str, prefix: str) -> str:
    """`coordinator`, `holders` or `scorers` of the name of a run's actor."""
    role = name.removeprefix(prefix)
    return role if role == "coordinator" else role.rpartition("-")[0] + "s"


_SHOWN = ("CPU", "GPU")


def process_map_message(prefix: str, rank_nodes: Sequence[str], rank_takes: Mapping[str, float]) -> PlacementMap:
    """Where the processes of a run are at this moment, from two reads of Ray's tables without a call to any process.

    Args:
        prefix: Prefix of the names of the run's actors.
        rank_nodes: Id of the node of each rank.
        rank_takes: Resources of a rank.
    """
    own = [actor for actor in actors() if actor.name.startswith(prefix) or actor.class_name == CONTROLLER]
    there = [(_role(actor, prefix), actor.node, actor.takes) for actor in own]
    return describe([*(("ranks", node, rank_takes) for node in rank_nodes), *there], read_nodes(), free_resources())


def describe(
    processes: Sequence[tuple[str, str, Mapping[str, float]]],
    nodes: Sequence[Node],
    left: Mapping[str, Mapping[str, float]],
) -> PlacementMap:
    """The message of `process_map_message` from processes (role, id of the node, resources)."""
    on: dict[str, Counter[str]] = defaultdict(Counter)
    for what, node, _ in processes:
        on[node][what] += 1
    rows = [
        NodeProcesses(name, dict(on[node.id]), _left(node, left.get(node.id, {})))
        for node, name in zip(nodes, _names(nodes), strict=True)
        if node.there
    ]
    if on[""]:
        rows.append(NodeProcesses("starting", dict(on[""]), {}))
    each = {what: {name: takes[name] for name in sorted(takes) if takes[name]} for what, _, takes in processes}
    return PlacementMap(rows, each)


def _role(actor: Actor, prefix: str) -> str:
    if actor.class_name == CONTROLLER:
        return "controller"
    return role_of(actor.name, prefix)


def _left(node: Node, left: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    return {name: (left.get(name, 0.0), node.resources[name]) for name in _SHOWN if node.resources.get(name)}


def _names(nodes: Sequence[Node]) -> list[str]:
    """Addresses of nodes, with the start of the node's id if several nodes share an address."""
    addresses = Counter(node.address for node in nodes)
    return [
        node.address + (f"/{node.id[:6]}" if addresses[node.address] > 1 else "") + (" (head)" if node.head else "")
        for node in nodes
    ]
