"""Figures of how the code is built, for one checkout or for two side by side: python scripts/house.py [BEFORE] NOW."""

from __future__ import annotations

import argparse
import ast
import io
import statistics
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

Graph = dict[str, set[str]]


def figures(root: Path) -> dict[str, str]:
    """The figures of the package in a checkout, by their names."""
    texts = {module_name(path, root): path.read_text() for path in sorted((root / "bss_ray").rglob("*.py"))}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    sizes = [len(text.splitlines()) for text in texts.values()]
    lines = sum(sizes)
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [(node.end_lineno or node.lineno) - node.lineno + 1 for node in functions]
    classes = sum(isinstance(node, ast.ClassDef) for node in nodes)
    untyped = sum(
        (isinstance(node, ast.Name) and node.id == "Any") or (isinstance(node, ast.alias) and node.name == "Any")
        for node in nodes
    )
    comments = sum(len(lines_of(text, tokenize.COMMENT)) for text in texts.values())
    code = sum(len(lines_of(texts[name])) - docstring_lines(tree) for name, tree in trees.items())
    graph = {name: set(imports(tree, set(trees))) for name, tree in trees.items()}
    return {
        "files": str(len(texts)),
        "lines": str(lines),
        "file median / p90": median_and_p90(sizes),
        "function median / p90": median_and_p90(lengths),
        "functions per 1k of code": f"{1000 * len(functions) / code:.0f}",
        "classes per 1k of code": f"{1000 * classes / code:.1f}",
        "Any per 1k lines": f"{1000 * untyped / lines:.1f}",
        "comments, % of lines": f"{100 * comments / lines:.1f}",
        "import depth": str(depth(graph)),
        "largest circle": str(largest_circle(graph)),
        "README words": str(len((root / "README.md").read_text().split())),
    }


def module_name(path: Path, root: Path) -> str:
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def median_and_p90(values: list[int]) -> str:
    return f"{statistics.median(values):.0f} / {statistics.quantiles(values, n=10)[-1]:.0f}"


def lines_of(text: str, kind: int | None = None) -> set[int]:
    """Numbers of the lines with tokens of a kind; None: with tokens of code, docstrings among them."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    return {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if (token.type == kind if kind is not None else token.type not in layout)
        for line in range(token.start[0], token.end[0] + 1)
    }


def docstring_lines(tree: ast.Module) -> int:
    """Number of lines of docstrings."""
    found = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and type(first.value.value) is str:
                found += (first.end_lineno or first.lineno) - first.lineno + 1
    return found


def imports(tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """Modules of the package that are imported when the code runs, at once or late."""
    for_checkers = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_checkers:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from {name if name in modules else node.module for name in names} & modules


def reachable(graph: Graph) -> Graph:
    """All modules that each module imports, directly or through others."""
    found = {}
    for start in graph:
        seen: set[str] = set()
        waiting = list(graph[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += graph[name]
        found[start] = seen
    return found


def largest_circle(graph: Graph) -> int:
    """Number of modules of the largest set in which each module needs all others; 1 where there is no circle."""
    all_of = reachable(graph)
    return max(1, *(sum(name in all_of[other] and other in all_of[name] for other in graph) for name in graph))


def depth(graph: Graph) -> int:
    """Number of modules of the longest chain of imports; a circle counts as one module."""
    all_of = reachable(graph)

    @cache
    def chain(name: str) -> int:
        return 1 + max((chain(other) for other in all_of[name] if name not in all_of[other]), default=0)

    return max(map(chain, graph))


def main(folders: list[str]) -> None:
    found = [figures(Path(folder)) for folder in folders or ["."]]
    for name in found[0]:
        print(f"{name:24}" + "".join(f"{one[name]:>16}" for one in found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="a checkout; without any, the current folder")
    main(parser.parse_args().folders)
