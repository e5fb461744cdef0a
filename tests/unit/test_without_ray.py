"""What a GPU machine with torch, NumPy and PyArrow alone can use: no other package is imported on the way."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterator

ALLOWED = ("torch", "numpy", "pyarrow")

# Modules that must do with those packages.
MODULES = (
    "bss_ray.data.arrays",
    "bss_ray.data.checks",
    "bss_ray.data.columns",
    "bss_ray.data.shards",
    "bss_ray.data.span",
    "bss_ray.data.store",
    "bss_ray.load.loader",
    "bss_ray.load.randomness",
    "bss_ray.load.rows",
    "bss_ray.load.transfer",
    "bss_ray.measure.forward",
    "bss_ray.measure.measurer",
    "bss_ray.measure.normalise",
    "bss_ray.measure.score",
    "bss_ray.measure.snapshot",
    "bss_ray.models",
    "bss_ray.models.weights",
    "bss_ray.runtime.profiling",
    "bss_ray.scoring.config",
    "bss_ray.scoring.engines",
    "bss_ray.scoring.pool",
    "bss_ray.scoring.scorer",
    "bss_ray.testing.cluster",
    "bss_ray.testing.faults",
    "bss_ray.train.checkpoint",
    "bss_ray.train.loop",
    "bss_ray.train.sampler",
)

# Public names of `bss_ray` that come with them.
NAMES = ("Columns", "Measurer", "RowRandom", "Scoring", "StoreConfig", "balance_scores", "weighted_permutation")

# Finds no package that is refused, as if it were not installed.
PROGRAM = """
import importlib, importlib.machinery, sys

class Installed:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            return None
        return importlib.machinery.PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Installed
{program}
"""

USE = """
import numpy as np, torch
import bss_ray
from bss_ray.data.arrays import shards_of_arrays
from bss_ray.load.loader import Loader
from bss_ray.measure.snapshot import pack_model
from bss_ray.models import LateFusion
from bss_ray.sample.plan import Order
from bss_ray.sample.plan import Plan
from bss_ray.scoring.scorer import Scorer

rng = np.random.default_rng(0)
shapes = {"a": (3,), "b": (2, 8, 8)}
arrays = {name: rng.normal(size=(50, *shape)).astype(np.float32) for name, shape in shapes.items()}
columns = bss_ray.Columns(modalities=tuple(shapes))
shards = shards_of_arrays({**arrays, "label": np.arange(50) % 4}, columns, nodes=("", ""))
loader = Loader(shards, rank=0, rank_nodes=["here"], device=torch.device("cpu"))
order = bss_ray.weighted_permutation(np.arange(1.0, 51.0), seed=1, epoch=0)
plan = Plan(0, 1, 50, 16, "keep", (50,))
batches = [batch.tensors for batch in loader.batches(plan, Order(plan, lambda _: order))]
assert sorted(torch.cat([batch["row_id"] for batch in batches]).tolist()) == list(range(50))

model = LateFusion(shapes, 4)
scorer = Scorer(bss_ray.Measurer(), "label")
scorer.load(pack_model(model))
found = scorer.measure_batches(loader.rows(16))
assert len(bss_ray.balance_scores(found.similarity, found.information)) == 50
print("used")
"""


def refused() -> list[str]:
    """Packages that are installed here, and that neither `ALLOWED` nor what those need brings."""
    needed = set(_needed(ALLOWED))
    owners = importlib.metadata.packages_distributions()
    return sorted(
        package
        for package, names in owners.items()
        if package not in ("bss_ray", "tune_spaces") and not needed & {_canonical(name) for name in names}
    )


def _needed(names: tuple[str, ...]) -> Iterator[str]:
    """The distributions, and those that they always need."""
    waiting, seen = [_canonical(name) for name in names], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # for another platform
            continue
        yield name
        always = [text for text in requirements if "extra ==" not in text]
        waiting += [_canonical(re.split(r"[^\w.-]", text)[0]) for text in always]


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def run_refusing(program: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run a program that cannot import other packages."""
    code = PROGRAM.format(refused=frozenset(refused()), program=program)
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # small batches: threads would only wait for each other
    )


def test_the_refusal_is_real() -> None:
    assert {"ray", "torchmetrics", "jsonargparse", "rich", "cloudpickle", "yaml", "pytest"} <= set(refused())
    assert not {"torch", "numpy", "pyarrow"} & set(refused())
    run = run_refusing("import ray")
    assert run.returncode == 1
    assert "No module named 'ray'" in run.stderr


def test_rows_are_loaded_and_scored_without_any_other_package() -> None:
    imports = "".join(f"importlib.import_module({name!r})\n" for name in MODULES)
    names = f"import bss_ray\nfor name in {NAMES!r}: getattr(bss_ray, name)\n"
    run = run_refusing(imports + names + USE)
    assert (run.returncode, run.stdout) == (0, "used\n"), run.stderr
