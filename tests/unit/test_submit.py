"""What `bss-ray submit` sends, and what it makes of a job's end. The rest is in tests/integration/test_submit.py."""

import importlib.metadata
import re
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from bss_ray.cli import main
from bss_ray.cli.submit import (
    check_storage_path,
    entrypoint,
    follow,
    given_settings,
    requirements,
    runtime_env,
    submission_id,
    submit_parser,
)
from bss_ray.errors import ConfigError, SubmitError


def test_the_last_of_name_and_path_counts(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("{name: from-file, storage_path: /a, seed: 1}")
    arguments = ["--name=early", "--config", "my.yaml", "--storage_path", "s3://bucket/runs", "--verbose", "true"]
    settings = given_settings(arguments, tmp_path)
    assert settings["name"] == "from-file"
    assert settings["storage_path"] == "s3://bucket/runs"


def test_a_config_must_be_in_what_is_sent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config my.yaml is looked for in the folder that is sent, and is not in"):
        given_settings(["--config", "my.yaml"], tmp_path)
    assert given_settings(["--config", "/cluster/my.yaml"], tmp_path) == {}


@pytest.mark.parametrize("path", ["/shared/runs", "s3://bucket/runs", "~/runs"])
def test_a_storage_path_outlives_the_job(path: str) -> None:
    check_storage_path(path)


@pytest.mark.parametrize(("path", "told"), [(None, "the default runs"), ("my/runs", "my/runs")])
def test_a_relative_storage_path_is_refused(path: str | None, told: str) -> None:
    with pytest.raises(ConfigError, match=f"storage_path is {told}. Give --storage_path /SHARED/FOLDER"):
        check_storage_path(path)


def options(*words: str) -> Any:
    return submit_parser().parse_args([*words, "train", "--name", "mine"])


def test_code_is_sent_beside_a_folder_that_lacks_it(tmp_path: Path) -> None:
    sent = runtime_env(tmp_path, options("--env", "NCCL_SOCKET_IFNAME=eth1", "--stop_wait", "30"))
    assert sent["working_dir"] == str(tmp_path)
    assert [Path(module).name for module in sent["py_modules"]] == ["bss_ray", "tune_spaces"]
    assert sent["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "30", "NCCL_SOCKET_IFNAME": "eth1"}
    assert "pip" not in sent


def test_the_repository_brings_its_code_itself() -> None:
    assert "py_modules" not in runtime_env(Path(__file__).parents[2], options())


def test_wrong_options(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--env takes NAME=VALUE; received NCCL_DEBUG"):
        runtime_env(tmp_path, options("--env", "NCCL_DEBUG"))
    with pytest.raises(ConfigError, match="is no folder"):
        runtime_env(tmp_path / "nowhere", options())


def test_packages_that_are_installed_have_the_versions_of_here() -> None:
    pinned = dict(text.split("==") for text in requirements())
    assert {"torch", "jsonargparse", "torchmetrics", "optuna", "plotly"} <= set(pinned)
    assert "ray" not in pinned  # a job cannot change the cluster's
    assert pinned["torch"] == importlib.metadata.version("torch").partition("+")[0]


def test_the_entry_point_is_a_shell_command() -> None:
    assert entrypoint("train", ["--columns.modalities", "[audio, image]"]) == (
        "python -m bss_ray.cli train --columns.modalities '[audio, image]'"
    )


def test_a_job_says_what_it_is() -> None:
    assert re.fullmatch(r"train-my-run-\d{8}-\d{6}", submission_id("train", "my run"))
    assert re.fullmatch(r"tune-\d{8}-\d{6}", submission_id("tune", None))


class Client:
    """A cluster that has one job."""

    def __init__(self, status: JobStatus, code: int | None, error: Exception | None = None) -> None:
        self.details = SimpleNamespace(status=status, driver_exit_code=code, message="no such command")
        self.error = error

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield f"log of {job}\n"
        if self.error is not None:
            raise self.error

    def get_job_info(self, job: str) -> Any:
        return self.details

    def get_address(self) -> str:
        return "http://head:8265"


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.FAILED, None, 1),
        (JobStatus.STOPPED, None, 130),
    ],
)
def test_the_exit_code_is_that_of_the_job(
    status: JobStatus, code: int | None, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    client: Any = Client(status, code)
    assert follow(client, "mine") == expected
    printed = capsys.readouterr()
    assert printed.out == "log of mine\n"
    assert f"mine: {status.lower()}" in printed.err


def test_ctrl_c_leaves_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    client: Any = Client(JobStatus.RUNNING, None, KeyboardInterrupt())
    assert follow(client, "mine") == 130
    assert "mine continues without being followed" in capsys.readouterr().err


def test_a_lost_connection_is_told() -> None:
    client: Any = Client(JobStatus.RUNNING, None, RuntimeError("WebSocket connection closed"))
    with pytest.raises(SubmitError, match=r"was lost \(WebSocket connection closed\); mine may still be running"):
        follow(client, "mine")


def test_no_address(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main(["submit", "train", "--storage-path", "/shared/runs"]) == 1
    assert "name the cluster: --address http://HEAD:8265, or RAY_ADDRESS" in capsys.readouterr().err
