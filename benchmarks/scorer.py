"""One scorer, two scorers, and how the released code scores, against a bare forward loop.

    python benchmarks/scorer.py [--rows 16384] [--batch-size 256] [--repeats 9]

Model: the project's LateFusion for the rows of AV-Digits (audio 1x32x32, image 1x8x8, width 64, 10 classes).

* bare loop: the model in eval and inference mode over batches of resident tensors, nothing else.
* scorer: `Scorer.measure` over the same rows as NumPy arrays: copies, measures, checks.
* released: a straight re-implementation of how the paper's released code scores, as docs/method.md describes it: train
  mode, training batches (64) made of rows that are copied one by one, one tensor a row in Python lists, and with them
  the graph of all batches until the end of the pass. Also with each batch's graph freed after it, to tell what that
  alone costs.
* two scorers: real actors with one torch thread each share the shards, against one of them.

Prints medians and ratios, all on the CPU. For a GPU there is scripts/gpu_check.py.
"""

import argparse
import functools
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from bss_ray import Columns, Measurer, Scoring
from bss_ray.data.shards import Feature, Shard, Shards
from bss_ray.data.store import ObjectStore
from bss_ray.measure.forward import Forward, evaluating
from bss_ray.measure.snapshot import pack_model
from bss_ray.models import LateFusion
from bss_ray.runtime.threads import keep_freed_memory
from bss_ray.sample.actors import InStore, start_coordinator, start_holders
from bss_ray.sample.client import ScoringJob
from bss_ray.sample.coordinator import Coordinator
from bss_ray.schedule import Uniform
from bss_ray.scoring.actors import RayScorers, scorer_names, start_scorers
from bss_ray.scoring.pool import ScorerPool
from bss_ray.scoring.scorer import Scorer

SHAPES = {"audio": (1, 32, 32), "image": (1, 8, 8)}
CLASSES = 10
TRAINING_BATCH = 64  # the released code scores with its training loader


def make_rows(rows: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    columns = {name: rng.standard_normal((rows, *shape), dtype=np.float32) for name, shape in SHAPES.items()}
    return {**columns, "label": rng.integers(0, CLASSES, rows)}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return LateFusion(SHAPES, CLASSES)


def median_seconds(*works: Callable[[], object], repeats: int) -> list[float]:
    """Of each, in turn: all of them see the same state of the machine."""
    times: list[list[float]] = [[] for _ in works]
    for repeat in range(repeats + 1):
        for work, spent in zip(works, times, strict=True):
            started = time.perf_counter()
            work()
            if repeat:  # the first is for warming up
                spent.append(time.perf_counter() - started)
    return [statistics.median(spent) for spent in times]


# ---- the peers ------------------------------------------------------------------------------------


def bare_loop(model: nn.Module, tensors: dict[str, torch.Tensor], batch_size: int) -> None:
    """Forward passes over resident tensors and nothing else."""
    with evaluating(model):
        for start in range(0, len(tensors["label"]), batch_size):
            model({name: values[start : start + batch_size] for name, values in tensors.items()})


def released_way(model: nn.Module, columns: dict[str, np.ndarray], batch_size: int, *, keep: bool) -> list[float]:
    """As the released code scores: train mode, with a graph, rows copied one by one, lists of one value a row.

    Args:
        keep: the values are tensors until the end, so the graph of all batches is kept.
    """
    model.train()
    similarities: list[Any] = []
    losses: list[Any] = []
    for start in range(0, len(columns["label"]), batch_size):
        rows = range(start, min(start + batch_size, len(columns["label"])))
        batch = {name: torch.stack([torch.tensor(values[row]) for row in rows]) for name, values in columns.items()}
        outputs = model(batch)
        a, b = (outputs[name].softmax(-1) for name in SHAPES)
        similarity = F.cosine_similarity(a, b, dim=-1)
        loss = 0.1 * F.cross_entropy(outputs["fused"], batch["label"], reduction="none")
        for name in SHAPES:
            loss = loss + 0.9 * F.cross_entropy(outputs[name], batch["label"], reduction="none")
        for row in range(len(rows)):
            similarities.append(similarity[row] if keep else similarity[row].item())
            losses.append(loss[row] if keep else loss[row].item())
    if keep:
        similarities, losses = ([value.item() for value in values] for values in (similarities, losses))
    low, high = min(similarities), max(similarities)
    least, most = min(losses), max(losses)
    return [
        (similarity - low) / (high - low) - (loss - least) / (most - least)
        for similarity, loss in zip(similarities, losses, strict=True)
    ]


# ---- measurements ---------------------------------------------------------------------------------


def one_scorer(columns: dict[str, np.ndarray], batch_size: int, repeats: int) -> None:
    model = make_model()
    tensors = {name: torch.from_numpy(values) for name, values in columns.items()}
    scorer = Scorer(Measurer(), "label", forward=Forward(batch_size=batch_size), model=model)
    bare, scored, released, freed = median_seconds(
        lambda: bare_loop(model, tensors, batch_size),
        lambda: scorer.measure(columns),
        lambda: released_way(model, columns, TRAINING_BATCH, keep=True),
        lambda: released_way(model, columns, TRAINING_BATCH, keep=False),
        repeats=repeats,
    )
    rows = len(columns["label"])
    print(f"bare forward loop   {rows / bare:>10,.0f} rows/s")
    print(
        f"one scorer          {rows / scored:>10,.0f} rows/s   {scored / bare:.3f} of the bare loop's time (goal 1.10)"
    )
    for name, seconds, goal in (("the released way", released, " (goal 1.8)"), ("  graph freed", freed, "")):
        print(f"{name:<19} {rows / seconds:>10,.0f} rows/s   a scorer is {seconds / scored:.2f}x as fast{goal}")


def two_scorers(columns: dict[str, np.ndarray], batch_size: int, repeats: int) -> None:
    """Through the pool: shards of the object store, deliveries to a holder."""
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    rows, count = len(columns["label"]), 16
    edges = [rows * index // count for index in range(count + 1)]
    node = ray.get_runtime_context().get_node_id()
    parts = tuple(Shard(start, stop - start, node) for start, stop in itertools.pairwise(edges))
    refs = [
        ray.put({name: values[part.first_row : part.first_row + part.rows] for name, values in columns.items()})
        for part in parts
    ]
    features = {name: Feature(values.shape[1:], str(values.dtype)) for name, values in columns.items()}
    shards = Shards(Columns(modalities=tuple(SHAPES)), parts, features, CLASSES, "benchmark", ObjectStore(refs))
    scoring = Scoring(engine="actors", num_scorers=2, num_holders=1, batch_size=batch_size)
    holders, handles = start_holders(shards, count=scoring.num_holders)
    handles += start_scorers(shards, Measurer(), scoring, holders)
    names = scorer_names(holders, scoring)
    coordinator, handle = start_coordinator(holders, functools.partial(Coordinator, rows=rows, scheduler=Uniform()))
    handles.append(handle)
    model = InStore.put(pack_model(make_model()))
    job = InStore.put(ScoringJob(model, shards, 0, 1, coordinator.reset()))
    homes = [part.node for part in parts]
    one, two = median_seconds(
        lambda: ScorerPool(names[:1], 60, RayScorers()).run(job, homes),
        lambda: ScorerPool(names, 60, RayScorers()).run(job, homes),
        repeats=repeats,
    )
    print(f"one scorer actor    {rows / one:>10,.0f} rows/s")
    print(f"two scorer actors   {rows / two:>10,.0f} rows/s   {one / two:.2f}x one (goal 1.7)")
    ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()

    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch "
        f"threads; torch {torch.__version__}, ray {ray.__version__}; {options.rows:,} rows, batches of "
        f"{options.batch_size}"
    )
    keep_freed_memory()  # for all of them alike; scorers and ranks do it themselves
    columns = make_rows(options.rows)
    one_scorer(columns, options.batch_size, options.repeats)
    two_scorers(columns, options.batch_size, options.repeats)


if __name__ == "__main__":
    main()
