"""A call in a separate process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import cloudpickle

P = ParamSpec("P")
T = TypeVar("T")

_CHILD = """
import pathlib, pickle, sys
function, args, kwargs = pickle.loads(sys.stdin.buffer.read())
pathlib.Path(sys.argv[1]).write_bytes(pickle.dumps(function(*args, **kwargs)))
"""


def in_another_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """`function(*args, **kwargs)` in a fresh interpreter, with another hash seed than this one.

    Arguments and result are pickled; classes and functions of test modules may be among them.

    Raises:
        RuntimeError: The call failed or its process was killed; the error has exit status and traceback.
    """
    # Neither the parent's seed nor a seed that a test run is likely to set.
    environment = {**os.environ, "PYTHONHASHSEED": "20177", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryDirectory(prefix="bss_ray-") as folder:
        result = Path(folder, "result")
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, str(result)],
            input=cloudpickle.dumps((function, args, kwargs)),
            stderr=subprocess.PIPE,
            env=environment,
            check=False,
        )
        if child.returncode != 0:
            raise RuntimeError(
                f"the call in another process failed (exit status {child.returncode}):\n"
                f"{child.stderr.decode(errors='replace')}"
            )
        answer: T = pickle.loads(result.read_bytes())
        return answer
