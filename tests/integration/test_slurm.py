"""`cluster/slurm.sh` inside a Slurm job that stand-ins for `srun` and `scontrol` play on this machine; Ray is real."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.integration,
    pytest.mark.slow,
    pytest.mark.usefixtures("no_ray_session"),
    pytest.mark.timeout(600),
]

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

STAND_INS = {
    # Options away, then the command, here.
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then hostname; else echo "scontrol $*" >>"$SCONTROL_LOG"; fi',
}


def test_a_job_is_stopped_ahead_of_its_limit_and_queued_again(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, script in STAND_INS.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tools / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": str(os.getpid()),  # ports and folders of this test alone
        "SLURM_JOB_NODELIST": "here",
        "SLURM_NNODES": "1",
        "SLURM_CPUS_ON_NODE": "4",
        "SCONTROL_LOG": str(tmp_path / "scontrol"),
    }
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = f"{tools}:{BIN}:{os.environ['PATH']}"
    command = [ROOT / "cluster" / "slurm.sh", "train", "--storage_path", tmp_path, "--name", "run"]
    with (tmp_path / "log").open("w") as log:
        script = subprocess.Popen(
            [*command, "--num_workers", "1", "--loop.epochs", "10000"],
            env=inherited | job | {"PATH": path, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
        )
        deadline = time.monotonic() + 400
        while not list((tmp_path / "run").glob("checkpoint_*")):
            assert script.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.5)
        script.send_signal(signal.SIGUSR1)
        code = script.wait(timeout=150)
    text = (tmp_path / "log").read_text()
    assert code != 0, text
    assert "train stopped ahead of the time limit; queued again" in text
    assert (tmp_path / "scontrol").read_text() == f"scontrol requeue {job['SLURM_JOB_ID']}\n"
    assert not Path(f"/tmp/ray-{job['SLURM_JOB_ID']}").exists()


def test_a_head_that_cannot_start_is_told(tmp_path: Path) -> None:
    """Not after minutes: Ray's clients would try for so long."""
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "scontrol").write_text("#!/bin/sh\nhostname\n")
    for name in ("srun", "scontrol"):
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "here", "SLURM_NNODES": "1"}
    done = subprocess.run(
        [ROOT / "cluster" / "slurm.sh", "train"],
        env=os.environ | job | {"PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "ray start ended on a node; see above why" in done.stderr
