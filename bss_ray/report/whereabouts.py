"""What runs where, as a table on a terminal and as lines in a log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

_ORDER = ("ranks", "scorers", "holders", "coordinator", "controller")


def placement_table(message: Mapping[str, Any]) -> Table:
    """A row for each node, a column for each kind of process."""
    kinds = _kinds(message)
    table = Table("node", *(_with(kind, _amounts(message["each"][kind])) for kind in kinds), "left")
    for row in message["rows"]:
        counts = (str(row["processes"].get(kind, "")) for kind in kinds)
        table.add_row(row["node"], *counts, _left(row["left"]))
    return table


def placement_lines(message: Mapping[str, Any]) -> list[str]:
    """A line for each node."""
    each = message["each"]
    lines = []
    for row in message["rows"]:
        here = [
            _with(
                kind if number == 1 and kind[-1] == "r" else f"{number} {_plural(kind, number)}", _amounts(each[kind])
            )
            for kind in _kinds(message)
            if (number := row["processes"].get(kind))
        ]
        left = f"; left {_left(row['left'])}" if row["left"] else ""
        lines.append(f"{row['node']}: {', '.join(here) or 'nothing of this run'}{left}")
    return lines


def _kinds(message: Mapping[str, Any]) -> list[str]:
    return sorted(message["each"], key=lambda kind: (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), kind))


def _plural(kind: str, number: int) -> str:
    return kind.removesuffix("s") if number == 1 else kind


def _with(kind: str, amounts: str) -> str:
    return f"{kind} ({amounts})" if amounts else kind


def _amounts(takes: Mapping[str, float]) -> str:
    return " + ".join(f"{amount:g} {name}" for name, amount in takes.items())


def _left(left: Mapping[str, tuple[float, float]]) -> str:
    return ", ".join(f"{free:g} of {of:g} {name}" for name, (free, of) in left.items())
