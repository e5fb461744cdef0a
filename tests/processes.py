"""Processes and ports of this machine, as tests start, find and end them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]

_PR_SET_PDEATHSIG = 1


def start(argv: list[str], log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """A process that finds this project, writes to `log`, and ends when pytest does."""
    with log.open("wb") as output:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env={**env, "PYTHONPATH": str(ROOT)},
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM when pytest dies, however it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def marked(name: str, value: str) -> list[int]:
    """Processes that have a variable of this value in their environment."""
    wanted = f"{name}={value}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is another user's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def kill(pid: int) -> None:
    """Kill -9, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def children(parent: int) -> list[int]:
    """Processes that this one has started and not yet waited for."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def command_of(pid: int) -> list[str]:
    """Its command line, or title."""
    return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
