"""Scoring and training on 1, 2 and 4 Ray nodes, and the coordinator's load at the size of a large run.

    python benchmarks/cluster.py [--nodes 1 2 4] [--rows 16384] [--row-cost-us 200] [--repeats 3]
    python benchmarks/cluster.py --nodes --scorers 256 --ranks 64

* efficiency: real raylets on this machine, a rank and a scorer on each. The forward pass of a row takes so many
  microseconds of waiting, as if an accelerator were at work, so that nodes do not fight for cores; what is left is what
  the project and Ray add. Peer: the run on one node; efficiency is rows a second and node, over those of one node.
* load: one real coordinator actor, and scorers, holders and ranks whose calls are real and whose work is not: they live
  in a few processes, many in each. An epoch boundary is: review, a scoring pass over all rows, publication, the state
  for a checkpoint, the next plan and its first window on every rank.

Prints medians over epochs, and how busy the coordinator's process was.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor, nn

import bss_ray
from bss_ray.data.shards import Feature, Shard, Shards
from bss_ray.data.store import Arrays, ObjectStore
from bss_ray.runtime.messages import EpochFinished
from bss_ray.sample.actors import ActorHolders, CoordinatorActor, RayCoordinator
from bss_ray.sample.client import Here, ScoringJob, Shared
from bss_ray.sample.coordinator import Coordinator
from bss_ray.sample.holder import Holder
from bss_ray.sample.state import MeasureBatch
from bss_ray.scoring.actors import RayAnswer, RayScorers
from bss_ray.scoring.pool import ScorerPool, ShardReport

CLASSES = 4
WIDTH = 128  # a row has 1 kB
COLUMNS = bss_ray.Columns(modalities=("a", "b"))


# ---- efficiency -----------------------------------------------------------------------------------


class Waiting(nn.Module):
    """Two linear heads; every row takes so long as if an accelerator worked on it."""

    def __init__(self, row_cost_s: float) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, CLASSES) for name in COLUMNS.modalities})
        self.row_cost_s = row_cost_s

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        started = time.perf_counter()
        logits = {name: head(batch[name]) for name, head in self.heads.items()}
        spent = time.perf_counter() - started
        time.sleep(max(0.0, len(batch["label"]) * self.row_cost_s - spent))
        return {**logits, "fused": logits["a"] + logits["b"]}


def train_loop(config: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    sampler = bss_ray.get_sampler()
    model = sampler.prepare(Waiting(config["row_cost_s"]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in sampler.epochs(config["epochs"]):
        for batch in sampler.batches():
            outputs = model(batch)
            sampler.observe(batch, outputs)
            optimizer.zero_grad()
            (sampler.loss(batch, outputs).mean() * sampler.loss_scale).backward()
            optimizer.step()
        sampler.report({}, model=model, optimizer=optimizer)


@ray.remote(num_cpus=0)
def make_shard(first_row: int, rows: int) -> Arrays:
    rng = np.random.default_rng(first_row)
    columns = {name: rng.standard_normal((rows, WIDTH), dtype=np.float32) for name in COLUMNS.modalities}
    return {**columns, "label": rng.integers(0, CLASSES, rows)}


def make_shards(rows: int) -> tuple[Shards, list[Any]]:
    """As many rows on each node, as a data set of many shards would lie; and the references that keep them there."""
    nodes = [node["NodeID"] for node in ray.nodes()]
    here = rows // len(nodes)
    parts = [Shard(index * here, here, node) for index, node in enumerate(nodes)]
    refs = []
    for part in parts:
        where = NodeAffinitySchedulingStrategy(part.node, soft=False)
        refs.append(make_shard.options(scheduling_strategy=where).remote(part.first_row, part.rows))
    ray.wait(refs, num_returns=len(refs), fetch_local=False)
    features = {name: Feature((WIDTH,), "float32") for name in COLUMNS.modalities}
    features["label"] = Feature((), "int64")
    return Shards(COLUMNS, tuple(parts), features, CLASSES, "0" * 64, ObjectStore(refs)), refs


def rates(nodes: int, args: argparse.Namespace) -> tuple[float, float, float]:
    """Rows a second of scoring and of training, and the share of rows that came from another node."""
    node = {"num_cpus": 2, "object_store_memory": 200_000_000}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(nodes - 1):
        cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    epochs: list[dict[str, Any]] = []
    shards, _refs = make_shards(args.rows)
    with tempfile.TemporaryDirectory() as folder:
        bss_ray.BalancedTrainer(
            train_loop,
            dataset=shards,
            scheduler=bss_ray.Learning(temperature=0.5),
            scoring=bss_ray.Scoring(engine="actors", num_scorers=nodes, num_holders=nodes, batch_size=512),
            batch_size=args.batch_size,
            train_loop_config={"row_cost_s": args.row_cost_us * 1e-6, "epochs": args.repeats + 2},
            scaling_config=ray.train.ScalingConfig(num_workers=nodes, placement_strategy="SPREAD"),
            run_config=ray.train.RunConfig(name="run", storage_path=folder),
            on_message=lambda message: epochs.append(message.row) if isinstance(message, EpochFinished) else None,
        ).fit()
    ray.shutdown()
    cluster.shutdown()
    rows = epochs[2:]  # the first two are for warming up
    scoring = statistics.median(args.rows / row["seconds_scoring"] for row in rows)
    training = statistics.median(row["rows"] / row["seconds_training"] for row in rows)
    return scoring, training, statistics.median(row["moved_share"] for row in rows)


def efficiency(args: argparse.Namespace) -> None:
    ideal = 1e6 / args.row_cost_us
    print(
        f"\n{args.rows} rows, {args.row_cost_us:g} us a row ({ideal:.0f} rows/s a node), batches of {args.batch_size}"
    )
    print("nodes  scoring rows/s  efficiency  training rows/s  efficiency  rows from other nodes")
    first: tuple[float, float] | None = None
    for nodes in args.nodes:
        scoring, training, moved = rates(nodes, args)
        first = first or (scoring / nodes, training / nodes)
        scaled = [rate / nodes / base for rate, base in zip((scoring, training), first, strict=True)]
        print(f"{nodes:5}  {scoring:14.0f}  {scaled[0]:10.2f}  {training:15.0f}  {scaled[1]:10.2f}  {moved:21.1%}")


# ---- the coordinator's load -------------------------------------------------------------------------


class Host:
    """A process that stands for many holders, scorers and ranks; holders answer while the others wait for them."""

    def __init__(self) -> None:
        self._holders: dict[int, Holder] = {}

    @ray.method(concurrency_group="holder")
    def hold(self, index: int, spans: list[tuple[int, int]]) -> None:
        self._holders[index] = Holder(spans)

    @ray.method(concurrency_group="holder")
    def call(self, index: int, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return method(self._holders[index], *args, **kwargs)

    @ray.method(concurrency_group="scorer")
    def node(self) -> str:
        return "here"

    @ray.method(concurrency_group="scorer")
    def measure(self, holders: ManyHolders, shared: Shared[ScoringJob], shard: int) -> ShardReport:
        job = shared.get("the job")
        part = job.shards.parts[shard]
        rng = np.random.default_rng([job.version, shard])
        measures = (rng.random(part.rows, dtype=np.float32) for _ in range(2))
        rows = np.arange(part.first_row, part.first_row + part.rows)
        holders.deliver(
            MeasureBatch.of(rows, *measures).sound(), epoch=job.epoch, version=job.version, attempt=job.attempt
        )
        return ShardReport(part.rows, [], [])

    def rank(self, ranks: list[int], step: str, coordinator: RayCoordinator, *args: int) -> None:
        """These ranks, at the same time, take one step of an epoch's boundary."""
        with ThreadPoolExecutor(len(ranks)) as threads:
            list(threads.map(lambda rank: STEPS[step](coordinator, rank, *args), ranks))


def _review(coordinator: RayCoordinator, rank: int, epoch: int, version: int) -> None:
    if rank == 0:  # which tells the others
        coordinator.review(epoch, version)


def _state(coordinator: RayCoordinator, rank: int, ranks: int, version: int) -> None:
    for state in coordinator.states(version, rank, ranks):
        state.get("the scores of a holder")


def _first_window(coordinator: RayCoordinator, _rank: int, epoch: int, version: int) -> None:
    coordinator.plan(epoch, version, 0)
    coordinator.window(epoch, 0, version).get("the first window")


STEPS = {"review": _review, "state": _state, "plan": _first_window}


class ManyHolders(ActorHolders):
    """Holders of which each process has many; every call of one is a message of its own.

    Args:
        hosts: the processes.
        first_rows: of each holder.
    """

    def __init__(self, hosts: list[Any], first_rows: list[int]) -> None:
        super().__init__([f"load-holder-{index}" for index in range(len(first_rows))], first_rows)
        self._hosts, self.sent = hosts, 0

    def __reduce__(self) -> tuple[Any, ...]:
        return ManyHolders, (self._hosts, list(self._first_rows))

    def _host(self, index: int) -> Any:
        return self._hosts[index % len(self._hosts)]

    def _call(self, index: int, method: Callable[..., Any], *args: Any, **kwargs: Any) -> ray.ObjectRef:
        self.sent += 1
        return self._host(index).call.remote(index, method, *args, **kwargs)


class HostedScorers(RayScorers):
    """Scorers of which each process has many."""

    def __init__(self, holders: ManyHolders, hosts: list[Any]) -> None:
        self._holders, self._hosts = holders, hosts

    def _host(self, name: str) -> Any:
        return self._hosts[int(name.rpartition("-")[2]) % len(self._hosts)]

    def node(self, name: str) -> RayAnswer[str]:
        return RayAnswer(self._host(name).node.remote())

    def measure(self, name: str, job: Shared[ScoringJob], shard: int) -> RayAnswer[ShardReport]:
        return RayAnswer(self._host(name).measure.remote(self._holders, job, shard))


def load(args: argparse.Namespace) -> None:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    groups = {"holder": 1, "scorer": -(-args.scorers // args.processes)}
    hosts = [ray.remote(num_cpus=0, concurrency_groups=groups)(Host).remote() for _ in range(args.processes)]
    shard_rows = args.load_rows // args.scorers
    parts = tuple(Shard(index * shard_rows, shard_rows, "here") for index in range(args.scorers))
    features = {name: Feature((1,), "float32") for name in COLUMNS.modalities}
    shards = Shards(COLUMNS, parts, features, CLASSES, "0" * 64, ObjectStore([]))
    edges = [args.scorers * index // args.holders for index in range(args.holders + 1)]
    spans = [[(part.first_row, part.rows) for part in parts[start:stop]] for start, stop in itertools.pairwise(edges)]
    holders = ManyHolders(hosts, [own[0][0] for own in spans])
    ray.get([holders._host(index).hold.remote(index, own) for index, own in enumerate(spans)])
    make = functools.partial(
        Coordinator, rows=shards.rows, scheduler=bss_ray.Learning(temperature=0.5), batch_size=args.ranks * 32
    )
    names = [f"scorer-{index}" for index in range(args.scorers)]
    pool = ScorerPool(names, 60.0, HostedScorers(holders, hosts))
    handle = ray.remote(num_cpus=0, concurrency_groups={"events": 1})(CoordinatorActor).remote(holders, make, pool)
    coordinator = RayCoordinator(handle)
    boundaries(args, coordinator, handle, hosts, shards)
    ray.shutdown()


def boundaries(
    args: argparse.Namespace, coordinator: RayCoordinator, handle: Any, hosts: list[Any], shards: Shards
) -> None:
    """Measure epoch boundaries."""
    dealt = [list(range(args.ranks))[index :: len(hosts)] for index in range(len(hosts))]

    def all_ranks(step: str, *of_step: Any) -> float:
        started = time.perf_counter()
        ray.get([host.rank.remote(own, step, coordinator, *of_step) for host, own in zip(hosts, dealt, strict=True)])
        return time.perf_counter() - started

    def usage() -> tuple[int, float]:
        used: tuple[int, float] = ray.get(
            handle.__ray_call__.remote(lambda actor: (actor._service._holders.sent, time.process_time()))
        )
        return used

    attempt = coordinator.reset()
    all_ranks("plan", 0, 0)
    spent: list[dict[str, float]] = []
    for epoch in range(args.repeats + 1):
        sent, busy = usage()
        took = {"review": all_ranks("review", epoch, epoch)}
        started = time.perf_counter()
        job = Here(ScoringJob(Here(None), shards, epoch, epoch + 1, attempt))  # nobody gets the model
        coordinator.start_scoring(job, ["here"] * args.scorers)
        published = coordinator.finish_scoring(epoch + 1)
        assert published.version == epoch + 1, published
        took["scoring"] = time.perf_counter() - started
        took["state"] = all_ranks("state", args.ranks, epoch + 1)
        took["plan, window"] = all_ranks("plan", epoch + 1, epoch + 1)
        took["in all"] = sum(took.values())
        now_sent, now_busy = usage()
        # Of the ranks: review, state, plan, window each; of the driver in rank 0's place two; a shard is a call.
        took["messages"] = now_sent - sent + 4 * args.ranks + 2 + args.scorers
        took["busy"] = now_busy - busy
        if epoch:
            spent.append(took)
    median = {name: statistics.median(took[name] for took in spent) for name in spent[0]}
    print(
        f"\n{args.scorers} scorers, {args.holders} holders, {args.ranks} ranks in {args.processes} processes, "
        f"{shards.rows} rows; median of {args.repeats} epoch boundaries"
    )
    parts = ("review", "scoring", "state", "plan, window", "in all")
    print("  ".join(f"{name} {median[name]:.3f} s" for name in parts))
    print(
        f"{median['messages']:.0f} messages at a boundary, {median['messages'] / median['in all']:.0f} a second; "
        f"the coordinator's process was busy for {median['busy']:.3f} s of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="*", default=[1, 2, 4], help="raylets; none of them skips this part")
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--row-cost-us", type=float, default=200.0, help="microseconds of a row's forward pass")
    parser.add_argument("--batch-size", type=int, default=512, help="global")
    parser.add_argument("--scorers", type=int, default=256, help="simulated; 0 skips this part")
    parser.add_argument("--holders", type=int, default=64, help="simulated")
    parser.add_argument("--ranks", type=int, default=64, help="simulated")
    parser.add_argument("--processes", type=int, default=4, help="that stand for all of them")
    parser.add_argument("--load-rows", type=int, default=1 << 20)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs, ray {ray.__version__}")
    if args.nodes:
        efficiency(args)
    if args.scorers:
        load(args)


if __name__ == "__main__":
    main()
