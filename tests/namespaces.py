"""Hosts in network namespaces: an address each, a cable each to one switch, and no way to the machine's own network.

They share everything else, above all the file system and process ids. Needs root and the program `ip` (iproute2).
And hosts in a mount namespace, which share everything but some folders. Needs root and `unshare`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.hosts import Host

INTERFACE = "eth0"
# Gloo would ask the name server for an address of this machine, and find none of the namespace's.
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": INTERFACE, "TP_SOCKET_IFNAME": INTERFACE}

# Names have the process id of the pytest that made them, so that one can tell what a killed one has left.
_PREFIX = "bss-ray-"


@dataclass
class Network:
    """Hosts around a switch; nobody else reaches these addresses, so all networks may use the same."""

    switch: str = field(init=False)
    hosts: list[Host] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.switch = f"{_PREFIX}{os.getpid()}-switch"
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.switch, "addr", "add", "10.77.0.254/24", "dev", "bridge")
        _ip("-n", self.switch, "link", "set", "bridge", "up")

    def add(self) -> Host:
        """One more host."""
        number = len(self.hosts) + 1
        name, port = f"{_PREFIX}{os.getpid()}-host{number}", f"port{number}"
        host = Host(f"10.77.0.{number}", ("ip", "netns", "exec", name))
        _ip("netns", "add", name)
        self.hosts.append(host)
        _ip("link", "add", INTERFACE, "netns", name, "type", "veth", "peer", "name", port, "netns", self.switch)
        _ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", name, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
        for interface in ("lo", INTERFACE):
            _ip("-n", name, "link", "set", interface, "up")
        # Leads nowhere. Ray asks which address it would take to the world.
        _ip("-n", name, "route", "add", "default", "via", "10.77.0.254")
        return host

    def unplug(self, host: Host) -> None:
        """Pull the host's cable out of the switch."""
        _ip("-n", self.switch, "link", "set", f"port{self.hosts.index(host) + 1}", "down")

    def plug_in(self, host: Host) -> None:
        """Put it back."""
        _ip("-n", self.switch, "link", "set", f"port{self.hosts.index(host) + 1}", "up")

    def part(self, one: Host, other: Host) -> None:
        """Let two hosts not hear each other any more, while all others hear both."""
        for here, there in ((one, other), (other, one)):
            _ip("-n", here.enter[-1], "route", "add", "blackhole", there.address)

    def join(self, one: Host, other: Host) -> None:
        """Undo `part`."""
        for here, there in ((one, other), (other, one)):
            _ip("-n", here.enter[-1], "route", "del", "blackhole", there.address)

    def close(self) -> None:
        """Remove all of it; processes must have ended."""
        for name in (*(host.enter[-1] for host in self.hosts), self.switch):
            with contextlib.suppress(subprocess.CalledProcessError):
                _ip("netns", "del", name)


@contextlib.contextmanager
def network(hosts: int) -> Iterator[Network]:
    """A network of so many hosts; the test is skipped where there cannot be one."""
    _skip_without_namespaces()
    _remove_what_others_have_left()
    made = Network()
    try:
        for _ in range(hosts):
            made.add()
        yield made
    finally:
        made.close()


# Another disk over `apart`; `locked` takes no writes; what is written to `layered` goes to a layer of the node's own.
_MOUNT = """
set -e
mount -t tmpfs apart "$0/apart"
mount --bind "$0/locked" "$0/locked"
mount -o remount,bind,ro "$0/locked"
mount -t tmpfs layer "$0/layer"
mkdir "$0/layer/upper" "$0/layer/work"
if mount -t overlay -o lowerdir="$0/layered",upperdir="$0/layer/upper",workdir="$0/layer/work" layers "$0/layered"
then touch "$0/has-layers"; fi
exec "$@"
"""


def private_mounts(folder: Path) -> tuple[str, ...]:
    """Command that runs another one where `apart`, `locked` and `layered` in `folder` are other folders than here.

    Nothing where this process may not mount in a namespace of its own.
    """
    for name in ("shared", "apart", "locked", "layered", "layer"):
        (folder / name).mkdir(parents=True)
    probe = ["unshare", "-m", "mount", "-t", "tmpfs", "try", "/mnt"]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        return ()
    return ("unshare", "-m", "sh", "-c", _MOUNT, str(folder))


def _skip_without_namespaces() -> None:
    if shutil.which("ip") is None:
        pytest.skip("hosts in network namespaces need the program `ip` (Debian: iproute2)")
    if os.geteuid() != 0:
        pytest.skip("hosts in network namespaces need root")
    name = f"{_PREFIX}{os.getpid()}-probe"
    try:
        _ip("netns", "add", name)
        _ip("-n", name, "link", "add", "probe0", "type", "veth", "peer", "name", "probe1")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this machine does not allow network namespaces: {error.stderr.strip()}")
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _remove_what_others_have_left() -> None:
    """Namespaces of a pytest that was killed; their processes have ended with it."""
    for name in _ip("netns", "list").split():
        owner = name.removeprefix(_PREFIX).split("-")[0]
        if name.startswith(_PREFIX) and not Path("/proc", owner).exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def _ip(*argv: str) -> str:
    return subprocess.run(["ip", *argv], check=True, capture_output=True, text=True).stdout
