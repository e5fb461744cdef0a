"""What is not public in Ray is used in one file, checked before a run starts, and named where it is gone."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.train.v2._internal.execution import callback, scaling_policy, worker_group

from bss_ray.errors import RayVersionError
from bss_ray.runtime import ray_internals

ROOT = Path(__file__).parents[2]
HERE = ROOT / "bss_ray" / "runtime" / "ray_internals.py"
FILES = [file for file in sorted((ROOT / "bss_ray").rglob("*.py")) if file != HERE]

# Not public without an underscore: developer APIs without a promise, and Ray's own modules of the name.
DEVELOPER = {"iter_internal_ref_bundles", "BlockAccessor", "get_object_locations"}
MODULES = ("ray.core", "ray.experimental", "ray.train.v2")
# Of Python, and of its named tuples.
PYTHON = {"_asdict", "_exit", "_fields", "_replace"}


def private_names(tree: ast.AST) -> Iterator[str]:
    """Names of Ray in a file that are not public; and private attributes of whatever is not the file's own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                if module.split(".")[0] == "ray" and ("._" in module or module.startswith(MODULES)):
                    yield module
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
            yield from (alias.name for alias in node.names if alias.name in DEVELOPER or alias.name.startswith("_"))
        if isinstance(node, ast.Attribute):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            hidden = node.attr.startswith("_") and not node.attr.endswith("__")
            if (hidden and not own and node.attr not in PYTHON) or node.attr in DEVELOPER | {"__ray_call__"}:
                yield ast.unparse(node)
        if isinstance(node, ast.Call):
            yield from (word.arg for word in node.keywords if word.arg is not None and word.arg.startswith("_"))


def test_private_names_are_found() -> None:
    text = """
import ray._private.state
from ray.core.generated import gcs_pb2
from ray.train.v2.api.callback import UserCallback
from ray.data.block import BlockAccessor
tables._connect_and_get_accessor()
super()._create_default_callbacks()
dataset.iter_internal_ref_bundles()
Strategy(node, _spill_on_unavailable=True)
actor.__ray_call__.remote()
self._own, row._replace(), super().__init__()
"""
    assert len(list(private_names(ast.parse(text)))) == 9


def test_only_one_file_uses_what_is_private_in_ray() -> None:
    found = {str(file.relative_to(ROOT)): list(private_names(ast.parse(file.read_text()))) for file in FILES}
    # The sampler of the run, which a fault is injected into.
    assert found.pop("bss_ray/testing/faults.py") == ["get_sampler()._context"]
    assert {file: names for file, names in found.items() if names} == {}


@pytest.mark.parametrize("module", ["bss_ray.train.rank_trainer", "bss_ray.tune.nested", "bss_ray.tune.trials"])
def test_no_other_class_overrides_a_private_method_of_ray(module: str) -> None:
    for _, kind in inspect.getmembers(importlib.import_module(module), inspect.isclass):
        if kind.__module__ == module:
            bases = [base for base in kind.__mro__ if base.__module__.startswith("ray.")]
            own = [name for name, value in vars(kind).items() if name.startswith("_") and inspect.isfunction(value)]
            own = [name for name in own if not name.endswith("__")]
            assert [name for name in own for base in bases if name in vars(base)] == []


def test_all_parts_are_there() -> None:
    parts = ray_internals.train_parts()
    scaling = ray.train.ScalingConfig(num_workers=(1, 4))
    policy = parts.scaling_policy(scaling, lambda counted: counted - 1)
    assert isinstance(policy, scaling_policy.ElasticScalingPolicy)
    assert policy._count_possible_workers({"a": {"CPU": 3.0}}) == 2
    before = parts.before_start(lambda selectors: (selectors or [])[1].update(zone="a"))
    assert isinstance(before, callback.WorkerGroupCallback)
    context = worker_group.WorkerGroupContext("1", None, 2, {}, label_selector=[{}, {}])
    before.before_worker_group_start(context)
    assert context.label_selector == [{}, {"zone": "a"}]
    trainer = parts.trainer(print, policy=None, scaling_config=ray.train.ScalingConfig(num_workers=2))
    names = [type(made).__name__ for made in trainer._create_default_callbacks()]
    assert "BackendSetupCallback" in names
    assert "PlacementGroupCleanerCallback" not in names


def test_a_name_that_is_gone_is_said_with_the_version_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(scaling_policy.ElasticScalingPolicy, "_count_possible_workers")
    with pytest.raises(RayVersionError) as raised:
        ray_internals.train_parts.__wrapped__()
    said = str(raised.value)
    assert f"installed Ray {ray.__version__}: " in said
    assert "'_count_possible_workers'" in said
    assert f"pip install 'ray[train,data,tune]=={ray_internals.TESTED}'" in said


def test_the_core_is_checked_at_import() -> None:
    gone = "import ray._private.state as s; del s.GlobalState.available_resources_per_node"
    code = f"{gone}\nimport bss_ray.placement.cluster"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode
    assert "RayVersionError: bss_ray does not work with the installed Ray" in run.stderr
    assert "available_resources_per_node" in run.stderr


def test_the_core_needs_neither_ray_train_nor_ray_data() -> None:
    code = "import sys, bss_ray.runtime.ray_internals; print({'ray.train', 'ray.data', 'torch'} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "set()", run.stderr


def test_the_tested_version_is_that_of_the_constraints() -> None:
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("ray=="))
    assert pinned.removeprefix("ray==").rpartition(".")[0] == ray_internals.TESTED.removesuffix(".*")
