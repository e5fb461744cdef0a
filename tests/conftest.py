"""Shared fixtures. One local Ray per test module: starting it costs 5 to 10 seconds."""

import os
from collections.abc import Iterator

import pytest
import ray
import ray.data

# Reports are barriers of one controller poll; the tests' epochs take milliseconds.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """A Ray of this module's own. More logical CPUs than cores, so that four ranks fit."""
    ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()
