"""`bss-ray` as a user runs it: in this process, on the Ray that it is connected with, or in a process of its own."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bss_ray.cli import main
from bss_ray.names import CLOCKED
from bss_ray.storage import StoragePath
from tests.processes import ROOT


def run_here(*words: object, code: int = 0) -> str:
    """Run a command in this process; what it has printed. It must return `code`."""
    out = io.StringIO()
    with _restored(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        found = main([str(word) for word in words])
    assert found == code, out.getvalue()
    return out.getvalue()


@contextlib.contextmanager
def _restored() -> Iterator[None]:
    """What a command sets for its process is undone."""
    names = ("", "ray", "ray.data", "ray.train", "ray.tune")
    levels = {name: logging.getLogger(name).level for name in names}
    environment, paths, handler = dict(os.environ), list(sys.path), signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        sys.path[:] = paths
        signal.signal(signal.SIGTERM, handler)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@dataclass
class Command:
    """A command in a process group of its own, so that a test stops what it started and nothing else."""

    process: subprocess.Popen[str]

    def wait_for(self, condition: Callable[[], bool], limit_s: float = 200) -> None:
        """Until something has come of it."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, f"nothing within {limit_s:g} s"
            time.sleep(0.05)

    def finish(self, code: int = 0, limit_s: float = 240) -> str:
        """What it has printed; it must end with `code`."""
        out, _ = self.process.communicate(timeout=limit_s)
        assert self.process.returncode == code, out
        assert "Traceback" not in out
        return out

    def kill(self) -> None:
        """Kill -9 of the driver alone."""
        self.process.kill()
        self.process.communicate()

    def interrupt(self) -> str:
        """Ctrl-C, which goes to all processes of a terminal; what it has printed."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.finish(code=130, limit_s=120)


def start_command(
    *words: object, cwd: Path = ROOT, env: dict[str, str] | None = None, errors: int = subprocess.STDOUT
) -> Command:
    """Start a command.

    Args:
        words: after `bss-ray`.
        cwd: its working folder.
        env: its environment; that of this process without one.
        errors: where its standard error goes; into its output, or `subprocess.PIPE`.
    """
    env = dict(os.environ) if env is None else env
    paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    return Command(
        subprocess.Popen(
            [sys.executable, "-m", "bss_ray.cli", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            cwd=cwd,
            env={**env, "PYTHONPATH": os.pathsep.join(paths)},
        )
    )


def epochs_of(run: Path | StoragePath) -> list[dict[str, str]]:
    """The epochs of `metrics.csv`, without the clock's columns; none where there is no file."""
    path = run / "metrics.csv"
    rows = list(csv.DictReader(io.StringIO(path.read_text(), newline=""))) if path.exists() else []
    return [{name: value for name, value in row.items() if not name.startswith(CLOCKED)} for row in rows]
