"""Whether all processes of a run fit at the same time, and where its actors must be for that. Without Ray."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from bss_ray.errors import ResourceError
from bss_ray.placement.packing import UNIT, Fixed, Node, ProcessGroup, first_fit, fits, has_shares, matches, most

_SHARES = "; Ray puts shares of a GPU on as few GPUs as it can"


def check_fit(nodes: Sequence[Node], groups: Sequence[ProcessGroup]) -> None:
    """Refuse groups that the nodes can never hold.

    Args:
        nodes: All nodes that exist or can be added.
        groups: Groups in the order in which Ray is asked for them.

    Raises:
        ResourceError: The groups do not fit; the error names group, resource or label, request, supply and remedy.
    """
    if fits(nodes, groups):
        return
    for group in groups:
        _check_labels(nodes, group)
    for name in sorted({name for group in groups for name in group.each}):
        _check_sum(nodes, groups, name)
    for group in groups:
        _check_alone(nodes, group)
    _refuse_together(nodes, groups)


def place(
    nodes: Sequence[Node], groups: Sequence[ProcessGroup], weights: Mapping[str, Mapping[str, float]]
) -> dict[str, list[str]]:
    """Places of the processes of some groups with which all other processes still fit.

    Args:
        nodes: All nodes that exist or can be added.
        groups: Groups that fit on the nodes.
        weights: For each group to place, how much of its work is on each node.

    Returns:
        Node of each process by group; empty for a process that must wait for a node that does not exist yet.
    """
    there = {node.id for node in nodes if node.there}
    fixed: dict[str, Counter[str]] = {name: Counter() for name in weights}
    placed: dict[str, list[str]] = {name: [] for name in weights}
    for group in groups:
        if group.name not in weights:
            continue
        shares = {node: weight for node, weight in weights[group.name].items() if node in there and weight > 0}
        by_weight = sorted(shares, key=lambda node: (-shares[node], node))
        rest = sorted(there - shares.keys())
        for wanted in deal(shares, group.count):
            choices = dict.fromkeys([wanted, *by_weight, *rest])
            placed[group.name].append(_first_that_fits(nodes, groups, fixed, group.name, choices))
    return placed


def _first_that_fits(
    nodes: Sequence[Node],
    groups: Sequence[ProcessGroup],
    fixed: dict[str, Counter[str]],
    name: str,
    choices: Iterable[str],
) -> str:
    """The first of the nodes with room for one more process of the group, which is fixed there."""
    for choice in choices:
        fixed[name][choice] += 1
        if choice and fits(nodes, groups, fixed):
            return choice
        fixed[name][choice] -= 1
    return ""


def deal(weights: Mapping[str, float], count: int) -> list[str]:
    """`count` places on nodes in proportion to their weights, by largest remainder; empty places without weights."""
    total = sum(weights.values())
    if not total:
        return [""] * count
    exact = {node: count * weight / total for node, weight in weights.items()}
    dealt = {node: int(share) for node, share in exact.items()}
    by_remainder = sorted(exact, key=lambda node: (dealt[node] - exact[node], node))
    for node in by_remainder[: count - sum(dealt.values())]:
        dealt[node] += 1
    return [node for node in sorted(dealt, key=lambda node: (-dealt[node], node)) for _ in range(dealt[node])]


def place_ranks(
    nodes: Sequence[Node], groups: Sequence[ProcessGroup], standing: Fixed, *, ranks: str, spread: bool
) -> dict[str, list[str]] | None:
    """Node of each rank, so that all other processes of the run fit, too.

    Args:
        nodes: Nodes with what the run may take of them.
        groups: All processes of the run, in the order in which Ray is asked for them.
        standing: Processes that stand already.
        ranks: Beginning of the names of the groups of ranks.
        spread: Put as few ranks on a node as possible, in place of as many.

    Returns:
        Nodes by group of ranks; None where first fit finds no place for all, which does not mean that there is none.
    """
    own = [group for group in groups if group.name.startswith(ranks)]
    for most_here in range(1, 1 + sum(group.count for group in own)) if spread else [None]:
        asked = [replace(group, per_node=group.per_node or most_here) if group in own else group for group in groups]
        placed = first_fit(nodes, asked, standing, first=ranks)
        if placed is not None:
            return {group.name: list(placed[group.name].elements()) for group in own}
    return None


def copies_that_fit(nodes: Sequence[Node], groups: Sequence[ProcessGroup], *, at_most: int) -> int:
    """How many times all groups stand on the nodes at the same time."""

    def too_many(number: int) -> bool:
        return not fits(nodes, [replace(group, count=number * group.count) for group in groups])

    return bisect.bisect_left(range(1, at_most + 1), True, key=too_many)


def elastic_ranks(nodes: Sequence[Node], groups: Sequence[ProcessGroup], counted: int, *, at_least: int) -> int:
    """Number of ranks of an elastic run.

    Args:
        nodes: Nodes of the cluster; those that are not there yet do not count.
        groups: All processes of the run; the last are the ranks.
        counted: Number of ranks that Ray takes for possible.
        at_least: Smallest number of ranks. So many need not leave room for the others, which a run can do without for
            a while.
    """
    *others, ranks = groups
    here = [node for node in nodes if node.there]
    for beside in (others, []):
        count = most(here, [*beside, replace(ranks, count=counted)], ranks.name)
        if count >= at_least:
            return count
    return 0


# ---- what is wrong ----------------------------------------------------------------------------


def _check_labels(nodes: Sequence[Node], group: ProcessGroup) -> None:
    if group.count == 0 or any(matches(node.labels, group.selector) for node in nodes):
        return
    raise ResourceError(
        f"the {group.name} may only be on nodes with the label {_selector(group)}, and no node has it. "
        f"{_labels_there(nodes, group)}. Change placement.label_selector, or start nodes with that label "
        "(ray start --labels)"
    )


def _labels_there(nodes: Sequence[Node], group: ProcessGroup) -> str:
    """The values that nodes have of the labels that are asked for; where none has the label, the labels there are."""
    there = Counter(
        (key, value) for node in nodes for key, value in (node.labels or {}).items() if not key.endswith("node-id")
    )
    asked = {pair: number for pair, number in there.items() if pair[0] in group.selector} or there
    listed = ", ".join(f"{key}={value} ({number})" for (key, value), number in sorted(asked.items()))
    return f"Labels of the {len(nodes)} nodes: {listed or 'none'}"


def _check_sum(nodes: Sequence[Node], groups: Sequence[ProcessGroup], name: str) -> None:
    asking = [group for group in groups if group.each.get(name) and group.count]
    wanted = sum(group.count * group.each[name] for group in asking)
    there = sum(node.resources.get(name, 0) for node in nodes)
    if wanted > there + 0.5 / UNIT:
        parts = " + ".join(group.text(name) for group in asking)
        raise ResourceError(
            f"the run needs {wanted:g} {name} ({parts}); the cluster has {there:g}{_coming(nodes)}. "
            f"{_hint(nodes, name)}"
        )


def _hint(nodes: Sequence[Node], name: str) -> str:
    prefix = "accelerator_type:"
    if name.startswith(prefix):
        types = sorted({own.removeprefix(prefix) for node in nodes for own in node.resources if own.startswith(prefix)})
        return f"Accelerator types of the cluster: {', '.join(types) or 'none'}"
    return "Lower their numbers, or give each of them less"


def _coming(nodes: Sequence[Node]) -> str:
    """A note if nodes count that do not exist yet."""
    coming = sum(not node.there for node in nodes)
    return f", with all {coming} nodes that its autoscaler may add" if coming else ""


def _check_alone(nodes: Sequence[Node], group: ProcessGroup) -> None:
    room = most(nodes, [group], group.name)
    if room < group.count:
        takes = " and ".join(f"{amount:g} {name}" for name, amount in sorted(group.each.items()) if amount)
        where = f" with the label {_selector(group)}" if group.selector else ""
        apart = ", all of them on one" if group.together else ", no two of them on one" if group.per_node == 1 else ""
        raise ResourceError(
            f"each of the {group.name} needs {takes or 'nothing'} on one node{where}{apart}, and the nodes have room "
            f"for {room} of {group.count}{_coming(nodes)}. Lower their number, or give each of them less"
        )


def _refuse_together(nodes: Sequence[Node], groups: Sequence[ProcessGroup]) -> None:
    """Each group fits alone, but not all groups together: names the first that does not fit with those before it."""
    for stop in range(2, len(groups) + 1):
        last = groups[stop - 1]
        room = most(nodes, groups[:stop], last.name)
        if room < last.count:
            asked = " and ".join(_text(group) for group in groups[:stop] if group.count)
            raise ResourceError(
                f"{asked} do not fit on the nodes at the same time{_coming(nodes)}: next to the others there is room "
                f"for {max(room, 0)} of {last.count} {last.name}. The nodes have {_shown(nodes, groups[:stop])}"
                f"{_SHARES if has_shares(groups[:stop]) else ''}. Lower a number, or give each of them less"
            )
    raise AssertionError("all of them fit")


def _text(group: ProcessGroup) -> str:
    takes = " + ".join(f"{amount:g} {name}" for name, amount in sorted(group.each.items()) if amount)
    return f"{group.count} {group.name} of {takes or 'nothing'} each" + (
        f" ({_selector(group)})" if group.selector else ""
    )


def _selector(group: ProcessGroup) -> str:
    return " and ".join(f"{key}={value}" for key, value in sorted(group.selector.items()))


def _shown(nodes: Sequence[Node], groups: Sequence[ProcessGroup]) -> str:
    names = sorted({name for group in groups for name, amount in group.each.items() if amount})
    kinds = Counter(" + ".join(f"{node.resources.get(name, 0):g} {name}" for name in names) for node in nodes)
    return "; ".join(f"{number} x {kind}" if number > 1 else kind for kind, number in kinds.items())
