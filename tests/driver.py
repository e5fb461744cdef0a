"""Drivers in processes of their own: `python -m tests.driver FOLDER` runs the call that is pickled there.

A cluster with a token of its own, or in a network namespace, cannot be reached from the process of pytest; and a driver
that is killed cannot be it.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import ray
import ray.data

from tests.processes import start


@dataclass
class Driver:
    """A call that runs in a process of its own.

    Attributes:
        process: the driver.
        folder: with the call, the answer, and what was printed.
    """

    process: subprocess.Popen[bytes]
    folder: Path

    def result(self, timeout_s: float) -> Any:
        """What the call returned.

        Raises:
            TimeoutError: it has not ended yet; it is killed.
            Exception: what the call raised.
        """
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise TimeoutError(f"the driver did not end within {timeout_s:g} s:\n{self.log}") from None
        answer = self.folder / "answer"
        if not answer.exists():
            raise RuntimeError(f"the driver has ended without an answer (exit status {status}):\n{self.log}")
        done, value = pickle.loads(answer.read_bytes())
        if not done:
            raise value
        return value

    @property
    def log(self) -> str:
        """What it has printed."""
        return (self.folder / "log").read_text()


def start_driver(
    folder: Path, env: dict[str, str], enter: list[str], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Driver:
    """Begin a call in the cluster of RAY_ADDRESS in `env`.

    Args:
        folder: a sub-folder of it is the driver's.
        env: the driver's environment.
        enter: command that runs another one where the driver is to be; none for here.
        function: what is called. It is pickled, as its arguments are.
    """
    own = Path(tempfile.mkdtemp(prefix="driver-", dir=folder))
    (own / "call").write_bytes(cloudpickle.dumps((function, args, kwargs)))
    return Driver(start([*enter, sys.executable, "-m", "tests.driver", str(own)], own / "log", env), own)


def main(folder: Path) -> None:
    """Run `call`; its result, or its exception, goes to `answer`."""
    function, args, kwargs = pickle.loads((folder / "call").read_bytes())
    ray.init(log_to_driver=False, logging_level="error")
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        answer = True, function(*args, **kwargs)
    except BaseException as error:  # a failure of pytest's is no Exception
        answer = False, error
    (folder / "answer").write_bytes(cloudpickle.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
