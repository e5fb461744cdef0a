"""Shared fixtures. Starting Ray costs 5 to 10 seconds, so modules share it."""

import os
from collections.abc import Iterator

import pytest
import ray
import ray.data

# Reports are barriers of one controller poll; the tests' epochs take milliseconds.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
# A worker process for each logical CPU, before anything asks for one: a second of CPU each, and few are used.
os.environ["RAY_prestart_worker_first_driver"] = "0"  # noqa: SIM112  # the name that Ray reads


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """A local Ray, shared by modules that follow each other. More logical CPUs than cores, so that four ranks fit."""
    if not ray.is_initialized():
        ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="error")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    yield
    ray.data.DataContext._set_current(ray.data.DataContext())


@pytest.fixture(scope="module")
def no_ray_session() -> None:
    """For modules that start a cluster of their own."""
    ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def _end_of_session() -> Iterator[None]:
    yield
    ray.shutdown()
