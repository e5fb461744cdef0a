"""Hosts that cannot be heard for a while, or not any more: a run goes on or starts again, and never waits for ever."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ray.train

from bss_ray import Scoring
from bss_ray.testing import Fault
from tests.driver import Driver
from tests.hosts import Cluster, started
from tests.leftovers import left_after
from tests.namespaces import ENVIRONMENT, Network, network
from tests.runs import ROWS, Outcome, make_spread_shards, run

# The hard limit of each test; quiet machines need a third of it.
pytestmark = [
    pytest.mark.fault,
    pytest.mark.slow,
    pytest.mark.outage,
    pytest.mark.usefixtures("no_ray_session"),
    pytest.mark.timeout(600),
]

OUTAGE_S = 20.0
# Ray's head gives a host up when five questions in turn were not answered within 8 s: after 40 s.
HEALTH = {"RAY_health_check_timeout_ms": "8000"}


@dataclass
class Site:
    """The network, and the cluster in it: a head and two workers."""

    network: Network
    cluster: Cluster


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with network(3) as net:
        head, *workers = net.hosts
        with started(Cluster(head=replace(head, cpus=0), variables=ENVIRONMENT | HEALTH), *workers) as cluster:
            yield Site(net, cluster)


@dataclass(frozen=True)
class Until:
    """Nothing goes on until a file is there."""

    file: Path

    def __call__(self) -> None:
        while not self.file.exists():
            time.sleep(0.05)


def train(folder: Path, fault: Fault, **settings: float) -> tuple[Outcome, list[str]]:
    """Two ranks on different hosts."""
    scoring = Scoring(engine="actors", num_holders=2, num_scorers=2)
    outcome = run(
        folder,
        make_spread_shards(),
        placement="SPREAD",
        scoring=scoring,
        checkpoint_every=3,
        epochs=2,
        fault=fault,
        **settings,  # type: ignore[arg-type]
    )
    return outcome, left_after()


def in_the_middle(folder: Path) -> Fault:
    """The ranks wait in the middle of epoch 1 for the network to be cut."""
    return Fault(Until(folder / "cut"), marker=folder / "fault", epoch=1, batch=5)


def begin(site: Site, folder: Path, cut: Callable[[], None], **settings: float) -> Driver:
    """Begin to train, cut the network in the middle of an epoch, and let the ranks go on."""
    fault = in_the_middle(folder)
    driver = site.cluster.driver(train, folder, fault, **settings)
    while not fault.happened():
        assert driver.process.poll() is None, driver.log
        time.sleep(0.1)
    cut()
    (folder / "cut").touch()
    return driver


def check(driver: Driver, limit_s: float) -> Outcome:
    outcome, left = driver.result(limit_s)
    outcome.check_rows(ROWS, round(0.9 * ROWS))
    assert left == []
    return outcome


def test_a_cable_is_out_for_a_while(site: Site, tmp_path: Path) -> None:
    host = site.network.hosts[-1]
    # An answer that was on its way may be lost, and who waits for it waits so long.
    driver = begin(site, tmp_path, lambda: site.network.unplug(host), failures=3, wait_limit_s=60)
    time.sleep(OUTAGE_S)
    assert driver.process.poll() is None, "it ended while the host could not be heard"
    site.network.plug_in(host)
    check(driver, 400)  # four attempts: a limit and a start each


def test_two_hosts_do_not_hear_each_other(site: Site, tmp_path: Path) -> None:
    """Ray's head hears both, so only the run can notice; its limit of waiting is that of the collectives, too."""
    _, one, other = site.network.hosts
    driver = begin(site, tmp_path, lambda: site.network.part(one, other), failures=0, wait_limit_s=45)
    with pytest.raises(ray.train.TrainingFailedError, match="Timed out waiting 45000ms"):
        driver.result(200)
    site.network.join(one, other)
    again = site.cluster.driver(train, tmp_path, in_the_middle(tmp_path), failures=0)
    assert check(again, 300).resumed


def test_a_cable_stays_out(site: Site, tmp_path: Path) -> None:
    host = site.network.hosts[-1]
    driver = begin(site, tmp_path, lambda: site.network.unplug(host), failures=3)
    assert check(driver, 400).resumed
