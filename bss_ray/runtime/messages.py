"""Messages of a run, search or job to the people and programs that watch it.

Ranks and scorers post them to the coordinator's event log, the driver reads them there and adds its own, and all of
them reach `on_message`, for example of `BalancedTrainer`. Match on their classes:

    def on_message(message: Message) -> None:
        match message:
            case EpochFinished(row):
                print(row["epoch"], row["train_loss"])
            case Notice(text):
                print(text)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import ray


# Metrics of an epoch by name: the sampler's own are numbers; a train loop may report anything.
Metrics = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Message:
    """Fields of every message.

    Attributes:
        kind: Name of the class of messages: `event` in JSON lines.
        epoch: Epoch in which training was when a rank sent the message, from 0. None if no rank sent it.
        version: Score version that was current then. None if no rank sent it.
        rank: Number of the rank that sent the message: 0, which speaks for all ranks. None if no rank sent it.
    """

    kind: ClassVar[str]
    epoch: int | None = None
    version: int | None = None
    rank: int | None = None

    def figures(self) -> dict[str, object]:
        """Fields by name, as JSON lines and metrics show them; without those that are None."""
        return {name: value for name, value in vars(self).items() if value is not None}


OnMessage = Callable[[Message], None]


@dataclass(frozen=True)
class _Text(Message):
    text: str

    def figures(self) -> dict[str, object]:
        figures = super().figures()
        figures["message"] = figures.pop("text")
        return figures


class Status(_Text):
    """A stage of the command begins.

    Attributes:
        text: What is being done now.
    """

    kind = "status"


class Notice(_Text):
    """The user should read this.

    Attributes:
        text: One sentence or several; a warning begins with `Warning:`.
    """

    kind = "notice"


@dataclass(frozen=True)
class ShardsProgress(Message):
    """Shards of a split are being built.

    Attributes:
        split: Name of the split: `train`, `validation` or `test`.
        done: Number of shards that are finished.
        of: Number of all shards of the split.
    """

    kind = "shards"
    split: str
    done: int
    of: int


# ---- a run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NodeProcesses:
    """The processes of a run on one node.

    Attributes:
        node: Address of the node, or `starting` for processes that have no node yet.
        processes: Number of processes by role: `ranks`, `holders`, `scorers`, `coordinator`, `controller`.
        left: Amounts by resource (`CPU`, `GPU`): those that nobody uses, and all of the node.
    """

    node: str
    processes: Mapping[str, int]
    left: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class PlacementMap(Message):
    """Where the processes of a run are, at the start of an attempt of the ranks.

    Attributes:
        rows: One entry for each node of the cluster.
        each: Resources that one process takes, by role.
    """

    kind = "placement"
    rows: Sequence[NodeProcesses]
    each: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class AttemptStarted(Message):
    """The ranks have started.

    Attributes:
        batch: Global batch of the epoch with which they begin, from 0.
        restarts: 1 if they resume from a checkpoint, else 0.
    """

    kind = "begin"
    batch: int
    restarts: int


@dataclass(frozen=True)
class BatchProgress(Message):
    """Training has reached a batch; sent about twice a second and at the end of an epoch.

    Attributes:
        batch: Current global batch of the epoch, from 0.
        batches: Number of global batches of the epoch.
        new_rows: Number of rows that all ranks have trained since the last such message.
        loader_stall_share: Share of the epoch's time so far in which the loop of rank 0 waited for batches.
    """

    kind = "batch"
    batch: int
    batches: int
    new_rows: int
    loader_stall_share: float


@dataclass(frozen=True)
class EpochFinished(Message):
    """An epoch has ended, and its checkpoint is saved. `epoch` is this epoch, not the next.

    Attributes:
        row: Metrics of the epoch by name: the sampler's own, and those that the train loop has reported.
        history: The rows of all epochs of the run so far.
    """

    kind = "epoch"
    row: Metrics
    history: Sequence[Metrics]

    def figures(self) -> dict[str, object]:
        """The metrics of the epoch."""
        figures = super().figures()
        del figures["row"], figures["history"]
        return {**figures, **self.row}


@dataclass(frozen=True)
class ProfileRecorded(Message):
    """A process has profiled a training step or a scoring pass.

    Attributes:
        file: Name of the trace: `step-rank0.json` or `scoring.json`.
        trace: Reference to the bytes of a Chrome trace. It may have many megabytes, so it stays in the object store
            until somebody takes it.
        summary: Table of the operators that took longest, as text.
    """

    kind = "profile"
    file: str
    trace: ray.ObjectRef[bytes]
    summary: str


@dataclass(frozen=True)
class FatalError(Message):
    """An error of the user was raised in a rank, and the run ends with it.

    Attributes:
        error: The `BssRayError` itself, without Ray's wrappers.
    """

    kind = "fatal"
    error: BaseException


# ---- a search -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialChanged(Message):
    """A trial has started, reported or ended. `epoch` is the number of epochs that it has finished, if it reported.

    Attributes:
        number: Number of the trial, from 0.
        state: `running`, `complete`, `pruned` or `fail`.
        params: Settings that the space has suggested for the trial, by name.
        metrics: Names of the objectives.
        cause: Why the trial has failed; empty in any other state.
        values: One value for each objective. None if the trial has not reported.
    """

    kind = "trial"
    number: int
    state: str
    params: Mapping[str, object]
    metrics: Sequence[str]
    cause: str = ""
    values: Sequence[float] | None = None


@dataclass(frozen=True)
class ComparisonProgress(Message):
    """Runs of the best settings and of uniform sampling are being compared.

    Attributes:
        done: Number of runs that are finished.
        of: Number of all runs.
    """

    kind = "comparison"
    done: int
    of: int


# ---- a scoring job --------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowsProgress(Message):
    """Rows are being measured.

    Attributes:
        done: Number of rows that are measured, those of earlier commands included.
        of: Number of all rows of the job.
        rows_per_second: Speed of this command.
    """

    kind = "rows"
    done: int
    of: int
    rows_per_second: float
