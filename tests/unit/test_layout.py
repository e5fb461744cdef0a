"""Dependencies point one way: no circle of modules, and folders use only folders that CONTRIBUTING lists above them."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from scripts import house

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "bss_ray").rglob("*.py"))


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(file): file for file in FILES}


def imports(file: Path) -> Iterator[str]:
    """Modules of the package that a file imports, wherever in it, for type checkers alone too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative imports are not used"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield from (found for found in [name if name in MODULES else node.module] if found in MODULES)


GRAPH = {name: set(imports(file)) for name, file in MODULES.items()}


def folder_of(module: str) -> str:
    """`data` of `bss_ray.data.store`, `errors` of `bss_ray.errors`; the public names, `bss_ray`, are on top of all."""
    return [*module.split("."), "bss_ray"][1]


def rows_of_contributing() -> dict[str, int]:
    """Row of each folder in CONTRIBUTING's table."""
    table = re.findall(r"^  \| (`.*`) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return {folder: row for row, cell in enumerate(table) for folder in re.findall(r"`(\w+)`", cell)}


def test_no_circle_of_modules() -> None:
    assert len(GRAPH) > 100
    TopologicalSorter(GRAPH).prepare()  # raises CycleError, which names the modules


def test_folders_use_only_folders_above_them_in_the_table() -> None:
    rows = rows_of_contributing()
    assert rows.keys() == {folder_of(module) for module in MODULES}
    upwards = defaultdict(list)
    for module, used in GRAPH.items():
        for other in used:
            here, there = folder_of(module), folder_of(other)
            if here != there and rows[there] >= rows[here]:
                upwards[here, there].append(f"{module} imports {other}")
    assert not upwards


def test_a_name_means_one_thing() -> None:
    files = defaultdict(list)
    for name, file in MODULES.items():
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                files[node.name].append(name)
    assert {name: modules for name, modules in files.items() if len(modules) > 1} == {}


def test_figures_of_a_package(tmp_path: Path) -> None:
    texts = {
        "__init__": "",
        "a": "from typing import Any\nimport bss_ray.b\n\ndef f(x: Any) -> None:\n    # why\n    return None\n",
        "b": "def g() -> None:\n    import bss_ray.c\n\nclass C:\n    '''What.'''\n",
        "c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import bss_ray.a\nimport bss_ray.b\n",
    }
    (tmp_path / "bss_ray").mkdir()
    for name, text in texts.items():
        (tmp_path / "bss_ray" / f"{name}.py").write_text(text)
    (tmp_path / "README.md").write_text("three short words")
    found = house.figures(tmp_path)
    assert (found["files"], found["lines"], found["README words"]) == ("4", "15", "3")
    assert found["Any per 1k lines"] == "133.3"  # 2 of 15 lines
    assert found["comments, % of lines"] == "6.7"
    assert found["functions per 1k of code"] == "182"  # 2 of 11 lines that are no comment, docstring or empty
    # a imports b, and b and c each other: a circle counts as one step.
    assert (found["import depth"], found["largest circle"]) == ("2", "2")
