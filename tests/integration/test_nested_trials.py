"""A run of several ranks inside a trial leaves nothing behind, however the trial ends."""

import functools
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import ray.tune
from ray._private.state import actors

import bss_ray
from bss_ray.data.shards import Shards
from bss_ray.errors import ModelOutputError
from bss_ray.testing import Fault
from bss_ray.tune.nested import FreeNested, fit_nested
from tests.runs import BATCH, Audit, audited_loop, make_shards

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]


def make_trainer(
    callbacks: list[Any], *, folder: Path, shards: Shards, ranks: int = 1, **audit: Any
) -> bss_ray.BalancedTrainer:
    """A run whose ranks take so many CPUs that there is no room for another."""
    (folder / "audit").mkdir(parents=True)
    return bss_ray.BalancedTrainer(
        audited_loop,
        dataset=shards,
        scoring=bss_ray.Scoring(engine="online"),
        batch_size=BATCH,
        train_loop_config=Audit(folder / "audit", **audit),
        scaling_config=ray.train.ScalingConfig(num_workers=ranks, resources_per_worker={"CPU": 4 // ranks}),
        run_config=ray.train.RunConfig(
            name="run",
            storage_path=str(folder),
            callbacks=callbacks,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
    )


def there() -> set[str]:
    """Placement groups and actors that are there, but for those that Ray Data and Train share in a cluster."""
    groups = {f"group {key}" for key, group in ray.util.placement_group_table().items() if group["state"] != "REMOVED"}
    living = {key: actor for key, actor in actors().items() if actor["State"] != "DEAD"}
    # Cleaners are detached, one for each run.
    return groups | {
        f"{actor['ActorClassName']} {key}"
        for key, actor in living.items()
        if not actor["IsDetached"] or actor["ActorClassName"] == "PlacementGroupCleaner"
    }


# What modules before this one have left, such as the controller of a run whose error is still held.
before: set[str] = set()


def assert_all_free(within_s: float) -> None:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if there() <= before and ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]:
            return
        time.sleep(0.1)
    pytest.fail(f"left after {within_s} s: {there() - before}, CPUs {ray.available_resources()['CPU']}")


@pytest.fixture(scope="module")
def shards(ray_session: None) -> Shards:
    before.update(there())
    made = make_shards(2)
    assert_all_free(60)  # of what made the shards
    return made


def test_to_the_end(tmp_path: Path, shards: Shards) -> None:
    seen = []

    def on_report(row: dict[str, Any], checkpoint: str | None) -> None:
        time.sleep(0.3)  # longer than an epoch: the next must not push the checkpoint away
        assert checkpoint is not None
        assert list(Path(checkpoint).iterdir())
        seen.append((row["epoch"], row["weight"], threading.current_thread()))

    result = fit_nested(
        functools.partial(make_trainer, folder=tmp_path, shards=shards, ranks=2, epochs=3, checkpoint_every=5),
        on_report,
    )
    assert [epoch for epoch, _, _ in seen] == [0, 1, 2]
    assert {thread for _, _, thread in seen} == {threading.current_thread()}
    assert result.metrics["weight"] == seen[-1][1]
    assert_all_free(20)


def bad_outputs() -> None:
    raise ModelOutputError("the model has forgotten its fused logits")


@pytest.mark.slow
def test_an_error_in_a_rank(tmp_path: Path, shards: Shards) -> None:
    seen = []
    fault = Fault(bad_outputs, marker=tmp_path / "fault", epoch=1, batch=2)
    make = functools.partial(make_trainer, folder=tmp_path, shards=shards, fault=fault)
    with pytest.raises(ModelOutputError, match="forgotten its fused logits"):
        fit_nested(make, lambda row, _: seen.append(row["epoch"]))
    assert seen == [0]
    assert_all_free(20)


@pytest.mark.slow
def test_an_error_in_the_trial(tmp_path: Path, shards: Shards) -> None:
    def on_report(row: dict[str, Any], checkpoint: str | None) -> None:
        raise KeyError("of the trial's own")

    with pytest.raises(KeyError, match="of the trial's own"):
        fit_nested(functools.partial(make_trainer, folder=tmp_path, shards=shards, epochs=1000), on_report)
    assert_all_free(20)


def trial(config: dict[str, Any], folder: Path, shards: Shards) -> None:
    def on_report(row: dict[str, Any], checkpoint: str | None) -> None:
        if config["ends"] == "killed" and row["epoch"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ray.tune.report({"epoch": row["epoch"]})

    own = folder / config["ends"]
    fit_nested(functools.partial(make_trainer, folder=own, shards=shards, epochs=1000), on_report)


@pytest.mark.slow
def test_trials_that_are_stopped_and_killed(tmp_path: Path, shards: Shards) -> None:
    found = ray.tune.Tuner(
        ray.tune.with_resources(ray.tune.with_parameters(trial, folder=tmp_path, shards=shards), {"CPU": 1}),
        # One after the other: each needs what the one before has freed.
        param_space={"ends": ray.tune.grid_search(["killed", "stopped"])},
        tune_config=ray.tune.TuneConfig(max_concurrent_trials=1),
        run_config=ray.tune.RunConfig(
            name="study", storage_path=str(tmp_path), stop={"epoch": 1}, verbose=0, callbacks=[FreeNested()]
        ),
    ).fit()
    assert_all_free(20)
    ends = {result.config["ends"]: result for result in found}
    assert isinstance(ends["killed"].error, ray.exceptions.ActorDiedError)
    assert ends["killed"].metrics["epoch"] == 0
    assert ends["stopped"].metrics["epoch"] == 1
