"""A training run inside a trial, which frees everything when the trial ends, however it ends.

A trial that trains on several ranks runs its own trainer inside Ray Tune's trial process. If Tune stops the
trial, the process ends within a fraction of a second, and with it everything that it owns: the run's actors, Ray
Train's controller, and with the controller the ranks. Their placement group stays (`train/rank_trainer.py`): the
trial's process removes it as long as the process lives, otherwise the driver does (`FreeNested`).
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.train
import ray.tune
from ray.actor import ActorHandle
from ray.train import UserCallback
from ray.tune.experiment import Trial

from bss_ray.runtime.ray_internals import CONTROLLER, actors
from bss_ray.train.rank_trainer import free_lost_groups
from bss_ray.train.trainer import BalancedTrainer

MakeTrainer = Callable[[list[UserCallback]], BalancedTrainer]
OnReport = Callable[[dict[str, Any], str | None], None]
# The controller, metrics of rank 0, and the path of the checkpoint.
_Report = tuple[ActorHandle, dict[str, Any], str | None]

_SWEEP_S = 1.0
_STOP_S = 20.0


def fit_nested(make_trainer: MakeTrainer, on_report: OnReport) -> ray.train.Result:
    """Train inside a trial, and give each epoch's report to the calling thread.

    The ranks continue while a report is handled, but their next report waits. So the checkpoint exists until
    `on_report` has returned, however few checkpoints are kept.

    Args:
        make_trainer: Function that builds the trainer, with the given callbacks in its `ray.train.RunConfig`.
        on_report: Function that is called in this thread with the metrics of each epoch and the path of its checkpoint
            on the run's storage. It may call `ray.tune.report`. If it raises an exception, such as the SystemExit by
            which Tune stops a trial, the run ends, its resources are freed, and the exception is raised to the caller.

    Returns:
        The trainer's result, after all epochs are reported.

    Raises:
        Exception: Any error of `BalancedTrainer.fit`, after all earlier epochs are reported.
    """
    reports = _start_reports()
    try:
        return _fit(make_trainer([_Courier(reports)]), reports, on_report)
    finally:
        ray.kill(reports)


def _fit(trainer: BalancedTrainer, reports: ActorHandle, on_report: OnReport) -> ray.train.Result:
    outcome: list[ray.train.Result | BaseException] = []

    def fit() -> None:
        try:
            outcome.append(trainer.fit())
        except BaseException as error:
            outcome.append(error)
        reports.hand_over.remote(None)

    # A daemon, which must not keep the process of a stopped trial alive.
    thread = threading.Thread(target=fit, name="bss-ray-nested", daemon=True)
    thread.start()
    controller = None
    try:
        while (report := ray.get(reports.take.remote())) is not None:
            controller, row, checkpoint = report
            on_report(row, checkpoint)
    except BaseException:
        if controller is not None:
            ray.kill(controller)
        thread.join(_STOP_S)
        free_nested()
        raise
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _start_reports() -> ActorHandle:
    """The actor between controller and trial. Taking a report means that the previous report was handled."""

    class Reports:  # local, so that it is pickled by value: its process need not import PyTorch
        def __init__(self) -> None:
            self._waiting: asyncio.Queue[_Report | None] = asyncio.Queue()
            self._taken = False

        async def hand_over(self, report: _Report | None) -> None:
            """Returns when the report was handled."""
            self._waiting.put_nowait(report)
            await self._waiting.join()

        async def take(self) -> _Report | None:
            if self._taken:
                self._waiting.task_done()
            report = await self._waiting.get()
            self._taken = True
            return report

    return ray.remote(num_cpus=0)(Reports).remote()


class _Courier(UserCallback):  # type: ignore[misc]  # Ray ships no types
    """Runs in the controller: sends the reports of rank 0, and the actors to kill."""

    def __init__(self, reports: ActorHandle) -> None:
        self._reports = reports

    def after_report(
        self, run_context: object, metrics: list[dict[str, Any]], checkpoint: ray.train.Checkpoint | None
    ) -> None:
        if "batch" in metrics[0]:
            return  # a checkpoint in the middle of an epoch
        path = None if checkpoint is None else checkpoint.path
        ray.get(self._reports.hand_over.remote((ray.get_runtime_context().current_actor, metrics[0], path)))


def free_nested() -> bool:
    """Remove the placement groups of this job whose Ray Train controller is lost.

    Returns:
        Whether no run of another process of this job remains.
    """
    free_lost_groups()
    own = ray.get_runtime_context().get_worker_id()
    controllers = [actor for actor in actors() if actor.class_name == CONTROLLER and actor.alive]
    return all(controller.owner == own for controller in controllers)


class FreeNested(ray.tune.Callback):  # type: ignore[misc]
    """Runs in the driver of a study: frees the remains of stopped and killed trials a second later."""

    def __init__(self) -> None:
        self._swept = 0.0

    def on_step_end(self, iteration: int, trials: list[Trial], **info: object) -> None:
        if time.monotonic() - self._swept > _SWEEP_S:
            free_nested()
            self._swept = time.monotonic()

    def on_experiment_end(self, trials: list[Trial], **info: object) -> None:
        end = time.monotonic() + _STOP_S
        while not free_nested() and time.monotonic() < end:  # the process of the last trial may just be ending
            time.sleep(0.1)
