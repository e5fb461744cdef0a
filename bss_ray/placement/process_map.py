"""Which process really is where: a message for the people who watch a run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from bss_ray.placement.cluster import read_nodes, role_of
from bss_ray.placement.packing import Node
from bss_ray.runtime.messages import NodeProcesses, PlacementMap
from bss_ray.runtime.ray_internals import CONTROLLER, Actor, actors, free_resources

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
