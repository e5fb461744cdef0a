"""Counts of processes that nodes hold, against trying every arrangement."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from bss_ray.placement import packing
from bss_ray.placement.fit import place, place_ranks
from bss_ray.placement.packing import Node, ProcessGroup, fits, most

# Amounts in halves and thirds of what nodes have, so that rounding and left-overs matter.
AMOUNTS = st.sampled_from([0, 0.5, 1, 1.5, 2, 3])


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[Node], list[ProcessGroup]]:
    labels = st.sampled_from([{}, {"zone": "a"}, {"zone": "b"}])
    nodes = [
        Node(id=str(index), resources={"CPU": draw(AMOUNTS), "disk": draw(AMOUNTS)}, labels=draw(labels))
        for index in range(draw(st.integers(1, 3)))
    ]
    groups = [
        ProcessGroup(
            name=name,
            count=draw(st.integers(0, 3)),
            each={"CPU": draw(AMOUNTS), "disk": draw(st.sampled_from([0, 0, 0.5, 1]))},
            selector=draw(st.sampled_from([{}, {}, {"zone": "a"}])),
            per_node=1 if draw(st.booleans()) and name == "ranks" else None,
        )
        for name in ("scorers", "ranks")
    ]
    return nodes, groups


def arrangements(nodes: Sequence[Node], groups: Sequence[ProcessGroup]) -> Iterator[list[list[Node]]]:
    """Every way to give each process of each group a node, of those that hold."""
    each = [itertools.combinations_with_replacement(nodes, group.count) for group in groups]
    for chosen in itertools.product(*(list(ways) for ways in each)):
        if holds(nodes, groups, chosen):
            yield [list(own) for own in chosen]


def holds(nodes: Sequence[Node], groups: Sequence[ProcessGroup], chosen: Sequence[Sequence[Node]]) -> bool:
    for node in nodes:
        counts = [sum(one is node for one in own) for own in chosen]
        for name in ("CPU", "disk"):
            if (
                sum(count * group.each[name] for count, group in zip(counts, groups, strict=True))
                > node.resources[name]
            ):
                return False
        for count, group in zip(counts, groups, strict=True):
            zone = group.selector.get("zone")
            if count and zone is not None and (node.labels or {}).get("zone") != zone:
                return False
            if group.per_node is not None and count > group.per_node:
                return False
    return True


@given(clusters())
def test_fits_exactly_if_some_arrangement_holds(cluster: tuple[list[Node], list[ProcessGroup]]) -> None:
    nodes, groups = cluster
    some = any(True for _ in arrangements(nodes, groups))
    assert fits(nodes, groups) == some
    # The exact count alone, too, without the shorter ways to the same answer.
    assert (tuple(group.count for group in groups) in packing._held(nodes, groups, {})) == some
    scorers, ranks = groups
    more = replace(ranks, count=4)
    seats = [
        count
        for count in range(5)
        if any(
            True
            for _ in arrangements(
                nodes,
                [
                    scorers,
                    ProcessGroup(
                        name="ranks", count=count, each=more.each, selector=more.selector, per_node=more.per_node
                    ),
                ],
            )
        )
    ]
    assert most(nodes, [scorers, more], "ranks") == max(seats, default=-1)


@given(clusters(), st.dictionaries(st.sampled_from("0123"), st.integers(1, 9)))
def test_scorers_are_placed_so_that_ranks_fit(
    cluster: tuple[list[Node], list[ProcessGroup]], rows: dict[str, int]
) -> None:
    nodes, groups = cluster
    if not fits(nodes, groups):
        return
    seats = place(nodes, groups, {"scorers": {node: float(count) for node, count in rows.items()}})["scorers"]
    by_id = {node.id: node for node in nodes}
    fixed = [by_id[name] for name in seats]
    assert len(fixed) == groups[0].count
    left = itertools.combinations_with_replacement(nodes, groups[1].count)
    assert any(holds(nodes, groups, [fixed, list(own)]) for own in left)


@given(clusters(), st.booleans(), st.data())
def test_ranks_get_nodes_on_which_all_others_fit(
    cluster: tuple[list[Node], list[ProcessGroup]], spread: bool, data: st.DataObject
) -> None:
    nodes, groups = cluster
    by_id = {node.id: node for node in nodes}
    # Some scorers stand already.
    standing = data.draw(st.lists(st.sampled_from(nodes), max_size=groups[0].count))
    placed = place_ranks(
        nodes, groups, {"scorers": Counter(node.id for node in standing)}, ranks="ranks", spread=spread
    )
    if placed is None:
        return
    ranks = [by_id[name] for name in placed["ranks"]]
    assert len(ranks) == groups[1].count
    others = itertools.combinations_with_replacement(nodes, groups[0].count - len(standing))
    assert any(holds(nodes, groups, [[*standing, *rest], ranks]) for rest in others)
    # First fit finds no way that is more even.
    largest = max((ranks.count(node) for node in nodes), default=0)
    if spread and largest > 1:
        assert (
            place_ranks(
                nodes,
                [groups[0], replace(groups[1], per_node=largest - 1)],
                {"scorers": Counter(node.id for node in standing)},
                ranks="ranks",
                spread=False,
            )
            is None
        )
