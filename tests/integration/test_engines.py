"""Each engine with two ranks on Ray gives what it gives in a `LocalCluster`, to the bit; and its profiles.

So what `tests/local` shows of runs in one process holds for runs of many.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import torch

import bss_ray
from bss_ray.data.shards import Shards
from bss_ray.runtime.messages import Message, ProfileRecorded
from bss_ray.runtime.profiling import SCORING, STEP, ProfileFolder
from bss_ray.storage import StoragePath
from tests.local.runs import ENGINES, assert_same, local_run
from tests.runs import BATCH, TwoHeads, make_shards, run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]


@pytest.fixture(scope="module")
def shards(ray_session: None) -> Shards:
    return make_shards(3)


@pytest.mark.parametrize(
    "engine", [pytest.param(name, marks=() if name == "actors" else pytest.mark.slow) for name in ENGINES]
)
def test_two_ranks_as_in_one_process(engine: str, shards: Shards, tmp_path: Path) -> None:
    on_ray = run(tmp_path / "ray", shards, workers=2, scoring=ENGINES[engine], update_interval=1, epochs=3)
    here = local_run(
        tmp_path / "here", ranks=2, engine=engine, batch_size=BATCH, audit={"epochs": 3, "checkpoint_every": None}
    )
    assert_same(here.outcome, on_ray)


def profiled_loop() -> None:
    sampler = bss_ray.get_sampler()
    model = TwoHeads(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in sampler.epochs(3):
        for batch in sampler.batches():
            outputs = model(batch)
            sampler.observe(batch, outputs)
            optimizer.zero_grad()
            sampler.loss(batch, outputs).mean().backward()
            optimizer.step()
        sampler.report({}, model=model, optimizer=optimizer)


@pytest.mark.parametrize(("engine", "files"), [("workers", [STEP, SCORING]), ("online", [STEP])])
def test_a_rank_profiles_its_step_and_its_pass(engine: Any, files: list[str], shards: Shards, tmp_path: Path) -> None:
    messages: list[Message] = []
    bss_ray.BalancedTrainer(
        profiled_loop,
        dataset=shards,
        scheduler=bss_ray.Learning(temperature=0.3),
        scoring=bss_ray.Scoring(engine=engine),
        batch_size=BATCH,
        profile=True,
        scaling_config=ray.train.ScalingConfig(num_workers=0),
        run_config=ray.train.RunConfig(name="run", storage_path=str(tmp_path)),
        on_message=messages.append,
    ).fit()
    found = {message.file: message for message in messages if isinstance(message, ProfileRecorded)}
    assert sorted(found) == sorted(files)
    for message in found.values():
        events = json.loads(ray.get(message.trace))["traceEvents"]
        operators = [event["name"] for event in events if event.get("cat") == "cpu_op"]
        assert "aten::linear" in operators
        assert "aten::" in message.summary
    folder = ProfileFolder(StoragePath.of(str(tmp_path)))
    for message in found.values():
        assert folder.take(message) == f"wrote profile/{message.file}"
    folder.finish()
    summary = (tmp_path / "profile" / "summary.txt").read_text()
    assert ("no scoring pass: scoring.engine=online makes none" in summary) == (engine == "online")
