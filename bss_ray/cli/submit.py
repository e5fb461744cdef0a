"""`bss-ray submit`: a command of this project as a job on an existing Ray cluster."""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import itertools
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import yaml

from bss_ray.cli import STOPPED
from bss_ray.errors import ConfigError, SubmitError, first_line, optional_import

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

COMMANDS = ("train", "score", "tune")

# Excluded in addition to the files in .gitignore and those that Ray excludes (.git, .venv, venv, __pycache__).
EXCLUDED = ("/runs/", "/mlruns/", "/wandb/", ".*_cache/", "*.egg-info/", ".hypothesis/")

_DESCRIPTION = """Run a command on a Ray cluster and follow its log; the exit code is that of the command.

The working folder is sent to the cluster, so that YAML files and modules in it are found there, and so is the code
of this project. The cluster needs the packages that the code depends on (or --install).
Runs must be in a folder that all nodes share: --storage_path.

Ctrl-C stops following, not the job. `ray job stop ID` stops it: the command may write a checkpoint first, and resumes
from it when it is submitted again. A token is taken from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token."""


def submit_parser() -> argparse.ArgumentParser:
    """The parser of `bss-ray submit`."""
    parser = argparse.ArgumentParser(
        prog="bss-ray submit",
        usage="bss-ray submit [options] train|score|tune [options of the command]",
        description=_DESCRIPTION,
        epilog="example: bss-ray submit --address http://head:8265 train --config my.yaml --storage_path /shared/runs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=COMMANDS, help="what to run; its options follow it")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.add_argument(
        "--address", metavar="URL", help="of the cluster's dashboard, http://HEAD:8265; else RAY_ADDRESS"
    )
    parser.add_argument("--id", metavar="NAME", help="of the job; else command, run name and time")
    parser.add_argument("--working_dir", metavar="DIR", default=".", help="folder to send; else the current one")
    parser.add_argument("--env", metavar="NAME=VALUE", action="append", default=[], help="environment of all processes")
    parser.add_argument(
        "--install",
        action="store_true",
        help="install this environment's versions of what the project needs on all nodes",
    )
    parser.add_argument(
        "--stop_wait",
        metavar="S",
        type=int,
        default=120,
        help="seconds that a stopped job may take to write a checkpoint",
    )
    parser.add_argument("--no_wait", action="store_true", help="do not follow the log")
    return parser


def submit_command(argv: Sequence[str]) -> int:
    """`bss-ray submit`; returns the exit code of the job, or 130 if it was stopped or is no longer followed."""
    options = submit_parser().parse_args(list(argv))
    working_dir = Path(options.working_dir).resolve()
    settings = given_settings(options.arguments, working_dir)
    check_storage_path(settings.get("storage_path"))
    environment = runtime_env(working_dir, options)
    client = connect(options.address or os.environ.get("RAY_ADDRESS"))
    try:
        job = client.submit_job(
            entrypoint=entrypoint(options.command, options.arguments),
            submission_id=options.id or submission_id(options.command, settings.get("name")),
            runtime_env=environment,
        )
    except (OSError, RuntimeError, ValueError) as error:  # e.g. the id is used, or the folder is too large
        raise SubmitError(f"the cluster did not take the job: {error}") from error
    print(_next_steps(job, client.get_address()), flush=True)
    return 0 if options.no_wait else follow(client, job)


# ---- what is sent -----------------------------------------------------------------------------


def given_settings(arguments: Sequence[str], working_dir: Path) -> dict[str, str]:
    """Name and storage path of the run, from the command's options and `--config` files; later values win.

    Raises:
        ConfigError: A relative `--config` is not in the folder that is sent.
    """
    settings: dict[str, str] = {}
    words = [part for word in arguments for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for option, value in itertools.pairwise(words):
        if option in ("--name", "--storage_path"):
            settings[option.removeprefix("--")] = value
        elif option == "--config":
            settings |= _config(value, working_dir)
    return settings


def _config(value: str, working_dir: Path) -> dict[str, str]:
    path = working_dir / value
    if path.is_file():
        return dict(yaml.safe_load(path.read_text()) or {})
    if Path(value).is_absolute():  # on a file system of the cluster
        return {}
    raise ConfigError(f"--config {value} is looked for in the folder that is sent, and is not in {working_dir}")


def check_storage_path(path: str | None) -> None:
    """Refuse a run folder inside the job's copy of the working folder, which Ray deletes some time after the job.

    Raises:
        ConfigError: The path is relative, or is not given, which means `runs`.
    """
    if path is None or not (urlsplit(path).scheme or path.startswith(("/", "~"))):
        given = "the default runs" if path is None else path
        raise ConfigError(
            "a job's runs must be in a folder that all nodes share, and its working folder is deleted after it; "
            f"storage_path is {given}. Give --storage_path /SHARED/FOLDER or a URI such as s3://bucket/runs"
        )


def runtime_env(working_dir: Path, options: argparse.Namespace) -> dict[str, object]:
    """Ray's runtime environment of the job: files, code, environment and, with `--install`, packages.

    Raises:
        ConfigError: The folder does not exist, or `--env` is not NAME=VALUE.
    """
    if not working_dir.is_dir():
        raise ConfigError(f"--working_dir {working_dir} is no folder")
    given = dict(_variable(text) for text in options.env)
    environment: dict[str, object] = {
        "working_dir": str(working_dir),
        "excludes": list(EXCLUDED),
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(options.stop_wait), **given},
    }
    package = Path(__file__).parents[1]
    modules = [path for path in (package, package.parent / "tune_spaces") if path.is_dir()]
    if package.parent != working_dir:  # else they are in it
        environment["py_modules"] = [str(path) for path in modules]
    if options.install:
        environment["pip"] = requirements()
    return environment


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ConfigError(f"--env takes NAME=VALUE; received {text}")
    return name, value


def requirements() -> list[str]:
    """The dependencies of this project in the versions of this environment, without Ray, which a cluster has."""
    found = importlib.metadata.requires("bss_ray") or []
    plain = [text for text in found if "extra ==" not in text] + ["optuna", "plotly"]
    names = {re.split(r"[^\w.-]", text, maxsplit=1)[0] for text in plain} - {"ray"}
    # A local version (2.13.0+cpu) is not on PyPI, and the nodes may need another build.
    return sorted(f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in names)


def entrypoint(command: str, arguments: Sequence[str]) -> str:
    """The shell command of the job; it runs a module, because a cluster that gets the code by us has no `bss-ray`."""
    return shlex.join(["python", "-m", "bss_ray.cli", command, *arguments])


def submission_id(command: str, name: object) -> str:
    """A descriptive name of the job: train-mine-20260131-120000."""
    words = [command, *([] if name is None else [re.sub(r"[^\w.-]", "-", str(name))]), time.strftime("%Y%m%d-%H%M%S")]
    return "-".join(words)


# ---- the cluster ------------------------------------------------------------------------------


def connect(address: str | None) -> JobSubmissionClient:
    """A client of the cluster's job server, which has answered.

    Raises:
        ConfigError: There is no address.
        SubmitError: No server answers at the address, or the token is wrong or missing.
    """
    if not address:
        raise ConfigError("name the cluster: --address http://HEAD:8265, or RAY_ADDRESS")
    if _token_is_there():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # set before Ray is imported, which reads it once
    submission = optional_import("ray.job_submission", extra="jobs", needed_for="bss-ray submit")
    from ray.exceptions import AuthenticationError, RayError

    try:
        client: JobSubmissionClient = submission.JobSubmissionClient(address)
    except AuthenticationError as error:
        raise SubmitError(
            f"the cluster at {address} wants its token and did not get it ({first_line(error)}). Set RAY_AUTH_TOKEN, "
            "or RAY_AUTH_TOKEN_PATH to a file with it, or copy that file of the head to ~/.ray/auth_token"
        ) from error
    except (RayError, OSError, RuntimeError, ValueError) as error:  # requests' errors are OSErrors
        raise SubmitError(
            f"no Ray job server answers at {address} ({first_line(error)}). It is the address of the dashboard, "
            "http://HEAD:8265 by default; `ray dashboard CLUSTER.yaml` or `kubectl port-forward` bring it here"
        ) from error
    return client


def _token_is_there() -> bool:
    named = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return named or (Path.home() / ".ray" / "auth_token").is_file()


def follow(client: JobSubmissionClient, job: str) -> int:
    """Print a job's log until it ends.

    Returns:
        The exit code of the job's command; 130 if the job was stopped, or Ctrl-C stopped following it.
    """
    try:
        asyncio.run(_print_log(client, job))
        details = _ended(client, job)
    except KeyboardInterrupt:
        print(f"\n{job} continues without being followed", file=sys.stderr)
        return STOPPED
    except (OSError, RuntimeError) as error:
        raise SubmitError(
            f"the connection to {client.get_address()} was lost ({first_line(error)}); {job} may still be running. Ask "
            f"`ray job status {job}`, follow it with `ray job logs --follow {job}`"
        ) from error
    print(f"{job}: {details.status.lower()}", file=sys.stderr)
    if details.status == "STOPPED":
        return STOPPED
    code: int | None = details.driver_exit_code
    if code is None:  # the command did not start
        print(details.message, file=sys.stderr)
        return 1
    return code if code >= 0 else 128 - code  # -N: signal N ended it; a shell returns 128 + N


async def _print_log(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


def _ended(client: JobSubmissionClient, job: str) -> JobDetails:
    """Wait for the job's state, which changes a moment after the end of the log."""
    while not (details := client.get_job_info(job)).status.is_terminal():
        time.sleep(0.5)
    return details


def _next_steps(job: str, address: str) -> str:
    ray = "RAY_AUTH_MODE=token ray" if os.environ.get("RAY_AUTH_MODE") == "token" else "ray"
    return (
        f"submitted {job} to {address}\n"
        f"  follow it   {ray} job logs --follow {job} --address {address}\n"
        f"  stop it     {ray} job stop {job} --address {address}\n"
        f"  ctrl-C here ends the following alone"
    )
