"""The examples run as they stand."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.hosts import Cluster

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, folder: Path, env: dict[str, str] | None = None) -> str:
    command = [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_plain_torch(tmp_path: Path) -> None:
    lines = run("plain_torch.py", tmp_path).splitlines()
    assert lines[0].startswith("epoch 0: 1000 rows")
    assert lines[-1].startswith("epoch 4: 700 rows")


@pytest.mark.integration
def test_custom_loop(two_nodes: Cluster, tmp_path: Path) -> None:
    out = run("custom_loop.py", tmp_path, two_nodes.env)
    assert "'epoch': 2" in out
    assert "'rows': 480" in out
    assert "'score_version': 2" in out
