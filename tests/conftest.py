"""What all tests share: one Ray, one cluster of two nodes, profiles of Hypothesis, and a check of what is left behind.

Starting Ray costs 5 to 10 seconds, so tests are sorted by what they need: first those that start no Ray, then those of
`ray_session`, those of `two_nodes`, and those that start their own.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.processes import MARK, Surroundings

# Everything that tests start writes here: Ray's sessions, caches, temporary files. Not pytest's folder: a socket's path
# must be shorter than 108 bytes, and Ray adds 70.
FOLDER = Path(tempfile.mkdtemp(prefix="bss-", dir="/tmp"))
(FOLDER / "tmp").mkdir()
(FOLDER / "token").write_text(secrets.token_hex(32))

os.environ |= {
    MARK: secrets.token_hex(8),
    "SPT_NOENV": "1",  # otherwise the titles of Ray's processes are written over their environment in /proc
    "TMPDIR": str(FOLDER / "tmp"),
    "RAY_TMPDIR": str(FOLDER),
    "BSS_RAY_CACHE": str(FOLDER / "cache"),
    "XDG_CACHE_HOME": str(FOLDER / "cache"),
    "WANDB_CACHE_DIR": str(FOLDER / "cache"),  # one of its programs does not ask the line before
    # Ray's default, but for the place of the token: one for all clusters, so that this process can connect to each.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN_PATH": str(FOLDER / "token"),
    "RAY_USAGE_STATS_ENABLED": "0",
    # Reports are barriers of one controller poll; the tests' epochs take milliseconds.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1",
    # A worker process for each logical CPU, before anything asks for one: a second of CPU each, and few are used.
    "RAY_prestart_worker_first_driver": "0",
}

import ray  # noqa: E402  # it reads the environment once
import ray.data  # noqa: E402

from tests.hosts import Cluster, Host, started  # noqa: E402
from tests.namespaces import private_mounts  # noqa: E402

hypothesis.settings.register_profile("quick", max_examples=30, deadline=None, database=None, derandomize=True)
# The same examples in each run; a failure prints what repeats it.
hypothesis.settings.register_profile(
    "thorough", max_examples=300, deadline=None, database=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("quick")

# Fixtures, in the order in which tests use them.
_RAYS = ("ray_session", "two_nodes", "no_ray_session")


def pytest_configure(config: pytest.Config) -> None:
    """What a next version of Ray removes is an error. A line of pyproject.toml would import Ray before this module."""
    config.addinivalue_line("filterwarnings", "error::ray.util.annotations.RayDeprecationWarning")


_sessions: list[pytest.Session] = []


def pytest_sessionstart(session: pytest.Session) -> None:
    _sessions.append(session)


@pytest.hookimpl(trylast=True)  # after all that others have to say
def pytest_unconfigure() -> None:
    """Remove what tests wrote, and end the process where it is.

    A process that had tested on clusters crashed once at its normal end, all tests passed. Why is not proved: threads
    of Ray's C++ client live on after `ray.shutdown()`, while a normal end destroys what they use.
    """
    shutil.rmtree(FOLDER, ignore_errors=True)
    if _sessions:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(_sessions[-1].exitstatus))


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort tests by the Ray that they need; those of a module stay in their order."""

    def ray_of(item: pytest.Item) -> int:
        names = getattr(item, "fixturenames", ())
        return next((place for place, name in enumerate(_RAYS) if name in names), -1)

    items.sort(key=ray_of)
    for item in items:
        if ray_of(item) >= 0:
            item.add_marker("ray" if ray_of(item) == 0 else "cluster")


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """A local Ray, shared by all modules that use this fixture; four ranks fit into its logical CPUs."""
    if not ray.is_initialized():
        ray.init(address="local", num_cpus=6, include_dashboard=False, log_to_driver=False, logging_level="error")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    yield
    ray.data.DataContext._set_current(ray.data.DataContext())


@pytest.fixture(scope="session")
def _two_nodes() -> Iterator[Cluster]:
    # Metrics and tasks are shown soon.
    settings = {"metrics_report_interval_ms": 500, "task_events_report_interval_ms": 200}
    cluster = Cluster(Host(cpus=4), dashboard=True, settings=settings)
    with started(cluster, Host(enter=private_mounts(cluster.folder / "mounts"))) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def two_nodes(_two_nodes: Cluster) -> Iterator[Cluster]:
    """A cluster of two nodes with a job server, shared by all modules that use this fixture, and connected with."""
    ray.shutdown()
    ray.init(address=_two_nodes.address, log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield _two_nodes
    ray.shutdown()
    ray.data.DataContext._set_current(ray.data.DataContext())


@pytest.fixture(scope="module")
def no_ray_session() -> None:
    """For modules that start a cluster of their own."""
    ray.shutdown()


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    surroundings = Surroundings()
    yield
    ray.shutdown()
    left = surroundings.left_behind(FOLDER)
    assert not left, "tests have left behind:\n" + "\n".join(left)
