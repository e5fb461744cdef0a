"""What runs in a cluster, and what a run must not leave behind: living actors and placement groups."""

from __future__ import annotations

import time

import ray
from ray._private.state import actors
from ray.util import placement_group_table

# Ray Data keeps these for all its later executions.
RAY_DATA = {"_StatsActor", "_AutoscalingCoordinatorActor", "_UsageCollectionActor", "DatasetManager"}


def leftovers() -> list[str]:
    """Living actors (class and name) and placement groups of the cluster."""
    living = [
        f"{actor['ActorClassName']} {actor['Name']}"
        for actor in actors().values()
        if actor["State"] != "DEAD" and actor["ActorClassName"] not in RAY_DATA
    ]
    groups = [table for table in placement_group_table().values() if table["state"] != "REMOVED"]
    return living + [f"placement group {table['placement_group_id']} {table['state']}" for table in groups]


def left_after(seconds: float = 30.0) -> list[str]:
    """What is still there after so many seconds; returns as soon as nothing is."""
    deadline = time.monotonic() + seconds
    while (left := leftovers()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def actors_off_the_head() -> set[str]:
    """Classes of living actors on other nodes than the head's."""
    head = next(node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"])
    return {
        actor["ActorClassName"]
        for actor in actors().values()
        if actor["State"] == "ALIVE" and actor["Address"]["NodeID"] != head
    }


def address() -> str:
    """Of the cluster that this process is connected to, for another driver."""
    return str(ray.get_runtime_context().gcs_address)
