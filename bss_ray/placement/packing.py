"""How many processes of each kind a run's nodes hold, exactly. No Ray.

The processes of a run are a few groups of many equal ones. How many of each group one node holds is counted, and from
that what all nodes hold together. Sums of resources would promise what no node can keep.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

# Ray counts resources in ten-thousandths.
UNIT = 10_000

# Resources that a node has as single devices: a share of one is a share of one device, and 0.6 + 0.6 of two devices
# leave no third 0.6. Ray's own list.
DEVICES = frozenset({"GPU", "TPU", "NPU", "HPU", "RBLN", "neuron_cores"})

# Number of processes of each group, in the order of the groups.
Counts = tuple[int, ...]
# Number of processes of a group that certain nodes must hold: `{group: {node id: count}}`.
Fixed = Mapping[str, Mapping[str, int]]
# Ten-thousandths of each resource.
_Amounts = tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node that exists, or that the cluster's autoscaler can add.

    Attributes:
        id: Ray's id of the node; any unique text for a node that does not exist yet.
        resources: All resources of the node, used or not.
        labels: Labels of the node; None if they are not known before the node exists, which may then have any labels.
        there: Whether the node exists.
        address: Address of the node.
        head: Whether the node is the head of the cluster.
    """

    id: str
    resources: Mapping[str, float]
    labels: Mapping[str, str] | None = field(default_factory=dict)
    there: bool = True
    address: str = ""
    head: bool = False


@dataclass(frozen=True, kw_only=True)
class ProcessGroup:
    """Equal processes of a run.

    Attributes:
        name: Name of the processes, in the plural.
        count: Number of the processes.
        each: Resources of each process.
        selector: Labels of the nodes that the processes may be on, in Ray's syntax.
        per_node: Largest number of the processes on a node; None is without limit.
        together: Whether all processes must be on one node.
    """

    name: str
    count: int
    each: Mapping[str, float]
    selector: Mapping[str, str] = field(default_factory=dict)
    per_node: int | None = None
    together: bool = False

    def text(self, resource: str) -> str:
        """Amount of a resource that all processes of the group need."""
        return f"{self.count} {self.name} x {self.each[resource]:g}"


def fits(nodes: Sequence[Node], groups: Sequence[ProcessGroup], fixed: Fixed | None = None) -> bool:
    """Whether all processes fit at the same time, with those of `fixed` on their nodes."""
    fixed = fixed or {}
    if not _sums_suffice(nodes, groups):
        return False
    # Usually there is enough room, and a simple arrangement shows it.
    found = first_fit(nodes, groups, fixed) is not None
    return found or tuple(group.count for group in groups) in _held(nodes, groups, fixed)


def most(nodes: Sequence[Node], groups: Sequence[ProcessGroup], name: str) -> int:
    """Number of processes of a group, up to its count, that fit with all others; -1 if the others alone do not fit."""
    index = [group.name for group in groups].index(name)

    def too_many(count: int) -> bool:
        asked = [*groups[:index], replace(groups[index], count=count), *groups[index + 1 :]]
        return not fits(nodes, asked)

    return bisect.bisect_left(range(groups[index].count + 1), True, key=too_many) - 1


def _sums_suffice(nodes: Sequence[Node], groups: Sequence[ProcessGroup]) -> bool:
    asked, there = Counter[str](), Counter[str]()
    for group in groups:
        asked.update({name: group.count * amount for name, amount in _units(group.each)})
    for node in nodes:
        there.update({name: amount for name, amount in _units(node.resources) if name in asked})
    return all(amount <= there[name] for name, amount in asked.items())


def first_fit(
    nodes: Sequence[Node], groups: Sequence[ProcessGroup], fixed: Fixed | None = None, *, first: str = ""
) -> dict[str, Counter[str]] | None:
    """How many processes of each group stand on each node, if each takes what it finds; None where some find nothing.

    They take nodes first that have the least of what they have no use for.

    Args:
        nodes: Nodes to stand on.
        groups: Groups in the order in which Ray is asked for them.
        fixed: Processes that stand already.
        first: Beginning of the names of groups that choose before the others.
    """
    placed = {group.name: Counter((fixed or {}).get(group.name, {})) for group in groups}
    rooms = [_room(node, groups) for node in nodes]
    choosing = sorted(groups, key=lambda group: not (first and group.name.startswith(first)))
    for group in choosing:
        for at, node in enumerate(nodes):
            if not (number := placed[group.name][node.id]):
                continue
            smaller = _rooms(rooms[at], _each(group), number)
            if len(smaller) <= number or number > _at_most(node, group):
                return None
            rooms[at] = smaller[number]
    for group in choosing:
        useless = {name for other in groups for name in other.each} - group.each.keys()
        order = sorted(range(len(nodes)), key=lambda at: sum(nodes[at].resources.get(name, 0) for name in useless))
        for at in order:
            here, left = placed[group.name], group.count - placed[group.name].total()
            smaller = _rooms(rooms[at], _each(group), min(left, _at_most(nodes[at], group) - here[nodes[at].id]))
            number = len(smaller) - 1
            if number and (number == left or not group.together):
                rooms[at] = smaller[number]
                here[nodes[at].id] += number
        if placed[group.name].total() < group.count:
            return None
    # Shares of a device depend on who comes first, which is another order than the one here.
    if has_shares(groups) and not all(_stands(node, groups, placed) for node in nodes):
        return None
    return placed


def _stands(node: Node, groups: Sequence[ProcessGroup], placed: Fixed) -> bool:
    """Whether a node has room for these processes, taken in Ray's order."""
    room = _room(node, groups)
    for group in groups:
        number = placed[group.name].get(node.id, 0)
        smaller = _rooms(room, _each(group), number)
        if len(smaller) <= number:
            return False
        room = smaller[number]
    return True


def has_shares(groups: Sequence[ProcessGroup]) -> bool:
    """Whether a process takes a share of a device."""
    return any(0 < group.each.get(name, 0) < 1 for group in groups for name in DEVICES)


# ---- what nodes hold --------------------------------------------------------------------------


def _held(nodes: Sequence[Node], groups: Sequence[ProcessGroup], fixed: Fixed) -> set[Counts]:
    """The largest counts that the nodes hold together, none above its request; fewer of each always fit, too."""
    target = tuple(group.count for group in groups)
    kinds = Counter(_node_counts(node, groups, fixed) for node in nodes)
    held = {(0,) * len(groups)}
    for counts, number in kinds.items():
        held = _together(held, _times(counts, number, target), target)
    return held


def _times(counts: Iterable[Counts], number: int, target: Counts) -> set[Counts]:
    """Largest counts of `number` equal nodes, by doubling, because a cluster may have a thousand nodes."""
    if number == 1:
        return set(counts)
    half = _times(counts, number // 2, target)
    both = _together(half, half, target)
    return _together(both, set(counts), target) if number % 2 else both


def _together(one: set[Counts], other: set[Counts], target: Counts) -> set[Counts]:
    sums = {
        tuple(min(a + b, most) for a, b, most in zip(first, second, target, strict=True))
        for first, second in itertools.product(one, other)
    }
    return _largest(sums)


def _largest(counts: Iterable[Counts]) -> set[Counts]:
    """Counts that no other counts exceed or equal for every group."""
    kept: list[Counts] = []
    for candidate in sorted(set(counts), reverse=True):  # counts that exceed others come before them
        if not any(all(a >= b for a, b in zip(other, candidate, strict=True)) for other in kept):
            kept.append(candidate)
    return set(kept)


def _node_counts(node: Node, groups: Sequence[ProcessGroup], fixed: Fixed) -> frozenset[Counts]:
    """The largest counts that a node holds; none if it cannot hold the processes fixed on it."""
    room = tuple(sorted(_room(node, groups).items()))
    return _counts(room, tuple(_wanted(node, group, fixed) for group in groups))


def _room(node: Node, groups: Sequence[ProcessGroup]) -> _Room:
    """Amounts of an empty node of the resources that the groups need."""
    used = {name for group in groups for name in group.each}
    amounts = _units({name: amount for name, amount in node.resources.items() if name in used})
    return {name: (UNIT,) * (amount // UNIT) if name in DEVICES else (amount,) for name, amount in amounts}


def _wanted(node: Node, group: ProcessGroup, fixed: Fixed) -> _Wanted:
    return _Wanted(
        each=_each(group),
        at_most=_at_most(node, group),
        at_least=fixed.get(group.name, {}).get(node.id, 0),
        all_or_none=group.count if group.together else 0,
    )


def _each(group: ProcessGroup) -> _Amounts:
    return _units({name: amount for name, amount in group.each.items() if amount})


def _at_most(node: Node, group: ProcessGroup) -> int:
    if not matches(node.labels, group.selector):
        return 0
    return group.count if group.per_node is None else min(group.count, group.per_node)


def _units(amounts: Mapping[str, float]) -> _Amounts:
    return tuple(sorted((name, round(amount * UNIT)) for name, amount in amounts.items()))


class _Wanted(NamedTuple):
    """What a group needs on a node."""

    each: _Amounts
    at_most: int
    at_least: int
    all_or_none: int

    def numbers(self, fitting: int) -> Iterable[int]:
        """Number of processes that may be on the node if `fit` of them fit."""
        numbers = range(self.at_least, min(fitting, self.at_most) + 1)
        return [number for number in numbers if number in (0, self.all_or_none)] if self.all_or_none else numbers


# Free parts of each resource: one part for all of it, or one for each device.
_Room = dict[str, tuple[int, ...]]


@functools.lru_cache(maxsize=4096)  # clusters have few kinds of nodes, and each is used again and again
def _counts(room: tuple[tuple[str, tuple[int, ...]], ...], wanted: tuple[_Wanted, ...]) -> frozenset[Counts]:
    """The largest counts in a room, if Ray starts the processes in its way and order."""
    return frozenset(_largest(_fill(dict(room), wanted)))


def _fill(room: _Room, wanted: Sequence[_Wanted]) -> list[Counts]:
    """Counts that include the largest ones."""
    if not wanted:
        return [()]
    first, *others = wanted
    rooms = _rooms(room, first.each, first.at_most)
    numbers = list(first.numbers(len(rooms) - 1))
    if not (first.each and others):  # no other group needs what fewer processes would leave
        numbers = numbers[-1:]
    return [(number, *rest) for number in numbers for rest in _fill(rooms[number], others)]


def _rooms(room: _Room, each: _Amounts, at_most: int) -> list[_Room]:
    """Rooms that 0, 1, 2, ... processes leave, as long as they fit."""
    if not each:
        return [room] * (at_most + 1)
    rooms = [room]
    while len(rooms) <= at_most and (left := _take(rooms[-1], each)) is not None:
        rooms.append(left)
    return rooms


def _take(room: _Room, each: _Amounts) -> _Room | None:
    """Room that one more process leaves; None if it does not fit."""
    left = dict(room)
    for name, amount in each:
        instances = left.get(name, ())
        if name in DEVICES and amount >= UNIT:
            whole = amount // UNIT
            if instances.count(UNIT) < whole:
                return None
            left[name] = (*(part for part in instances if part < UNIT), *(UNIT,) * (instances.count(UNIT) - whole))
        else:
            fitting = [part for part in instances if part >= amount]
            if not fitting:
                return None
            best = list(instances)
            best[best.index(min(fitting))] -= amount  # a share goes where the least is left, as in Ray
            left[name] = tuple(best)
    return left


# ---- labels -----------------------------------------------------------------------------------


def matches(labels: Mapping[str, str] | None, selector: Mapping[str, str]) -> bool:
    """Whether a node with these labels satisfies a selector in Ray's syntax: `a`, `!a`, `in(a,b)`, `!in(a,b)`."""
    return labels is None or all(_matches(labels.get(key), condition) for key, condition in selector.items())


def _matches(value: str | None, condition: str) -> bool:
    inner = re.fullmatch(r"!?(?:in)?\((.*)\)", condition)
    values = [part.strip() for part in inner[1].split(",")] if inner else [condition.removeprefix("!")]
    return (value in values) != condition.startswith("!")
