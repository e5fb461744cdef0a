"""What a cluster shows of a run: metrics as Prometheus reads them, and the names of actors and tasks."""

from __future__ import annotations

import sys
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from typing import Any

import pytest
import ray
import torch
from ray.util.state import list_actors, list_tasks
from torch import nn

import bss_ray
from bss_ray.runtime.run_metrics import FIGURES
from bss_ray.testing import Fault, Raise
from tests.integration.test_remote_rows import ROWS, WIDTH, living_nodes, make_shards

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.usefixtures("two_nodes")]

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

EPOCHS, BATCH, REPORT_MS = 3, 100, 500  # as often as tests/conftest.py says
RUN = "watched"


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 5), nn.Linear(1, 5)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logits = {"a": self.a(batch["a"] / ROWS), "b": self.b(batch["b"][:, None] / ROWS)}
        return {**logits, "fused": logits["a"] + logits["b"]}


def loop(fault: Fault) -> None:
    """Train; rank 0 fails once, after a checkpoint."""
    sampler = bss_ray.get_sampler()
    model = sampler.prepare(Heads())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sampler.restore(model=model, optimizer=optimizer)
    for epoch in sampler.epochs(EPOCHS):
        for batch in sampler.batches():
            outputs = model(batch)
            sampler.observe(batch, outputs)
            optimizer.zero_grad()
            sampler.loss(batch, outputs).mean().backward()
            optimizer.step()
            fault.reached(epoch, sampler.position.batch - 1, rank=sampler.rank)
        sampler.report({}, model=model, optimizer=optimizer)
    time.sleep(6 * REPORT_MS / 1000)  # the actors end with the run, and metrics are reported now and then


@dataclass
class Scraped:
    """What the nodes' Prometheus endpoints have shown during a run: each value of each series, in time."""

    values: dict[str, list[float]] = field(default_factory=dict)
    text: str = ""

    def look(self) -> None:
        for node in filter(lambda node: node["Alive"], ray.nodes()):
            address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
            with urllib.request.urlopen(address, timeout=30) as answer:
                self._take(answer.read().decode())

    def _take(self, text: str) -> None:
        for line in text.splitlines():
            if line.startswith("ray_bss_ray_") and f'run="{RUN}"' in line:
                self.values.setdefault(line.partition("{")[0], []).append(float(line.rpartition(" ")[2]))
            elif line.startswith("# HELP ray_bss_ray_") and line not in self.text:
                self.text += line + "\n"


@dataclass
class Watched:
    metrics: dict[str, Any]
    scraped: Scraped
    actors: dict[str, Any]
    tasks: set[str]


@pytest.fixture(scope="module")
def watched(two_nodes: None, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """One run over shards of both nodes, which goes on from a checkpoint once."""
    folder = tmp_path_factory.mktemp("runs")
    shards, _refs = make_shards(3 * living_nodes())
    scraped, done = Scraped(), threading.Event()

    def scrape() -> None:
        while not done.wait(REPORT_MS / 1000):
            scraped.look()

    trainer = bss_ray.BalancedTrainer(
        loop,
        dataset=shards,
        scheduler=bss_ray.Learning(),
        scoring=bss_ray.Scoring(engine="actors"),
        batch_size=BATCH,
        train_loop_config=Fault(Raise(RuntimeError("once")), folder / "fault", epoch=2, batch=3),
        scaling_config=ray.train.ScalingConfig(num_workers=1),
        run_config=ray.train.RunConfig(
            name=RUN, storage_path=str(folder), failure_config=ray.train.FailureConfig(max_failures=1)
        ),
    )
    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        result = trainer.fit()
    finally:
        done.set()
        scraper.join()
    here = ray.get_runtime_context().gcs_address  # there may be other clusters on this machine
    listed = list_actors(here, limit=1000, detail=True)
    actors = {actor.name: actor for actor in listed if actor.name.startswith(f"bss_ray-{RUN}-")}
    tasks = {task.name for task in list_tasks(here, limit=10000)}
    return Watched(dict(result.metrics), scraped, actors, tasks)


def exported(name: str) -> str:
    return f"ray_{name}_total" if FIGURES[name].kind == "counter" else f"ray_{name}"


def test_every_figure_of_the_table_is_exported_with_its_text(watched: Watched) -> None:
    assert set(watched.scraped.values) == {exported(name) for name in FIGURES}
    for figure in FIGURES.values():
        assert figure.text in watched.scraped.text


def test_figures_are_those_of_the_run(watched: Watched) -> None:
    seen = {name: watched.scraped.values[exported(name)] for name in FIGURES}
    last = {name: values[-1] for name, values in seen.items()}
    row = watched.metrics
    assert last["bss_ray_epoch"] == EPOCHS - 1
    assert last["bss_ray_score_version"] == row["score_version"] + 1
    assert last["bss_ray_loss"] == pytest.approx(row["train_loss"])
    assert last["bss_ray_score_age"] == row["score_age"]
    assert last["bss_ray_effective_sample_size"] == pytest.approx(row["effective_sample_size"])
    assert last["bss_ray_loader_stall_share"] == pytest.approx(row["loader_stall_share"])
    assert last["bss_ray_scoring_rows_per_second"] == pytest.approx(row["scoring_rows_per_second"])
    assert 0 < row["loader_stall_share"] < 1
    assert 100 < row["scoring_rows_per_second"] < 1e7
    assert last["bss_ray_restarts"] == 1
    # Two whole epochs, the third as far as it came, and the third again; the rows since the last message are lost.
    assert EPOCHS * ROWS <= last["bss_ray_rows_trained"] <= EPOCHS * ROWS + 4 * BATCH
    assert last["bss_ray_moved_share"] == row["moved_share"] == 0.5
    assert last["bss_ray_moved_rows"] == EPOCHS * ROWS / 2


def test_actors_say_what_they_are(watched: Watched) -> None:
    rows, *others = sorted((name.split("-", 3)[-1] for name in watched.actors), key=lambda role: "rows" not in role)
    assert set(others) == {"holder-0", "holder-1", "scorer-0", "scorer-1", "coordinator"}
    assert rows[5:] in {node[:6] for node in living_nodes()}, "of the node without a rank"
    for name, actor in watched.actors.items():
        assert actor.repr_name == name
        assert actor.state == "DEAD"


def test_calls_say_what_they_do(watched: Watched) -> None:
    assert {"holder.summary", "scorer.measure shard 0", "bss_ray.pick_rows"} <= watched.tasks
