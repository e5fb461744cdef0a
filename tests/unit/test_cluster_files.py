"""The files in `cluster/`, checked by the tools that read them or by those tools' own schemas."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray.autoscaler._private.util as autoscaler
import yaml
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.scripts.scripts import drain_node

from bss_ray.cli.score import score_parser
from bss_ray.cli.tune import tune_parser
from bss_ray.train.settings import train_parser
from tests.kubernetes import faults, pod_specs

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
LAUNCHERS = sorted((CLUSTER / "launcher").glob("*.yaml"))
SCRIPTS = sorted(CLUSTER.rglob("*.sh"))
SCHEMAS = ROOT.parent / "shared" / "data" / "kuberay"  # of the operator; too large to be kept here

# ---- Ray's launcher ---------------------------------------------------------------------------


def prepared(path: Path) -> dict[str, Any]:
    """A launcher file as `ray up` takes it: Ray's defaults filled in, and Ray's own checks passed."""
    config = autoscaler.prepare_config(yaml.safe_load(path.read_text()))
    autoscaler.validate_config(config)
    return config


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_ray_takes_the_launcher_file(path: Path) -> None:
    prepared(path)


def test_ray_refuses_a_misspelt_launcher_field(tmp_path: Path) -> None:
    text = LAUNCHERS[0].read_text().replace("idle_timeout_minutes", "idle_timeout_minute")
    (tmp_path / "misspelt.yaml").write_text(text)
    with pytest.raises(Exception, match="idle_timeout_minute"):
        prepared(tmp_path / "misspelt.yaml")


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_launched_nodes(name: str) -> None:
    types = prepared(CLUSTER / "launcher" / f"{name}.yaml")["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["head"]["max_workers"] == 0
    assert types["gpu"]["labels"] == {"ray.io/market-type": "on-demand"}
    assert types["gpu_spot"]["labels"] == {"ray.io/market-type": "spot"}
    assert types["gpu_spot"]["priority"] > types["gpu"].get("priority", 0)
    for node_type in types.values():
        validate_node_label_syntax(node_type.get("labels", {}))
    assert _is_spot(types["gpu_spot"])
    assert not _is_spot(types["gpu"])
    assert not _is_spot(types["head"])


def _is_spot(node_type: dict[str, Any]) -> bool:
    config = node_type["node_config"]
    market = config.get("InstanceMarketOptions", {}).get("MarketType")
    return "spot" in (market, config.get("scheduling", {}).get("provisioningModel", "").lower())


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_a_launcher_file_sends_what_its_commands_use(path: Path) -> None:
    config = prepared(path)
    mounts = config["file_mounts"]
    assert mounts["~/.ray/auth_token"] == "~/.ray/auth_token"
    for remote, local in mounts.items():
        if remote != "~/.ray/auth_token":
            assert (ROOT / local).exists(), local
    # What an installation needs of the repository: the build reads these.
    sent = {remote.removeprefix("~/bss_ray/") for remote in mounts}
    assert {"pyproject.toml", "README.md", "LICENSE", "constraints.txt", "bss_ray", "tune_spaces"} <= sent
    commands = [
        *config["head_setup_commands"],
        *config["worker_setup_commands"],
        *config["head_start_ray_commands"],
        *config["worker_start_ray_commands"],
    ]
    for command in commands:
        for used in re.findall(r"~/(spot-notice\.sh|bss_ray/constraints\.txt)", command):
            assert f"~/{used}" in mounts
        if "ray start" in command:
            assert "RAY_AUTH_MODE=token" in command
            assert "RAY_grpc_keepalive_timeout_ms=120000 ray start" in command
        assert subprocess.run(["bash", "-n", "-c", command], capture_output=True).returncode == 0, command


# ---- KubeRay ----------------------------------------------------------------------------------


def manifest(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((CLUSTER / "kuberay" / f"{name}.yaml").read_text())
    return content


def operator_schema(name: str) -> dict[str, Any]:
    path = SCHEMAS / f"{name}.v1.schema.json"
    if not path.exists():
        pytest.skip(f"the operator's schemas are not beside this checkout: {SCHEMAS}")
    schema: dict[str, Any] = json.loads(path.read_text())
    return schema


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_the_operator_takes_the_manifest(name: str) -> None:
    assert faults(manifest(name), operator_schema(name)) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "submissionMod"), "K8sJobMode", "'submissionMod' was unexpected"),
        (("spec", "backoffLimit"), "2", "'2' is not of type 'integer'"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens", "'tokens' is not one of"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 1, "template", "spec", "nodeSelectors"), {}, "'nodeSelectors'"),
        (
            ("spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "containers", 0, "resource"),
            {},
            "'resource'",
        ),
    ],
)
def test_a_wrong_field_is_found(path: tuple[Any, ...], value: Any, message: str) -> None:
    wrong: Any = copy.deepcopy(manifest("rayjob"))
    place = wrong
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    [fault] = faults(wrong, operator_schema("rayjob"))
    assert message in fault


def cluster_specs() -> dict[str, dict[str, Any]]:
    return {"raycluster": manifest("raycluster")["spec"], "rayjob": manifest("rayjob")["spec"]["rayClusterSpec"]}


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_what_the_autoscaler_makes_of_the_manifest(name: str) -> None:
    cluster = {"metadata": {"name": "bss-ray", "namespace": "default"}, "spec": cluster_specs()[name]}
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert types.pop("headgroup")["resources"]["CPU"] == 0
    assert {name: kind["labels"]["ray.io/market-type"] for name, kind in types.items()} == {
        "gpu": "on-demand",
        "gpu-spot": "spot",
    }
    assert types["gpu-spot"]["priority"] > types["gpu"].get("priority", 0)
    for kind in types.values():
        assert kind["resources"] == {"CPU": 8, "GPU": 1, "memory": 32 * 2**30}


def test_both_manifests_have_the_same_cluster() -> None:
    clusters = cluster_specs()
    assert clusters["raycluster"] == clusters["rayjob"]


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_pods(name: str) -> None:
    """What the structural schema cannot say: references within the manifest, and to the volume claim."""
    claim = manifest("storage")
    for pod in pod_specs(manifest(name)):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
            assert container["resources"]["requests"] == container["resources"]["limits"]
            drain = {entry["name"]: entry["value"] for entry in container.get("env", [])}
            if "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" in drain:
                assert int(drain["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) < pod["terminationGracePeriodSeconds"]


def test_volume_claim() -> None:
    claim = manifest("storage")
    assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
    assert set(claim) == {"apiVersion", "kind", "metadata", "spec"}
    assert set(claim["spec"]) == {"accessModes", "storageClassName", "resources"}
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert re.fullmatch(r"\d+[GT]i", claim["spec"]["resources"]["requests"]["storage"])


def test_a_stopped_job_has_time_for_a_checkpoint() -> None:
    runtime_env = yaml.safe_load(manifest("rayjob")["spec"]["runtimeEnvYAML"])
    assert int(runtime_env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


# ---- scripts and image ------------------------------------------------------------------------


def tool(name: str) -> str:
    """A linter of the development requirements, from this environment."""
    path = shutil.which(name, path=sysconfig.get_path("scripts"))
    assert path is not None, f"{name} is not installed: make setup"
    return path


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts(path: Path) -> None:
    done = subprocess.run([tool("shellcheck"), path], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


def test_dockerfile() -> None:
    done = subprocess.run([tool("hadolint"), CLUSTER / "Dockerfile"], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


@pytest.mark.parametrize("name", ["Dockerfile", "slurm.sh"])
def test_servers_are_patient(name: str) -> None:
    """As those of the launcher files; the manifests have the image's environment."""
    assert "RAY_grpc_keepalive_timeout_ms=120000" in (CLUSTER / name).read_text()


def test_the_image_has_what_the_build_copies() -> None:
    allowed = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    for line in (CLUSTER / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in allowed, source


class _Metadata(BaseHTTPRequestHandler):
    """A cloud's metadata service that announces, at the third question, that it takes the node back."""

    asked = 0

    def do_PUT(self) -> None:
        self._answer(200, "a token")

    def do_GET(self) -> None:
        type(self).asked += 1
        taken = self.asked >= 3
        if self.path.endswith("/spot/instance-action"):
            assert self.headers["X-aws-ec2-metadata-token"] == "a token"
            self._answer(200 if taken else 404, '{"action": "terminate"}')
        else:
            assert self.path == "/computeMetadata/v1/instance/preempted"
            assert self.headers["Metadata-Flavor"] == "Google"
            self._answer(200, "TRUE" if taken else "FALSE")

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_spot_node_is_drained_when_its_cloud_announces_it(cloud: str, tmp_path: Path) -> None:
    """`ray` is a stand-in that writes down its arguments; `ray drain-node` itself must know them."""
    (tmp_path / "ray").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "ray").chmod(0o755)
    service = type("Service", (_Metadata,), {"asked": 0})
    with HTTPServer(("127.0.0.1", 0), service) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run(
            [CLUSTER / "launcher" / "spot-notice.sh", cloud],
            env={
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "SPOT_METADATA_URL": f"http://127.0.0.1:{server.server_port}",
                "SPOT_POLL_S": "0.05",
            },
            capture_output=True,
            text=True,
            timeout=60,
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    assert service.asked == 3
    command, *arguments = done.stdout.splitlines()
    assert command == "drain-node"
    options = drain_node.make_context("drain-node", arguments).params
    assert options["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert options["deadline_remaining_seconds"] == {"aws": 110, "gcp": 25}[cloud]


# ---- what the files say of this project -------------------------------------------------------


def test_versions_agree() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {spec["rayVersion"] for spec in cluster_specs().values()} == {pinned["ray"]}
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    text = "\n".join(path.read_text() for path in CLUSTER.rglob("*") if path.is_file())
    assert set(re.findall(r"/bss-ray:(\S+)", text)) == {version[1]}
    assert set(re.findall(r"\bRay (\d\.\d+)", text)) <= {pinned["ray"].rpartition(".")[0]}


PARSERS = {
    "train": train_parser,
    "score": lambda argv: score_parser(),
    "tune": tune_parser,
}


def commands() -> list[tuple[str, str]]:
    """Every `bss-ray`, `submit.sh` and `sbatch` command in the files, with the name of its file."""
    found = []
    for path in sorted(path for path in CLUSTER.rglob("*") if path.is_file()):
        text = re.sub(r"\\\n#? *", "", path.read_text())  # of comments, too
        pattern = r"(?:bss-ray |submit\.sh [^\n`]*?|slurm\.sh )\b((?:train|score|tune) --[^\n`#|]*)"
        found += [(path.name, command.strip()) for command in re.findall(pattern, text)]
    return found


def test_commands_are_found() -> None:
    assert {name for name, _ in commands()} >= {"aws.yaml", "rayjob.yaml", "slurm.sh"}


@pytest.mark.parametrize(("name", "command"), commands())
def test_options_exist(name: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("{}")
    kind, *argv = command.split()
    PARSERS[kind](argv).parse_args(argv)  # exits where an option is unknown


def test_this_python_runs_what_the_image_runs() -> None:
    image = re.search(r"^FROM python:(\d+)\.(\d+)", (CLUSTER / "Dockerfile").read_text(), re.MULTILINE)
    assert image is not None
    assert sys.version_info[:2] >= (int(image[1]), int(image[2]))
