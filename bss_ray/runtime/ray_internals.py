"""Everything of Ray that is not public (names, tables, methods), behind functions of this project's own.

Ray may change any of it without notice. So no other file of `bss_ray/` uses such a name, which a test checks, and each
part is checked as a whole when it is loaded: the core when this module is imported, Ray Train's part by
`train_parts()`, which every run calls before anything is started. It is loaded late since Ray Train takes a second to
import, and holders, the coordinator and scorers do without.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bss_ray.errors import RayVersionError

if TYPE_CHECKING:
    import ray.data
    import ray.train.torch
    import ray.tune
    from ray.actor import ActorHandle
    from ray.data._internal.execution.interfaces import RefBundle
    from ray.data.block import Block, BlockAccessor

# The versions of Ray that the tests run with.
TESTED = "2.60.*"

# The label selector of each rank.
Selectors = list[dict[str, str]]

# Ray Train's class.
CONTROLLER = "TrainController"


@contextlib.contextmanager
def _names_of_ray() -> Iterator[None]:
    """Around the use of names that may be gone.

    Raises:
        RayVersionError: names the installed version, what is gone, and the remedy.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise RayVersionError(
            f"bss_ray does not work with the installed Ray {ray.__version__}: {error}. Install a version that it is "
            f"tested with (pip install 'ray[train,data,tune]=={TESTED}'), or a newer bss_ray"
        ) from error


with _names_of_ray():
    from ray._private import parameter as _parameter
    from ray._private import services as _services
    from ray._private import worker as _worker
    from ray._private.label_utils import validate_label_selector
    from ray._private.node import Node
    from ray._private.state import state as _state
    from ray._raylet import GlobalStateAccessor  # type: ignore[attr-defined]  # Ray ships no types
    from ray.core.generated import gcs_pb2

    _ = (
        *(_worker._global_node, Node.is_head, _services.start_api_server),
        *(_state.available_resources_per_node, _state.get_cluster_config, _state.get_draining_nodes),
        _state._connect_and_get_accessor,
        *(GlobalStateAccessor.get_actor_info, GlobalStateAccessor.get_actor_table),
        *(GlobalStateAccessor.get_placement_group_table, ray.experimental.get_object_locations),
        *(gcs_pb2.ActorTableData.FromString, gcs_pb2.PlacementGroupTableData.FromString),
    )
    if not {"no_monitor", "include_log_monitor"} <= inspect.signature(_parameter.RayParams).parameters.keys():
        raise AttributeError("RayParams has no argument no_monitor or include_log_monitor")
    if "_spill_on_unavailable" not in inspect.signature(NodeAffinitySchedulingStrategy).parameters:
        raise AttributeError("NodeAffinitySchedulingStrategy has no argument _spill_on_unavailable")


# ---- the core: nodes, actors, placement groups, objects ---------------------------------------


@contextlib.contextmanager
def without_helpers(*, logs: bool) -> Iterator[None]:
    """Have `ray.init` start Ray's servers and workers, but no process that only watches them.

    Such processes are the autoscaler's monitor, which has nothing to scale; the server of the dashboard, which without
    a dashboard only reports the use of Ray, and for which `ray.init` waits; and the monitor of logs.

    Args:
        logs: Whether to start the monitor of logs, which brings what other processes print to this process.
    """
    settings = functools.partial(_parameter.RayParams, no_monitor=True, include_log_monitor=logs)
    no_server = mock.Mock(return_value=("", None))  # there is neither an address nor a process
    with (
        mock.patch.object(_parameter, "RayParams", settings),
        mock.patch.object(_services, "start_api_server", no_server),
    ):
        yield


def label_problem(selector: Mapping[str, str]) -> str | None:
    """The error in the syntax of a label selector, if there is one."""
    problem: str | None = validate_label_selector(dict(selector))
    return problem


def near_node(node: str) -> NodeAffinitySchedulingStrategy:
    """The strategy of an actor that starts on a node if the node exists and has room, and otherwise elsewhere."""
    # Without the spilling it would wait forever for a node that others have filled.
    return NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)


def is_alone() -> bool:
    """Whether this process has started Ray, and the cluster has no other node than its own.

    Nobody adds nodes to such a cluster or takes them away, so a run there needs nothing that Ray starts for that.
    """
    node = _worker._global_node
    return node is not None and node.is_head() and sum(entry["Alive"] for entry in ray.nodes()) == 1


class NodeGroup(NamedTuple):
    """A kind of nodes that the cluster's autoscaler may add.

    Attributes:
        name: Name of the kind, which its nodes have as a label.
        resources: Resources of each node.
        max_count: Largest number of nodes; -1 is without limit.
    """

    name: str
    resources: dict[str, float]
    max_count: int


def node_groups() -> list[NodeGroup]:
    """Kinds of nodes of the cluster's autoscaler, if it tells Ray its limits."""
    config = _state.get_cluster_config() if ray.is_initialized() else None
    groups = [] if config is None else config.node_group_configs
    return [NodeGroup(group.name, dict(group.resources), group.max_count) for group in groups]


def free_resources() -> dict[str, dict[str, float]]:
    """Resources of each node that nobody uses at the moment, by the node's id."""
    free: dict[str, dict[str, float]] = _state.available_resources_per_node()
    return free


def draining_nodes() -> set[str]:
    """Ids of the nodes that will be taken away, on which Ray starts nothing."""
    return set(_state.get_draining_nodes())


@dataclass(frozen=True)
class Actor:
    """An actor of this job that is not dead.

    Attributes:
        name: Name of the actor; empty if it has none.
        class_name: Name of its class.
        node: Id of its node; empty while it waits for one.
        takes: Resources of the actor.
        alive: Whether it has started.
        owner: Id of the process that has started it.
    """

    name: str
    class_name: str
    node: str
    takes: dict[str, float]
    alive: bool
    owner: str


def actors() -> list[Actor]:
    """This job's actors that are not dead, from Ray's table: one call, and no actor is asked."""
    entries = map(gcs_pb2.ActorTableData.FromString, _state._connect_and_get_accessor().get_actor_table(_job(), None))
    return [
        Actor(
            name=entry.name,
            class_name=entry.class_name,
            node=entry.node_id.hex(),
            takes=dict(entry.required_resources),
            alive=entry.state == entry.ALIVE,
            owner=entry.owner_address.worker_id.hex(),
        )
        for entry in entries
        if entry.state != entry.DEAD
    ]


def orphaned_placement_groups() -> list[PlacementGroup]:
    """Placement groups of this job whose Ray Train controller is dead."""
    tables, job, found = _state._connect_and_get_accessor(), _job().binary(), []
    for entry in tables.get_placement_group_table():
        group = gcs_pb2.PlacementGroupTableData.FromString(entry)
        if group.creator_job_id != job or group.state == group.REMOVED or not group.creator_actor_dead:
            continue
        creator = tables.get_actor_info(ray.ActorID(group.creator_actor_id))
        if creator is not None and gcs_pb2.ActorTableData.FromString(creator).class_name == CONTROLLER:
            found.append(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
    return found


def _job() -> ray.JobID:
    return ray.JobID.from_hex(ray.get_runtime_context().get_job_id())


def object_nodes(references: Sequence[ray.ObjectRef]) -> list[set[str] | None]:
    """Ids of the nodes that hold a copy of each object; None where Ray does not know the object."""
    found = ray.experimental.get_object_locations(list(references))
    return [set(found[reference]["node_ids"]) if reference in found else None for reference in references]


def run_in_actor(actor: ActorHandle, function: Callable[[object], object]) -> ray.ObjectRef:
    """Call a function in an actor's process, with the actor's object; for tests."""
    return actor.__ray_call__.remote(function)


# ---- Ray Data ---------------------------------------------------------------------------------


def ref_bundles(dataset: ray.data.Dataset) -> Iterator[RefBundle]:
    """References to the blocks of a dataset, as the blocks are made, without moving them."""
    with _names_of_ray():
        bundles = dataset.iter_internal_ref_bundles
    # A generator, since already the call waits for the first bundle.
    yield from bundles()


def block_accessor(block: Block) -> BlockAccessor:
    """An accessor of a block of any kind."""
    with _names_of_ray():
        from ray.data.block import BlockAccessor
    return BlockAccessor.for_block(block)


# ---- Ray Train --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainParts:
    """Functions for which Ray Train has no public interface.

    Attributes:
        fixed_policy: Makes Ray Train's policy for a fixed number of ranks, but asks no autoscaler for their nodes: Ray
            starts an actor to ask.
        scaling_policy: Makes Ray Train's policy for elastic ranks, with a function that corrects the number of ranks
            that Ray takes for possible.
        before_start: Makes a callback that calls a function in the controller, before it reserves anything for the
            ranks of an attempt. The function is given the label selector of each rank, and may change it;
            None for TPUs.
        trainer: A `TorchTrainer` with an argument `policy`, a scaling policy or None.
        controller: Returns the handle of the controller, in a rank.
    """

    fixed_policy: Callable[[ray.train.ScalingConfig], object]
    scaling_policy: Callable[[ray.train.ScalingConfig, Callable[[int], int]], object]
    before_start: Callable[[Callable[[Selectors | None], None]], object]
    trainer: type[ray.train.torch.TorchTrainer]
    controller: Callable[[], ActorHandle]


@functools.cache
def train_parts() -> TrainParts:
    """Ray Train's part; imports Ray Train.

    Raises:
        RayVersionError: a name is gone.
    """
    with _names_of_ray():
        from ray.train.torch import TorchTrainer
        from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
        from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
        from ray.train.v2._internal.execution.callback import WorkerGroupCallback
        from ray.train.v2._internal.execution.context import TrainContext, get_train_context
        from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, FixedScalingPolicy
        from ray.train.v2._internal.execution.worker_group import WorkerGroupContext

        _ = (
            *(TorchTrainer._create_default_callbacks, TorchTrainer._initialize_and_run_controller),
            *(FixedScalingPolicy._send_resource_request, FixedScalingPolicy._maybe_send_resource_request),
            FixedScalingPolicy._cancel_resource_request,
            *(ElasticScalingPolicy._count_possible_workers, WorkerGroupCallback.before_worker_group_start),
        )
        for context, name in ((TrainContext, "controller_actor"), (WorkerGroupContext, "label_selector")):
            if name not in context.__dataclass_fields__:
                raise AttributeError(f"{context.__name__} has no field {name!r}")

    class FixedPolicy(FixedScalingPolicy):  # type: ignore[misc]
        def _send_resource_request(self) -> None: ...

        def _maybe_send_resource_request(self) -> None: ...

        def _cancel_resource_request(self) -> None: ...

    class LimitedPolicy(ElasticScalingPolicy):  # type: ignore[misc]
        def __init__(self, scaling: ray.train.ScalingConfig, limit: Callable[[int], int]) -> None:
            super().__init__(scaling)
            self._limit = limit

        def _count_possible_workers(self, reserved_resources: object) -> int:
            return self._limit(super()._count_possible_workers(reserved_resources))

    class BeforeStart(WorkerGroupCallback):  # type: ignore[misc]
        def __init__(self, function: Callable[[Selectors | None], None]) -> None:
            self._function = function

        def before_worker_group_start(self, context: WorkerGroupContext) -> None:
            self._function(context.label_selector)

    class Trainer(TorchTrainer):  # type: ignore[misc]
        def __init__(self, *args: object, policy: object, **settings: object) -> None:
            super().__init__(*args, **settings)
            self._policy = policy

        def _create_default_callbacks(self) -> list[object]:
            # Ray's cleaner is a detached actor, which outlives the run; in its place: `orphaned_placement_groups`. The
            # other callback starts an actor for datasets that the trainer is given, and ours is given none.
            unused, made = (PlacementGroupCleanerCallback, DatasetsCallback), super()._create_default_callbacks()
            return [callback for callback in made if not isinstance(callback, unused)]

        def _initialize_and_run_controller(self, **settings: object) -> ray.train.Result:
            if self._policy is not None:
                settings["scaling_policy"] = self._policy
            return super()._initialize_and_run_controller(**settings)

    return TrainParts(FixedPolicy, LimitedPolicy, BeforeStart, Trainer, lambda: get_train_context().controller_actor)


# ---- loggers of Ray Tune ----------------------------------------------------------------------


def wandb_callback(at_end: Callable[[], object]) -> type[ray.tune.Callback]:
    """Ray's callback for W&B, whose process calls a function before Ray kills it."""
    with _names_of_ray():
        from ray.air.integrations.wandb import WandbLoggerCallback

        _ = WandbLoggerCallback._logger_actor_cls

    class Process(WandbLoggerCallback._logger_actor_cls):  # type: ignore[misc]
        def run(self) -> None:
            super().run()
            at_end()

    class Callback(WandbLoggerCallback):  # type: ignore[misc]
        _logger_actor_cls = Process

    return Callback
