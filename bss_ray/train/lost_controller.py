"""What Ray Train's controller leaves behind when it is killed: the placement group of the ranks.

Ray keeps it, and the CPUs in it, until the driver's job ends, and the next ranks may wait for these. Ray Train starts a
detached actor that removes it; but that asks the dashboard whether the controller lives, so without a dashboard it does
nothing, and stays in the cluster for ever. A run of ours has no such actor (`RankTrainer`). This needs nothing but
Ray's tables of actors and placement groups.
"""

from __future__ import annotations

import time

import ray
from ray._private.state import state as ray_state
from ray.core.generated import gcs_pb2
from ray.util.placement_group import PlacementGroup, remove_placement_group

CONTROLLER = "TrainController"  # Ray Train's class


def free_lost_groups() -> int:
    """Remove the placement groups of this job that have lost their Ray Train controller; how many there were."""
    tables, freed = ray_state._connect_and_get_accessor(), 0
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    for entry in tables.get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(entry)
        if group.creator_job_id != job.binary() or group.state == group.REMOVED or not group.creator_actor_dead:
            continue
        creator = tables.get_actor_info(ray.ActorID(group.creator_actor_id))
        if creator is not None and gcs_pb2.ActorTableData.FromString(creator).class_name == CONTROLLER:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
            freed += 1
    return freed


def free_when_told(limit_s: float = 10.0) -> None:
    """`free_lost_groups` as soon as Ray's tables know of the loss; one that was starting had no group yet."""
    end = time.monotonic() + limit_s
    while not free_lost_groups() and time.monotonic() < end:
        time.sleep(0.1)
