"""Which processes fit on which nodes, what is said where they do not, and where scorers go."""

from __future__ import annotations

from typing import Any

import pytest

from bss_ray.errors import ConfigError, ResourceError
from bss_ray.train.packing import Group, Node, fits, matches, most
from bss_ray.train.placement import check_fit, deal, place
from bss_ray.train.resources import Placement


def node(name: str = "a", labels: dict[str, str] | None = None, **resources: float) -> Node:
    return Node(id=name, resources=resources, labels=labels or {})


def nodes(number: int, **resources: float) -> list[Node]:
    return [node(str(index), **resources) for index in range(number)]


def ranks(count: int, selector: dict[str, str] | None = None, apart: bool = False, together: bool = False, **each: float) -> Group:  # fmt: skip  # noqa: E501
    return Group(name="ranks", count=count, each=each, selector=selector or {}, apart=apart, together=together)


def scorers(count: int, **each: float) -> Group:
    return Group(name="scorers", count=count, each=each)


@pytest.mark.parametrize(
    ("there", "asked", "seats"),
    [
        (nodes(2, CPU=3), [ranks(9, CPU=2)], 2),  # 6 CPUs, and no 2 of them left on one node
        (nodes(2, CPU=3, GPU=1), [ranks(9, CPU=1, GPU=1)], 2),
        ([node("a", CPU=8), node("b", CPU=1, GPU=4)], [ranks(9, CPU=1, GPU=1)], 1),
        (nodes(3, CPU=4), [scorers(3, CPU=3), ranks(9, CPU=2)], 0),  # a scorer on each node
        (nodes(3, CPU=4), [scorers(2, CPU=2), ranks(9, CPU=2)], 4),
        (nodes(3, CPU=4), [ranks(9, apart=True, CPU=1)], 3),
        ([*nodes(2, CPU=3), node("big", CPU=5)], [ranks(5, together=True, CPU=1)], 5),
        (nodes(2, CPU=4), [ranks(5, together=True, CPU=1)], 0),
        ([node("a", CPU=2), node("b", {"zone": "b"}, CPU=3)], [ranks(9, {"zone": "b"}, CPU=1)], 3),
        (nodes(1, CPU=0), [scorers(4), ranks(9)], 9),  # nothing taken: they stand anywhere
        (nodes(1, CPU=1), [ranks(20, CPU=0.1)], 10),  # no rounding
        (nodes(1000, CPU=4, GPU=1), [scorers(8, CPU=1), ranks(900, CPU=2, GPU=1)], 900),
    ],
)
def test_most_ranks_that_fit(there: list[Node], asked: list[Group], seats: int) -> None:
    assert most(there, asked, "ranks") == seats


@pytest.mark.parametrize(
    ("gpus", "scorer", "rank", "seats"),
    [
        (1, 0.3, 0.7, 1),
        # Ray puts both scorers on one GPU, and 0.4 of it are too few for a rank (seen with Ray 2.60).
        (2, 0.3, 0.7, 1),
        (2, 0.6, 0.4, 2),
        (2, 0.5, 0.5, 2),
        (3, 0.5, 1, 2),
        (2, 1, 0.5, 0),
    ],
)
def test_shares_of_a_gpu_are_of_one_gpu(gpus: int, scorer: float, rank: float, seats: int) -> None:
    asked = [scorers(2 if gpus > 1 else 1, GPU=scorer), ranks(gpus, GPU=rank)]
    assert most(nodes(1, GPU=gpus), asked, "ranks") == seats


@pytest.mark.parametrize(
    ("there", "asked", "said"),
    [
        (nodes(2, CPU=3), [ranks(7, CPU=1)], r"the run needs 7 CPU \(7 ranks x 1\); the cluster has 6\."),
        (
            nodes(1, CPU=4),
            [scorers(2, CPU=1), ranks(3, CPU=1)],
            r"needs 5 CPU \(2 scorers x 1 \+ 3 ranks x 1\); the cluster has 4",
        ),
        (nodes(2, CPU=3), [ranks(3, CPU=2)], r"each of the ranks needs 2 CPU on one node, .* have room for 2 of 3"),
        (nodes(2, CPU=3), [ranks(3, CPU=1, apart=True)], "on one node, no two of them on one, .* room for 2 of 3"),
        (nodes(2, CPU=3), [ranks(4, CPU=1, together=True)], "on one node, all of them on one, .* room for 0 of 4"),
        (
            nodes(2, CPU=4),
            [scorers(2, CPU=3), ranks(1, CPU=2)],
            r"2 scorers of 3 CPU each and 1 ranks of 2 CPU each do not fit on the nodes at the same time: beside the "
            r"others there is room for 0 of 1 ranks. The nodes have 2 x 4 CPU. Lower a number",
        ),
        (nodes(1, GPU=2), [scorers(2, GPU=0.3), ranks(2, GPU=0.7)], "shares of a GPU on as few GPUs as it can"),
        (
            [node("a", {"zone": "a"}, CPU=3), node("b", {"zone": "b", "disk": "x"}, CPU=3)],
            [ranks(1, {"zone": "c"}, CPU=1)],
            r"ranks may only be on nodes with the label zone=c, and no node has it. Labels of the 2 nodes: "
            r"zone=a \(1\), zone=b \(1\). Change placement.label_selector",
        ),
        (
            [node("a", {"zone": "a"}, CPU=8), node("b", {"zone": "b"}, CPU=3)],
            [ranks(4, {"zone": "b"}, CPU=1)],
            "on one node with the label zone=b, and the nodes have room for 3 of 4",
        ),
        (
            [node("a", **{"GPU": 1, "accelerator_type:A100": 1})],
            [ranks(1, **{"GPU": 1, "accelerator_type:H100": 0.001})],
            r"0\.001 accelerator_type:H100 .* the cluster has 0\. Accelerator types of the cluster: A100",
        ),
    ],
)
def test_what_is_said_where_it_does_not_fit(there: list[Node], asked: list[Group], said: str) -> None:
    with pytest.raises(ResourceError, match=said):
        check_fit(there, asked)


def test_nodes_that_an_autoscaler_can_add_count_and_say_so() -> None:
    coming = [Node(id=f"gpu {index}", resources={"CPU": 8, "GPU": 1}, labels=None, there=False) for index in range(2)]
    there = [node("head", CPU=2), *coming]
    check_fit(there, [ranks(2, {"zone": "b"}, GPU=1)])  # nobody knows their labels yet
    with pytest.raises(ResourceError, match=r"needs 3 GPU .* the cluster has 2, with all 2 nodes that its autoscaler"):
        check_fit(there, [ranks(3, GPU=1)])
    assert place(there, [scorers(2, GPU=0.5)], {"scorers": {"head": 1}}) == {"scorers": ["", ""]}


@pytest.mark.parametrize(
    ("condition", "values"),
    [("a", {"a"}), ("!a", {"b", None}), ("in(a, b)", {"a", "b"}), ("!in(a,b)", {"c", None})],
)
def test_selectors_are_read_as_ray_reads_them(condition: str, values: set[str | None]) -> None:
    labels: list[dict[str, str]] = [{}, {"zone": "a"}, {"zone": "b"}, {"zone": "c"}]
    assert {own.get("zone") for own in labels if matches(own, {"zone": condition})} >= values
    assert matches({}, {"zone": condition}) == (None in values)


def test_places_follow_the_rows() -> None:
    assert deal({"a": 60, "b": 30, "c": 10}, 4) == ["a", "a", "b", "c"] or deal({"a": 60, "b": 30, "c": 10}, 4) == [
        "a", "a", "b", "b"
    ]  # fmt: skip
    assert deal({"a": 2, "b": 1}, 3) == ["a", "a", "b"]
    assert deal({}, 2) == ["", ""]
    there = [node("head", CPU=4), *nodes(2, CPU=4)]
    assert place(there, [scorers(3)], {"scorers": {"0": 200, "1": 100}}) == {"scorers": ["0", "0", "1"]}


def test_scorers_make_way_for_ranks() -> None:
    # The GPUs are where the rows are, and so are too few CPUs for ranks and scorers.
    there = [node("gpu", CPU=4, GPU=2), node("cpu", CPU=4)]
    asked = [scorers(2, CPU=2), ranks(2, CPU=1, GPU=1)]
    seats = place(there, asked, {"scorers": {"gpu": 100.0}})
    assert seats == {"scorers": ["gpu", "cpu"]}
    assert fits(there, asked, {"scorers": {"gpu": 1, "cpu": 1}})
    assert not fits(there, asked, {"scorers": {"gpu": 2}})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ranks": "pakc"}, "unknown placement.ranks 'pakc'; did you mean 'pack'"),
        ({"spare_cpus": -1}, "placement.spare_cpus cannot be negative; received -1"),
        ({"cpus_per_rank": -0.5}, "placement.cpus_per_rank cannot be negative"),
        ({"label_selector": {"zone": "-x"}}, "placement.label_selector={'zone': '-x'}: Invalid label selector value"),
    ],
)
def test_rules_of_a_placement(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Placement(**settings)
    assert said in str(raised.value)


def test_a_placement_is_handed_to_ray_train() -> None:
    placement = Placement(ranks="spread", label_selector={"zone": "a"}, accelerator_type="A100", cpus_per_rank=2)
    scaling = placement.scaling((1, 4), use_gpu=True)
    assert (scaling.num_workers, scaling.placement_strategy, scaling.label_selector) == (
        (1, 4),
        "SPREAD",
        {"zone": "a"},
    )
    assert scaling._resources_per_worker_not_none == {"CPU": 2, "GPU": 1, "accelerator_type:A100": 0.001}
    assert Placement().scaling(2, use_gpu=False)._resources_per_worker_not_none == {"CPU": 1}
