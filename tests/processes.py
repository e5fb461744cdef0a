"""Processes, ports and folders of this machine, as tests make, find and remove them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Environment variable of all processes that a run of the tests starts; its value is the run's alone.
MARK = "BSS_RAY_TESTS"

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


def short_folder() -> Path:
    """A new folder of the test run, which its owner removes. A socket's path there is shorter than 108 bytes."""
    return Path(tempfile.mkdtemp(dir=os.environ["RAY_TMPDIR"]))


class Surroundings:
    """What is there before the first test, to tell what tests have left behind."""

    # pytest's own files and caches of tools come and go in the repository.
    _FOLDERS = (Path.home() / ".cache", Path.home() / ".cache" / "bss_ray", Path.home() / ".ray", ROOT)
    # Sessions of Ray, the cache of disk stores, what other programs keep for their user, and temporary files of
    # processes that were killed.
    _OWN = frozenset({"ray", "cache", "tmp", "token"})

    def __init__(self) -> None:
        self._files = self._look()

    def _look(self) -> set[Path]:
        found = {path for folder in self._FOLDERS if folder.exists() for path in folder.iterdir()}
        return {path for path in found if path.parent != ROOT or not path.name.startswith((".", "__"))}

    def left_behind(self, folder: Path, within_s: float = 30.0) -> list[str]:
        """Processes, files of the user, and folders of tests in `folder` that are there after `within_s` at most."""
        deadline = time.monotonic() + within_s
        while (left := self._left(folder)) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def _left(self, folder: Path) -> list[str]:
        alive = [" ".join(command_of(pid)) for pid in marked(MARK, os.environ[MARK]) if pid != os.getpid()]
        # Of this process, until its end.
        alive = [command for command in alive if "multiprocessing.resource_tracker" not in command]
        files = (self._look() - self._files) | {path for path in folder.iterdir() if path.name not in self._OWN}
        return [f"process {command}" for command in alive] + [f"file {path}" for path in sorted(files)]


def kill(pid: int) -> None:
    """Kill -9, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def children(parent: int) -> list[int]:
    """Processes that this one has started and not yet waited for."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def command_of(pid: int) -> list[str]:
    """Its command line, or title; nothing of one that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
    return []


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all different."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]
