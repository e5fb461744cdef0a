"""The resources of a run, which are refused at once if the cluster could only leave them pending forever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray.train

from bss_ray.data.shards import Shards
from bss_ray.errors import ConfigError, ResourceError, check_one_of
from bss_ray.placement.cluster import read_nodes
from bss_ray.placement.fit import check_fit, place
from bss_ray.placement.packing import Node, ProcessGroup, fits
from bss_ray.runtime.ray_internals import label_problem, train_parts
from bss_ray.scoring.config import Scoring, choose_engine

RANKS, SCORERS, HOLDERS, SPARE = "ranks", "scorers", "holders", "spare CPUs"

_NO_CPU_LEFT = (
    "Warning: ranks and scorers take all CPUs. Rows in memory that are lost with a node cannot be made again while "
    "they do; leave a CPU (fewer ranks, placement.spare_cpus), or keep rows where none are lost (store.kind=lance)"
)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where ranks and scorers run, and what they leave to others.

    Args:
        ranks: Whether to `pack` ranks onto few nodes, or `spread` them over many.
        label_selector: Labels of the nodes that ranks and scorers may be on: `{zone: a}`; also `!a`, `in(a,b)`,
            `!in(a,b)`.
        accelerator_type: Accelerator, by Ray's name (A100, H100, TPU-V4, ...), of the nodes of ranks and of scorers
            that have a share of a GPU.
        cpus_per_rank: Logical CPUs of a rank; null takes 1, or 0 with GPUs.
        spare_cpus: Number of CPUs that ranks and scorers leave free: rows in memory that are lost with a node are made
            again by tasks of one CPU each, which wait if no CPU is free. null leaves 1 if there are several nodes.
        wait_for_nodes: Whether to wait for nodes of an autoscaler, instead of an error, if the existing nodes cannot
            hold the run. Ray itself knows the limits of some autoscalers only (docs/placement.md).
        resize_interval_s: Seconds between two checks of whether more ranks would fit, with `num_workers: [lo, hi]`. A
            change costs the training since the last checkpoint, and a start of the ranks.

    Raises:
        ConfigError: a setting is unknown or out of its range.
    """

    ranks: Literal["pack", "spread"] = "pack"
    label_selector: dict[str, str] | None = None
    accelerator_type: str | None = None
    cpus_per_rank: float | None = None
    spare_cpus: int | None = None
    wait_for_nodes: bool = False
    resize_interval_s: float = 60.0

    def __post_init__(self) -> None:
        check_one_of("placement.ranks", self.ranks, ("pack", "spread"))
        for name in ("cpus_per_rank", "spare_cpus", "resize_interval_s"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"placement.{name} cannot be negative; received {value}")
        if (problem := label_problem(self.label_selector or {})) is not None:
            raise ConfigError(f"placement.label_selector={self.label_selector}: {problem}")

    def scaling(self, ranks: ray.train.ScalingConfig) -> ray.train.ScalingConfig:
        """These ranks, placed as the settings say; settings at their default are taken from `ranks`."""
        changed: dict[str, object] = {}
        if self.ranks != Placement.ranks:
            changed["placement_strategy"] = self.ranks.upper()
        if self.label_selector is not None:
            changed["label_selector"] = self.label_selector
        if self.accelerator_type is not None:
            changed["accelerator_type"] = self.accelerator_type
        if self.cpus_per_rank is not None:
            changed["resources_per_worker"] = {**(ranks.resources_per_worker or {}), "CPU": self.cpus_per_rank}
        if self.resize_interval_s != Placement.resize_interval_s:
            changed["elastic_resize_monitor_interval_s"] = self.resize_interval_s
        return replace(ranks, **changed)


@dataclass(frozen=True)
class ResourceRequest:
    """The processes of a run, which the cluster can hold at the same time.

    Attributes:
        scoring: Settings of scoring, with the engine that `auto` stands for.
        nodes: Nodes that exist, or that an autoscaler can add.
        groups: Groups of equal processes, in the order in which Ray is asked for them.
        notices: Messages to the user.
    """

    scoring: Scoring
    nodes: Sequence[Node]
    groups: Sequence[ProcessGroup]
    notices: Sequence[str] = ()

    def assign_nodes(self, shards: Shards) -> dict[str, list[str]]:
        """Node of each holder and scorer: where the rows are, as long as all other processes still fit."""
        rows = Counter({node.id: 0 for node in self.nodes if node.there})
        for part in shards.parts:
            if part.node in rows:
                rows[part.node] += part.rows
        if not rows.total():  # all nodes read them equally well; a head without CPUs is for other work
            rows.update(node.id for node in self.nodes if node.there and node.resources.get("CPU"))
        actors = [group.name for group in self.groups if group.name in (HOLDERS, SCORERS)]
        return place(self.nodes, self.groups, dict.fromkeys(actors, rows))


def check_resources(scaling: ray.train.ScalingConfig, scoring: Scoring, placement: Placement) -> ResourceRequest:
    """Choose the engine, and refuse at once what the cluster could only leave pending forever.

    Args:
        scaling: Settings of the ranks; of an elastic run the smallest number counts.
        scoring: How and where rows are scored.
        placement: What ranks and scorers leave to others, and whether to wait for nodes.

    Raises:
        ResourceError: Processes do not fit; the error names them, resource or label, request, supply and remedy.
        RayVersionError: the installed Ray lacks what a run needs.
    """
    train_parts()  # a missing name of Ray is an error here, and not in the middle of a run
    settled, why = settle_engine(scaling, scoring)
    notices = [f"scoring engine: {settled.engine}; {why}"] if scoring.engine == "auto" else []
    nodes = read_nodes()
    # Rows that are lost with one of several nodes are made again on a free CPU.
    unsaid = placement.spare_cpus is None and len(nodes) > 1
    if unsaid and fits(nodes, with_spare := groups_of(scaling, settled, 1)):
        return ResourceRequest(settled, nodes, with_spare, notices)
    groups = groups_of(scaling, settled, placement.spare_cpus or 0)
    try:
        check_fit(nodes, groups)
    except ResourceError as error:
        if placement.wait_for_nodes:
            return ResourceRequest(settled, nodes, groups, [*notices, f"waiting for nodes: {error}"])
        if all(node.there for node in nodes):
            raise ResourceError(f"{error}. If an autoscaler adds nodes, set placement.wait_for_nodes") from None
        raise
    return ResourceRequest(settled, nodes, groups, [*notices, _NO_CPU_LEFT] if unsaid else notices)


def groups_of(scaling: ray.train.ScalingConfig, scoring: Scoring, spare_cpus: int) -> list[ProcessGroup]:
    """All processes of a run, in the order in which Ray is asked for them."""
    groups = [
        ProcessGroup(name=HOLDERS, count=scoring.num_holders, each={"CPU": scoring.cpus_per_holder}),
        ProcessGroup(name=SPARE, count=spare_cpus, each={"CPU": 1}),
        *rank_groups(scaling, rank_selectors(scaling, scaling.min_workers)),
    ]
    return [_scorers(scaling, scoring), *groups] if scoring.engine == "actors" else groups


def rank_selectors(scaling: ray.train.ScalingConfig, ranks: int) -> list[dict[str, str]]:
    """The user's label selector of each rank."""
    given = scaling.label_selector or {}
    return [dict(selector) for selector in (given[:ranks] if isinstance(given, list) else [given] * ranks)]


def rank_groups(scaling: ray.train.ScalingConfig, selectors: Sequence[Mapping[str, str]]) -> list[ProcessGroup]:
    """Ranks with these label selectors: a group for each selector."""
    each = resources_per_rank(scaling)
    kinds = Counter(tuple(sorted(selector.items())) for selector in selectors)
    return [
        ProcessGroup(
            name=RANKS if len(kinds) == 1 else f"{RANKS} with {dict(kind)}",
            count=count,
            each=each,
            selector=dict(kind),
            per_node=1 if scaling.placement_strategy == "STRICT_SPREAD" else None,
            together=scaling.placement_strategy == "STRICT_PACK",
        )
        for kind, count in kinds.items()
    ]


def resources_per_rank(scaling: ray.train.ScalingConfig) -> dict[str, float]:
    """Resources that Ray Train requests for each rank, its accelerator type included."""
    asked = {"CPU": scaling.num_cpus_per_worker, "GPU": scaling.num_gpus_per_worker}
    return {name: amount for name, amount in {**asked, **scaling.additional_resources_per_worker}.items() if amount}


def _scorers(scaling: ray.train.ScalingConfig, scoring: Scoring) -> ProcessGroup:
    options = scorer_options(scaling, scoring)
    return ProcessGroup(
        name=SCORERS,
        count=scoring.num_scorers,
        each={"CPU": scoring.cpus_per_scorer, "GPU": scoring.gpus_per_scorer, **options["resources"]},
        selector=options["label_selector"],
    )


def scorer_options(scaling: ray.train.ScalingConfig, scoring: Scoring) -> dict[str, Any]:
    """Ray's options of a scorer except CPUs and GPUs: the ranks' labels and, with a GPU share, accelerator type."""
    kind = f"accelerator_type:{scaling.accelerator_type}"
    typed = scaling.accelerator_type is not None and scoring.gpus_per_scorer > 0
    labels = scaling.label_selector if isinstance(scaling.label_selector, dict) else {}
    return {"resources": {kind: 0.001} if typed else {}, "label_selector": labels}


def settle_engine(scaling: ray.train.ScalingConfig, scoring: Scoring) -> tuple[Scoring, str]:
    """The settings with the engine that `auto` stands for on this cluster, and the reason for it."""
    ranks = scaling.max_workers
    if ranks == 0 and scoring.engine == "auto" and not scoring.overlap:
        return replace(scoring, engine="workers"), "num_workers=0 trains and scores in this process"
    each, nodes = resources_per_rank(scaling), [node for node in read_nodes() if node.there]
    cpus, gpus = (
        max(0, sum(node.resources.get(name, 0) for node in nodes) - ranks * each.get(name, 0))
        for name in ("CPU", "GPU")
    )
    engine, why = choose_engine(scoring, spare_cpus=cpus, spare_gpus=gpus, ranks_use_gpu=scaling.use_gpu)
    return replace(scoring, engine=engine), why


def in_this_process(scaling: ray.train.ScalingConfig, scoring: Scoring) -> bool:
    """Whether the process that trains is the only process of a run, without other ranks and without scorers."""
    return scaling.num_workers == 0 and scoring.engine != "actors"
