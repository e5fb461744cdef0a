"""`cluster/submit.sh` against a cluster that was started by itself, with a token."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("no_ray_session"), pytest.mark.timeout(600)]

SUBMIT = Path(__file__).parents[2] / "cluster" / "submit.sh"
BIN = Path(sys.executable).parent
START_S = 120  # of the cluster; the machine may be busy
JOB_S = 400

MODEL = """
from bss_ray.models import LateFusion

class Mine(LateFusion):
    pass
"""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@dataclass(frozen=True)
class Cluster:
    """A head with its job server, and how a client reaches it."""

    address: str
    env: dict[str, str]

    def submit(self, *words: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        """Start `cluster/submit.sh` in a folder."""
        return subprocess.Popen(
            [SUBMIT, "--address", self.address, *words],
            cwd=cwd,
            env=self.env | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def status(self, job: str) -> str:
        """What the cluster says of a job, through Ray's own client."""
        command = [
            sys.executable,
            "-c",
            "import sys; from ray.job_submission import JobSubmissionClient as C;"
            "print(C(sys.argv[1]).get_job_status(sys.argv[2]).value)",
            self.address,
            job,
        ]
        return subprocess.run(command, env=self.env, check=True, capture_output=True, text=True).stdout.strip()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output."""
    output, _ = process.communicate(timeout=JOB_S)
    return process.returncode, output


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """`ray start --head`, as on a machine of somebody else: nothing of this project in its environment."""
    folder = Path(tempfile.mkdtemp(prefix="bss"))  # Ray's sockets want short paths
    (folder / "token").write_text("0123456789abcdef" * 4)
    inherited = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
    env = inherited | {
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    gcs, dashboard, agent, client = free_ports(4)
    ports = [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    ports.append(f"--ray-client-server-port={client}")
    options = [
        f"--temp-dir={folder}",
        "--node-ip-address=127.0.0.1",
        "--num-cpus=6",
        "--disable-usage-stats",
        "--block",
    ]
    with (folder / "log").open("w") as log:
        head = subprocess.Popen(
            [BIN / "ray", "start", "--head", *ports, *options], cwd=folder, env=env, stdout=log, stderr=log
        )
        try:
            _await_job_server(head, dashboard, folder / "log")
            yield Cluster(f"http://127.0.0.1:{dashboard}", env)
        finally:
            head.send_signal(signal.SIGTERM)
            head.wait(timeout=60)


def _await_job_server(head: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        assert head.poll() is None, log.read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder: settings, a model of their own, and results that must not be sent."""
    folder = tmp_path / "project"
    (folder / "runs").mkdir(parents=True)
    (folder / "my_model.py").write_text(MODEL)
    settings: dict[str, Any] = {
        "name": "mine",
        "storage_path": str(tmp_path / "shared"),
        "model": {"class_path": "my_model.Mine"},
        "loop": {"epochs": 1},
        "num_workers": 1,
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_a_job_runs_to_its_end(cluster: Cluster, project: Path, tmp_path: Path) -> None:
    code, output = ended(cluster.submit("train", "--config", "my.yaml", cwd=project))
    assert code == 0, output
    assert "submitted train-mine-" in output
    assert "val fused" in output  # the job's own log
    assert "succeeded" in output
    result = json.loads((tmp_path / "shared" / "mine" / "result.json").read_text())
    assert result["test"]["test_accuracy_fused"] > 0.1


def test_the_exit_code_is_passed_on(cluster: Cluster, project: Path) -> None:
    code, output = ended(cluster.submit("train", "--config", "my.yaml", "--loop.epoch", "2", cwd=project))
    assert code == 2, output
    assert "Did you mean" in output


def test_ctrl_c_leaves_the_job_and_stop_ends_it(cluster: Cluster, project: Path) -> None:
    words = ["--id", "long", "train", "--config", "my.yaml", "--name", "long", "--loop.epochs", "10000"]
    followed = cluster.submit(*words, cwd=project)
    assert followed.stdout is not None
    for line in followed.stdout:
        if line.split()[:2] == ["0", "2156"]:  # the first epoch
            break
    followed.send_signal(signal.SIGINT)
    code, output = ended(followed)
    assert code == 130, output
    assert "long continues without being followed" in output
    assert cluster.status("long") == "RUNNING"

    stop = [BIN / "ray", "job", "stop", "long", "--address", cluster.address]
    subprocess.run(stop, env=cluster.env, check=True, capture_output=True, timeout=JOB_S)
    assert cluster.status("long") == "STOPPED"


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"RAY_AUTH_TOKEN": "f" * 64}, "Forbidden: Invalid authentication token"),
        ({"RAY_AUTH_MODE": "disabled"}, "Unauthorized: Missing authentication token"),
    ],
)
def test_a_wrong_or_missing_token_is_told(cluster: Cluster, project: Path, env: dict[str, str], told: str) -> None:
    code, output = ended(cluster.submit("train", "--config", "my.yaml", cwd=project, env=env))
    assert code == 1
    assert "wants its token and did not get it" in output
    assert told in output
    assert "Traceback" not in output


def test_nobody_at_the_address(cluster: Cluster, project: Path) -> None:
    [port] = free_ports(1)
    code, output = ended(
        cluster.submit("--address", f"http://127.0.0.1:{port}", "train", "--config", "my.yaml", cwd=project)
    )
    assert code == 1
    assert f"no Ray job server answers at http://127.0.0.1:{port}" in output
    assert "Traceback" not in output
