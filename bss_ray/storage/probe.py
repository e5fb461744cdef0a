"""A check before a run starts: can all nodes of the cluster write to the run's folder, and is it the same folder?

If the path is on each node's own disk, every write succeeds, but the run would end at its first checkpoint, or leave
its files where nobody looks for them.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Mapping

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bss_ray.errors import StorageError
from bss_ray.storage import StoragePath

# Time limit for all nodes together. Starting a process takes seconds; a mount whose server is gone blocks forever.
_LIMIT_S = 120.0
# Seconds until another node sees a file: a network file system may remember for a moment that it did not exist.
_SEEN_S = 5.0

_DRIVER = "driver"
_NOT_SHARED = "does not see what this process ({host}) writes there: the folder is not shared"
_UNSEEN = "writes where this process ({host}) does not see it: the folder is not shared"


def check_storage(folder: StoragePath) -> None:
    """Make every node of the cluster write a file in `folder`, check that all files are visible, and remove them.

    With a single node one write is enough. Nodes that join later are not checked.

    Raises:
        StorageError: A node cannot write, or writes to another folder; the error names all such nodes and the reasons.
    """
    nodes = _alive()
    if len(nodes) == 1:
        folder.check_writable()
        return
    probe = folder / f".probe-{uuid.uuid4().hex}"
    probe.mkdir()
    try:
        (probe / _DRIVER).write_bytes(b"")
        problems = _ask(nodes, probe)
    finally:
        probe.remove()
    if problems:
        rule = f"all {len(nodes)} nodes of the cluster must be able to use {folder}"
        raise StorageError("\n  ".join([f"{rule}:", *problems]) + f"\n{_remedy(folder)}")


def _ask(nodes: list[dict[str, str]], probe: StoragePath) -> list[str]:
    """The problems, with a line for each node that has one."""
    tasks = [_try_out.options(scheduling_strategy=_on(node)).remote(probe, node["NodeID"]) for node in nodes]
    _, late = ray.wait(tasks, num_returns=len(tasks), timeout=_LIMIT_S)
    for task in late:
        ray.cancel(task, force=True)
    still_there = {node["NodeID"] for node in _alive()}  # a node that has left is not a problem of the storage
    problems = []
    for node, task in zip(nodes, tasks, strict=True):
        why = f"has not answered within {_LIMIT_S:g} s" if task in late else _outcome(task, probe / node["NodeID"])
        if why is not None and node["NodeID"] in still_there:
            problems.append(f"{_named(node)} {why}")
    return problems


def _alive() -> list[dict[str, str]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _on(node: Mapping[str, str]) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)


def _named(node: Mapping[str, str]) -> str:
    return f"node {node['NodeManagerAddress']} ({node['NodeManagerHostname']}, id {node['NodeID']})"


def _outcome(task: ray.ObjectRef, file: StoragePath) -> str | None:
    """The problem of a node that has answered, if there is one."""
    try:
        why: str | None = ray.get(task)
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"cannot look: {lines[-1]}"
    if why is None and not _appears(file):
        why = _UNSEEN
    return None if why is None else why.replace("{host}", socket.gethostname())


@ray.remote(num_cpus=0, name="bss_ray.look_at_storage")
def _try_out(probe: StoragePath, name: str) -> str | None:
    """Runs on a node: look for the driver's file and write a file. Returns the problem, if there is one.

    It makes no folder, so nothing of the check stays on a node that has another folder in this place.
    """
    try:
        if not _appears(probe / _DRIVER):
            return _NOT_SHARED
        (probe / name).write_text(name)
    except OSError as error:
        return f"cannot write there: {error.__cause__ or error}"
    return None


def _appears(file: StoragePath) -> bool:
    """Whether a file becomes visible within a moment."""
    until = time.monotonic() + _SEEN_S
    while not (seen := file.exists()) and time.monotonic() < until:
        time.sleep(0.2)
    return seen


def _remedy(folder: StoragePath) -> str:
    if folder.local is None:
        return "Give these nodes access: by the machine's own role, or in the environment that Ray starts in on them"
    return "Mount one file system there on all nodes, or give a URI that all of them reach: --storage_path s3://bucket/runs"
