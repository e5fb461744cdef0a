"""Which processes fit on which nodes, what is said where they do not, and where scorers go."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

import pytest
import ray
import ray.train
import yaml
from ray.core.generated import autoscaler_pb2
from rich.console import Console

from bss_ray.data.columns import Columns
from bss_ray.data.shards import Shard
from bss_ray.errors import ConfigError, ResourceError
from bss_ray.placement import cluster
from bss_ray.placement.cluster import describe, read_nodes
from bss_ray.placement.fit import check_fit, deal, elastic_ranks, place, place_ranks
from bss_ray.placement.packing import Node, ProcessGroup, fits, matches, most
from bss_ray.placement.resources import Placement, ResourceRequest, check_resources, rank_selectors
from bss_ray.report.console import Display, placement_lines
from bss_ray.runtime import ray_internals
from bss_ray.scoring.config import Scoring
from bss_ray.train import rank_trainer
from bss_ray.train.rank_trainer import PinRanks
from bss_ray.train.settings import training_config
from bss_ray.train.trainer import BalancedTrainer
from bss_ray.tune.config import TuneConfig


def node(name: str = "a", labels: dict[str, str] | None = None, **resources: float) -> Node:
    return Node(id=name, resources=resources, labels=labels or {})


def nodes(number: int, **resources: float) -> list[Node]:
    return [node(str(index), **resources) for index in range(number)]


def ranks(
    count: int, selector: dict[str, str] | None = None, apart: bool = False, together: bool = False, **each: float
) -> ProcessGroup:
    return ProcessGroup(
        name="ranks",
        count=count,
        each=each,
        selector=selector or {},
        per_node=1 if apart else None,
        together=together,
    )


def scorers(count: int, **each: float) -> ProcessGroup:
    return ProcessGroup(name="scorers", count=count, each=each)


@pytest.mark.parametrize(
    ("there", "asked", "seats"),
    [
        (nodes(2, CPU=3), [ranks(9, CPU=2)], 2),  # 6 CPUs, and no 2 of them left on one node
        (nodes(2, CPU=3, GPU=1), [ranks(9, CPU=1, GPU=1)], 2),
        ([node("a", CPU=8), node("b", CPU=1, GPU=4)], [ranks(9, CPU=1, GPU=1)], 1),
        (nodes(3, CPU=4), [scorers(3, CPU=3), ranks(9, CPU=2)], 0),  # a scorer on each node
        (nodes(3, CPU=4), [scorers(2, CPU=2), ranks(9, CPU=2)], 4),
        (nodes(3, CPU=4), [ranks(9, apart=True, CPU=1)], 3),
        ([*nodes(2, CPU=3), node("big", CPU=5)], [ranks(9, together=True, CPU=1)], 5),
        (nodes(2, CPU=4), [ranks(5, together=True, CPU=1)], 4),
        ([node("a", CPU=2), node("b", {"zone": "b"}, CPU=3)], [ranks(9, {"zone": "b"}, CPU=1)], 3),
        (nodes(1, CPU=0), [scorers(4), ranks(9)], 9),  # nothing taken: they stand anywhere
        (nodes(1, CPU=1), [ranks(20, CPU=0.1)], 10),  # no rounding
        (nodes(1000, CPU=4, GPU=1), [scorers(8, CPU=1), ranks(900, CPU=2, GPU=1)], 900),
    ],
)
def test_most_ranks_that_fit(there: list[Node], asked: list[ProcessGroup], seats: int) -> None:
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
        (nodes(2, CPU=3), [ranks(4, CPU=1, together=True)], "on one node, all of them on one, .* room for 3 of 4"),
        (
            nodes(2, CPU=4),
            [scorers(2, CPU=3), ranks(1, CPU=2)],
            r"2 scorers of 3 CPU each and 1 ranks of 2 CPU each do not fit on the nodes at the same time: next to the "
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
def test_what_is_said_where_it_does_not_fit(there: list[Node], asked: list[ProcessGroup], said: str) -> None:
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
    assert deal({"a": 50, "b": 30, "c": 20}, 4) == ["a", "a", "b", "c"]  # 2, 1.2 and 0.8 of 4
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


@dataclass
class Parts:
    """Of `Shards`, what placement looks at."""

    parts: list[Shard]


def test_actors_go_where_the_rows_are_and_else_where_cpus_are() -> None:
    there = [node("head", CPU=0), *nodes(2, CPU=4)]
    request = ResourceRequest(
        Scoring(), there, [scorers(3), ProcessGroup(name="holders", count=2, each={}), ranks(1, CPU=1)]
    )

    def seats(*rows_on: tuple[str, int]) -> dict[str, list[str]]:
        return request.assign_nodes(Parts([Shard(0, rows, where) for where, rows in rows_on]))  # type: ignore[arg-type]

    near = seats(("0", 10), ("1", 15), ("1", 15), ("gone", 999))
    assert near == {"scorers": ["1", "1", "0"], "holders": ["0", "1"]}  # 2.25 and 0.75, 1.5 and 0.5
    assert set(seats(("", 70))["scorers"]) == {"0", "1"}


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
    scaling = placement.scaling(ray.train.ScalingConfig(num_workers=(1, 4), use_gpu=True))
    assert (scaling.num_workers, scaling.placement_strategy, scaling.label_selector) == (
        (1, 4),
        "SPREAD",
        {"zone": "a"},
    )
    assert scaling._resources_per_worker_not_none == {"CPU": 2, "GPU": 1, "accelerator_type:A100": 0.001}


def test_what_a_placement_leaves_at_its_default_is_as_ray_train_is_told() -> None:
    given = ray.train.ScalingConfig(
        num_workers=2,
        resources_per_worker={"CPU": 3, "special": 1},
        placement_strategy="STRICT_SPREAD",
        label_selector={"zone": "a"},
        elastic_resize_monitor_interval_s=5.0,
    )
    assert Placement(spare_cpus=2, wait_for_nodes=True).scaling(given) == given
    assert Placement(cpus_per_rank=2).scaling(given).resources_per_worker == {"CPU": 2, "special": 1}
    assert Placement(ranks="spread").scaling(given) == replace(given, placement_strategy="SPREAD")


def test_ranks_from_a_file_of_settings() -> None:
    config, text = training_config({"num_workers": [1, 4], "placement": {"ranks": "spread", "spare_cpus": 2}})
    assert (config.num_workers, config.placement) == ((1, 4), Placement(ranks="spread", spare_cpus=2))
    assert training_config(yaml.safe_load(text))[0] == config
    assert training_config({"num_workers": 3})[0].num_workers == 3
    for wrong in ([3, 1], [0, 2], 0):
        with pytest.raises(ConfigError, match="num_workers must be at least 1, and of"):
            training_config({"num_workers": wrong})
    with pytest.raises(ConfigError, match="trials have a fixed number of ranks"):
        TuneConfig(train=config)


def test_elastic_ranks_leave_room_to_the_others_if_they_can() -> None:
    groups = [scorers(2, CPU=1), ProcessGroup(name="spare CPUs", count=1, each={"CPU": 1}), ranks(1, CPU=1)]
    there = nodes(2, CPU=4)
    assert elastic_ranks(there, groups, 8, at_least=1) == 5
    assert elastic_ranks(there, groups, 3, at_least=1) == 3  # what Ray counts: others may hold the rest
    assert elastic_ranks(there[:1], groups, 8, at_least=1) == 1  # a node is lost, and Ray does not know yet
    assert elastic_ranks(nodes(1, CPU=2), groups, 8, at_least=1) == 2  # better without scorers than not at all
    assert elastic_ranks(nodes(1, CPU=2), groups, 8, at_least=3) == 0
    labelled = [*groups[:2], ranks(1, {"zone": "b"}, CPU=1)]
    assert elastic_ranks([*there, node("b", {"zone": "b"}, CPU=2)], labelled, 8, at_least=1) == 2


# ---- which rank goes where --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "others", "asked", "spread", "standing", "placed"),
    [
        (nodes(2, CPU=4), [], ranks(3, CPU=1), False, {}, ["0", "0", "0"]),
        (nodes(2, CPU=4), [], ranks(3, CPU=1), True, {}, ["0", "0", "1"]),
        (nodes(3, CPU=4), [], ranks(2, CPU=1, apart=True), False, {}, ["0", "1"]),
        (nodes(2, CPU=4), [], ranks(3, CPU=1, together=True), False, {}, ["0", "0", "0"]),
        # A scorer that stands takes its place, and one that is being started again keeps one.
        (nodes(2, CPU=2), [scorers(2, CPU=1)], ranks(2, CPU=1), False, {"scorers": {"0": 1}}, ["0", "1"]),
        (nodes(2, CPU=2), [scorers(2, CPU=1)], ranks(3, CPU=1), False, {"scorers": {"0": 1}}, None),
        # Ranks that need no GPU leave the node with GPUs to scorers.
        ([node("gpu", CPU=4, GPU=1), node("cpu", CPU=4)], [scorers(1, GPU=1)], ranks(2, CPU=1), False, {}, ["cpu"] * 2),
        # Both scorers are on one GPU, and the other has room for one rank.
        (nodes(1, GPU=2), [scorers(2, GPU=0.3)], ranks(1, GPU=0.7), False, {"scorers": {"0": 2}}, ["0"]),
        (nodes(1, GPU=2), [scorers(2, GPU=0.3)], ranks(2, GPU=0.7), False, {"scorers": {"0": 2}}, None),
    ],
)
def test_nodes_of_ranks(
    there: list[Node],
    others: list[ProcessGroup],
    asked: ProcessGroup,
    spread: bool,
    standing: dict[str, dict[str, int]],
    placed: list[str] | None,
) -> None:
    found = place_ranks(there, [*others, asked], standing, ranks="ranks", spread=spread)
    assert (None if found is None else sorted(found["ranks"])) == placed


def test_selectors_of_an_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [node("a", {"zone": "x"}, CPU=1), node("b", {"zone": "y"}, CPU=3), node("c", {"zone": "x"}, CPU=1)]
    monkeypatch.setattr(rank_trainer, "read_room", lambda _prefix: (there, {}))
    monkeypatch.setattr(rank_trainer, "_FREED_S", 0.0)
    monkeypatch.setattr(rank_trainer, "_POLL_S", 0.0)
    scaling = ray.train.ScalingConfig(num_workers=3, label_selector=[{"zone": "y"}, {}, {"zone": "y"}])
    pin = PinRanks(scaling, [ProcessGroup(name="spare CPUs", count=1, each={"CPU": 1})], "bss_ray-run-")
    selectors = rank_selectors(scaling, 3)
    pin(selectors)
    y = {"zone": "y", "ray.io/node-id": "b"}
    assert selectors == [y, {"ray.io/node-id": "a"}, y]
    assert scaling.label_selector == [{"zone": "y"}, {}, {"zone": "y"}], "the next attempt begins with the user's own"
    del there[1]  # the node is lost, and no other has the label: the ranks wait for one, of whatever id
    selectors = rank_selectors(scaling, 3)
    pin(selectors)
    assert selectors == scaling.label_selector


def test_room_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    table = [
        {"NodeID": name, "Alive": name != "dead", "Resources": {"CPU": 4.0}, "Labels": {}}
        for name in ("0", "1", "leaving", "dead")
    ]
    monkeypatch.setattr(ray, "nodes", lambda: table)
    own = ray_internals.Actor("bss_ray-run-1-scorer-0", "ScorerActor", "0", {"CPU": 1.0}, True, "")
    others = replace(own, name="bss_ray-other-1-scorer-0")
    starting = replace(own, name="bss_ray-run-1-scorer-1", node="")
    monkeypatch.setattr(cluster, "actors", lambda: [own, others, starting])
    # On "0" others have taken three CPUs.
    monkeypatch.setattr(cluster, "free_resources", lambda: {"0": {"CPU": 0.0}, "1": {"CPU": 4.0}, "leaving": {}})
    monkeypatch.setattr(cluster, "draining_nodes", lambda: {"leaving"})
    there, standing = cluster.read_room("bss_ray-run-1-")
    assert {entry.id: entry.resources for entry in there} == {"0": {"CPU": 1.0}, "1": {"CPU": 4.0}}
    assert standing == {"scorers": {"0": 1}}


# ---- what runs where --------------------------------------------------------------------------


WHERE = describe(
    [
        ("ranks", "0", {"CPU": 1.0}),
        ("ranks", "1", {"CPU": 1.0}),
        ("holders", "1", {"CPU": 0.0}),
        ("scorers", "1", {"GPU": 0.5, "CPU": 0.0}),
        ("scorers", "", {"GPU": 0.5}),
        ("coordinator", "0", {}),
    ],
    [
        Node(id="0", address="10.0.0.1", resources={"CPU": 4}, head=True),
        Node(id="1", address="10.0.0.2", resources={"CPU": 2, "GPU": 1, "memory": 1e9}),
        Node(id="2", address="10.0.0.3", resources={"CPU": 2}),
        Node(id="gpu 0", resources={"GPU": 8}, there=False),
    ],
    {"0": {"CPU": 3.0}, "1": {"CPU": 1.0, "GPU": 0.5, "memory": 5.0}},
)


# ---- the cluster ------------------------------------------------------------------------------


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray says that there is; no Ray runs."""
    head, labels = {"CPU": 2.0, "node:__internal_head__": 1.0}, {"ray.io/node-group": "gpu"}
    table = [
        {"NodeID": "0", "Alive": True, "Resources": head, "Labels": {}, "NodeManagerAddress": "10.0.0.1"},
        {"NodeID": "1", "Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}, "Labels": labels},
        {"NodeID": "2", "Alive": False, "Resources": {"CPU": 64.0}, "Labels": {}},
    ]
    monkeypatch.setattr(ray, "nodes", lambda: table)


def test_spare_cpus(two_nodes: None) -> None:
    def asked(workers: int, spare: int | None = None) -> tuple[int, str]:
        placement = Placement(spare_cpus=spare)
        request = check_resources(ray.train.ScalingConfig(num_workers=workers), Scoring(engine="workers"), placement)
        return next(group.count for group in request.groups if group.name == "spare CPUs"), "".join(request.notices)

    assert asked(3) == (1, "")
    spare, notice = asked(4)
    assert spare == 0
    assert "ranks and scorers take all CPUs" in notice
    assert asked(4, 0) == (0, "")
    assert asked(2, 2) == (2, "")
    with pytest.raises(ResourceError, match=r"needs 5 CPU \(2 spare CPUs x 1 \+ 3 ranks x 1\); the cluster has 4"):
        asked(3, 2)


def test_what_does_not_fit_is_refused_before_any_row_is_read(two_nodes: None) -> None:
    trainer = BalancedTrainer(
        lambda: None,
        dataset=lambda: pytest.fail("the rows are read"),
        columns=Columns(modalities=("a", "b"), label="label"),
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        placement=Placement(cpus_per_rank=1, spare_cpus=3),
    )
    with pytest.raises(ResourceError, match=r"needs 5 CPU \(3 spare CPUs x 1 \+ 2 ranks x 1\); the cluster has 4"):
        trainer.fit()


def test_nodes_of_an_autoscaler(two_nodes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = ray.train.ScalingConfig(num_workers=3, use_gpu=True)
    with pytest.raises(ResourceError, match=r"has 1\..* If an autoscaler adds nodes, set placement.wait_for_nodes"):
        check_resources(scaling, Scoring(), Placement())
    request = check_resources(scaling, Scoring(), Placement(wait_for_nodes=True))
    assert [text[:34] for text in request.notices] == [
        "scoring engine: workers; the ranks",
        "waiting for nodes: the run needs 3",
    ]
    assert request.scoring == Scoring(engine="workers")
    config = autoscaler_pb2.ClusterConfig()
    config.node_group_configs.add(name="gpu", resources={"CPU": 2, "GPU": 1}, max_count=3)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray_internals._state, "get_cluster_config", lambda: config)
    assert [(node.there, node.head) for node in read_nodes()] == [(True, True), (True, False)] + [(False, False)] * 2
    assert check_resources(scaling, Scoring(engine="workers"), Placement()).notices == []
    with pytest.raises(ResourceError, match="with all 2 nodes that its autoscaler may add"):
        check_resources(ray.train.ScalingConfig(num_workers=4, use_gpu=True), Scoring(), Placement())


def test_what_runs_where_as_lines_of_a_log() -> None:
    assert placement_lines(WHERE) == [
        "10.0.0.1 (head): 1 rank (1 CPU), coordinator; left 3 of 4 CPU",
        "10.0.0.2: 1 rank (1 CPU), 1 scorer (0.5 GPU), 1 holder; left 1 of 2 CPU, 0.5 of 1 GPU",
        "10.0.0.3: nothing of this run; left 0 of 2 CPU",
        "starting: 1 scorer (0.5 GPU)",
    ]
    one_host = [Node(id=f"{name}bcdefgh", address="10.0.0.1", resources={}) for name in "ab"]
    assert [row.node for row in describe([], one_host, {}).rows] == ["10.0.0.1/abcdef", "10.0.0.1/bbcdef"]


def test_what_runs_where_is_shown_again_when_it_has_changed() -> None:
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False)
        display = Display(console)
        seen = []
        for message in (WHERE, replace(WHERE), replace(WHERE, rows=WHERE.rows[:1])):
            display.on_message(message)
            seen.append(console.file.getvalue().count("10.0.0.1 (head)"))  # type: ignore[attr-defined]
        assert seen == [1, 1, 2]
