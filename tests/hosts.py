"""Clusters as somebody else starts them: raylets by `ray start --block`, on this machine or on hosts of their own.

A host is this machine's address or a network namespace (`tests/namespaces.py`); all of them share one file system.
Everything that a cluster starts carries its mark in the environment, and nothing else is ever ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray

from tests.driver import Driver, start_driver
from tests.processes import ROOT, children, command_of, free_ports, kill, marked, short_folder, start

# Environment variable of all processes of a cluster; its value is the cluster's alone.
MARK = "BSS_RAY_TEST_CLUSTER"

BIN = Path(sys.executable).parent
_START_S = 90.0
_STOP_S = 5.0
_PORTS = ("node-manager", "object-manager", "dashboard-agent-listen", "dashboard-agent-grpc", "metrics-export")


@dataclass(frozen=True)
class Host:
    """Where a raylet or a driver runs.

    Attributes:
        address: its address.
        enter: command that runs another one there; nothing runs it on this machine.
        cpus: of its raylet, for Ray's bookkeeping.
    """

    address: str = "127.0.0.1"
    enter: tuple[str, ...] = ()
    cpus: int = 2


@dataclass
class Node:
    """A raylet, and the `ray start --block` that has started it."""

    host: Host
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def raylet(self) -> int:
        """Process id of the raylet."""
        return next(pid for pid in children(self.process.pid) if command_of(pid)[0].endswith("/raylet"))

    def wait_until_started(self) -> None:
        """Until the head knows the raylet; `ray start` says so.

        Raises:
            RuntimeError: it has failed.
        """
        deadline = time.monotonic() + _START_S
        while "Ray runtime started" not in self.log.read_text():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"ray start on {self.host.address} has failed:\n{self.log.read_text()}")
            time.sleep(0.1)


@dataclass
class Cluster:
    """Raylets that know each other, with token authentication; the first is the head. Each has a cache of its own.

    Attributes:
        head: host of the head, and of drivers.
        dashboard: with dashboard and job server.
        settings: of Ray, for all processes.
        variables: of the environment of all processes, drivers included.
        nodes: raylets that were started, in that order.
    """

    head: Host = field(default_factory=Host)
    dashboard: bool = False
    settings: dict[str, int] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder = short_folder()
        self.mark = secrets.token_hex(8)
        self._gcs_port, self._dashboard_port = free_ports(2)
        self.dashboard_url = f"http://{self.head.address}:{self._dashboard_port}"
        # The token, and more that all processes of tests have, is in the environment of this one.
        self.env = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"} | {
            "RAY_ADDRESS": self.address,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_health_check_period_ms": "1000",  # a lost raylet is noticed after 5 s, not 15
            MARK: self.mark,
            **self.variables,
        }

    @property
    def address(self) -> str:
        """Of the head, for drivers and other nodes."""
        return f"{self.head.address}:{self._gcs_port}"

    def start(self, *workers: Host) -> None:
        """Start the head, then the others beside each other."""
        self._begin_node(self.head).wait_until_started()
        for node in [self._begin_node(host) for host in workers]:
            node.wait_until_started()

    def add_node(self, host: Host) -> Node:
        """Start one more raylet."""
        node = self._begin_node(host)
        node.wait_until_started()
        return node

    def _begin_node(self, host: Host) -> Node:
        number = len(self.nodes)
        role = [f"--address={self.address}"] if number else self._head_options()
        options = [
            *role,
            "--block",
            f"--node-ip-address={host.address}",
            # A folder each: nodes that start at the same time would choose the same names for their sockets.
            f"--temp-dir={self.folder}/{number}",
            f"--num-cpus={host.cpus}",
            "--object-store-memory=150000000",
            "--disable-usage-stats",
            *(f"--{name}-port={port}" for name, port in zip(_PORTS, free_ports(len(_PORTS)), strict=True)),
        ]
        log = self.folder / f"node-{number}.log"
        env = {**self.env, "BSS_RAY_CACHE": str(self.cache(number))}
        process = start([*host.enter, str(BIN / "ray"), "start", *options], log, env)
        self.nodes.append(Node(host, process, log))
        return self.nodes[-1]

    def cache(self, number: int) -> Path:
        """Where node `number` keeps rows on its disk."""
        return self.folder / "cache" / str(number)

    def lose(self, node: Node) -> None:
        """Kill -9 a raylet, and wait until this process's Ray knows it."""
        before = sum(each["Alive"] for each in ray.nodes())
        kill(node.raylet)
        deadline = time.monotonic() + 60
        while sum(each["Alive"] for each in ray.nodes()) == before:
            assert time.monotonic() < deadline, f"there are still {before} nodes after 60 s"
            time.sleep(0.1)

    def _head_options(self) -> list[str]:
        return [
            "--head",
            f"--port={self._gcs_port}",
            f"--ray-client-server-port={free_ports(1)[0]}",
            f"--include-dashboard={self.dashboard}",
            f"--dashboard-host={self.head.address}",
            f"--dashboard-port={self._dashboard_port}",
            f"--system-config={json.dumps(self.settings)}",
        ]

    def driver(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Driver:
        """Begin a call in a driver on the head's host."""
        return start_driver(self.folder, self.env, list(self.head.enter), function, *args, **kwargs)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a call in a driver on the head's host returns, within four minutes."""
        return self.driver(function, *args, **kwargs).result(240)

    def command(self, *argv: str | Path, timeout_s: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a program on the head's host to its end, with the cluster's environment."""
        return subprocess.run(
            [*self.head.enter, *map(str, argv)],
            env={**self.env, "PYTHONPATH": str(ROOT), **env},
            cwd=ROOT,
            text=True,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )

    def close(self) -> None:
        """End all processes with this cluster's mark: by SIGTERM to `ray start`, then by force."""
        for node in reversed(self.nodes):
            node.process.terminate()
        deadline = time.monotonic() + _STOP_S
        while marked(MARK, self.mark) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in marked(MARK, self.mark):
            kill(pid)
        for node in self.nodes:
            node.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def started(cluster: Cluster, *workers: Host) -> Iterator[Cluster]:
    """The cluster with its head and these others; all of it ends with the block, whatever happens there."""
    try:
        cluster.start(*workers)
        yield cluster
    finally:
        cluster.close()
