"""The Grafana dashboard: built as Ray's own are, its queries PromQL, over metrics that there are."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest

from bss_ray.runtime.run_metrics import FIGURES

factory = pytest.importorskip("ray.dashboard.modules.metrics.grafana_dashboard_factory", reason="needs ray[default]")

ROOT = Path(__file__).parents[2]
BOARD: dict[str, Any] = json.loads((ROOT / "cluster" / "grafana" / "bss_ray.json").read_text())
RAYS: dict[str, Any] = json.loads(factory.generate_train_grafana_dashboard()[0])
DEFAULT: dict[str, Any] = json.loads(factory.generate_default_grafana_dashboard()[0])

# Prometheus' names of the project's metrics.
METRICS = {f"ray_{name}{'_total' if figure.kind == 'counter' else ''}" for name, figure in FIGURES.items()}
LABELS = {"run", "SessionName", "ray_io_cluster"}


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All panels that show something, out of their rows."""
    for panel in board["panels"]:
        if panel["type"] != "row":
            yield panel
        yield from panels(panel) if "panels" in panel else ()


def variables(board: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {variable["name"]: variable for variable in board["templating"]["list"]}


def selectors(query: str) -> list[promql_parser.VectorSelector]:
    """The series that a query reads; Grafana's variables are filled in first."""
    filled = query.replace("[$window]", "[5m]")
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        return True

    promql_parser.walk(promql_parser.parse(filled), visit)
    return found


def test_it_is_built_as_rays_dashboards_are() -> None:
    # What Grafana needs besides panels, and what lets it stand beside Ray's: everything but Ray's own marks.
    assert set(RAYS) - {"rayMeta"} <= set(BOARD)
    for name in ("schemaVersion", "annotations", "time", "refresh", "graphTooltip"):
        assert BOARD[name] == RAYS[name], name
    assert BOARD["uid"] not in {RAYS["uid"], DEFAULT["uid"]}


@pytest.mark.parametrize("name", ["datasource", "SessionName", "Cluster", "window"])
def test_variables_are_those_of_rays_dashboards(name: str) -> None:
    rays = {**variables(DEFAULT), **variables(RAYS)}[name]
    own = variables(BOARD)[name]
    for key in ("type", "datasource", "includeAll", "allValue", "multi", "hide"):
        assert own.get(key) == rays.get(key), key


def test_panels_are_laid_out_beside_each_other() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in BOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) == 23


@pytest.mark.parametrize("panel", list(panels(BOARD)), ids=lambda panel: panel["title"])
def test_every_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == "${datasource}"
    assert panel["targets"]
    for target in panel["targets"]:
        assert set(target) <= set(next(panels(RAYS))["targets"][0])
        assert "{{run}}" in target["legendFormat"]


def test_queries_are_promql_over_metrics_of_the_table() -> None:
    queries = [target["expr"] for panel in panels(BOARD) for target in panel["targets"]]
    read = [selector for query in queries for selector in selectors(query)]
    assert {selector.name for selector in read} == METRICS  # each is shown, and no other
    for selector in read:
        assert {matcher.name for matcher in selector.matchers.matchers} == LABELS
    # A counter is shown as a rate or a sum over its restarts, a gauge as it is.
    for query in queries:
        assert query.startswith("sum by (run)" if "_total{" in query else "max by (run)")


def test_variables_ask_for_labels_of_a_metric_of_the_table() -> None:
    for name in ("SessionName", "Cluster", "run"):
        variable = variables(BOARD)[name]
        assert variable["definition"] == variable["query"]["query"]
        asked = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
        assert asked is not None
        (selector,) = selectors(asked[1])
        assert selector.name in METRICS
        assert asked[2] in LABELS


def test_a_query_that_is_none_is_found() -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        selectors("max by (run) (ray_bss_ray_epoch")
