"""One whole run of `bss-ray train`: data, training, test of the chosen epoch, files."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.train
import torch

from bss_ray.data.build import build_split
from bss_ray.data.columns import Columns
from bss_ray.data.shards import Shards
from bss_ray.data.sources import AV_DIGITS, AV_DIGITS_COLUMNS, files_key, load_splits, parquet_paths
from bss_ray.data.store import StoreConfig
from bss_ray.errors import ConfigError, DataError, StorageError, nearest
from bss_ray.measure.forward import to_tensors
from bss_ray.measure.measurer import Measurer
from bss_ray.placement.resources import Placement
from bss_ray.runtime.logs import CommandConfig
from bss_ray.runtime.messages import (
    EpochFinished,
    Message,
    Metrics,
    Notice,
    OnMessage,
    ProfileRecorded,
    ShardsProgress,
    Status,
)
from bss_ray.runtime.profiling import ProfileFolder
from bss_ray.runtime.ray_internals import is_alone
from bss_ray.runtime.threads import in_threads
from bss_ray.runtime.wait import DEFAULT_LIMIT_S, wait_for
from bss_ray.sample.plan import Tail
from bss_ray.sample.state import SavedScores
from bss_ray.schedule.schedulers import Learning, Scheduler
from bss_ray.scoring.config import Scoring
from bss_ray.storage import StoragePath, absolute
from bss_ray.train.backend import TrainBackend
from bss_ray.train.checkpoint import SavedCheckpoint
from bss_ray.train.folder import Events, RunFolder
from bss_ray.train.initial import read_weights
from bss_ray.train.loop import LoopArgs, LoopConfig, ModelSpec, build_model, default_loop, resolve_precision
from bss_ray.train.metric_names import default_metric, is_error, metric_names
from bss_ray.train.trainer import BalancedTrainer


def write_score_table(path: StoragePath, saved: SavedCheckpoint, shards: Shards) -> None:
    """Write the scores of a checkpoint into a folder of Parquet files, one for each shard; replaces an older folder."""
    count = len(shards.parts)
    with path.replaced() as folder:
        if is_alone():  # imported before the threads start
            for _ in in_threads(functools.partial(_write_part, folder, saved, shards), range(count)):
                pass
        else:
            task = ray.remote(name="bss_ray.write_scores")(_write_part)
            written = [task.remote(folder, saved, shards, index) for index in range(count)]
            wait_for(written, "the scores of the run to be written")


def _write_part(folder: StoragePath, saved: SavedCheckpoint, shards: Shards, index: int) -> None:
    part, columns = shards.parts[index], shards.columns
    names = {"similarity": np.float32, "information": np.float32, "score": np.float32}
    table = {"row_id": np.arange(part.first_row, part.first_row + part.rows)}
    table |= {name: np.full(part.rows, np.nan, kind) for name, kind in names.items()}
    for scores in saved.scores(part.first_row, part.first_row + part.rows):
        start = max(part.first_row, scores.first_row)
        stop = min(part.first_row + part.rows, scores.first_row + len(scores.score))
        for name in names:
            values = getattr(scores, name)[start - scores.first_row : stop - scores.first_row]
            table[name][start - part.first_row : stop - part.first_row] = values
    arrays = shards.read(index)
    kept = (columns.label, *(() if columns.id is None else (columns.id,)), *columns.extra)
    table |= {name: arrays[name] for name in kept if arrays[name].ndim == 1}
    (folder / f"part-{index:05d}.parquet").write(lambda stream: pq.write_table(pa.table(table), stream))


def roc_areas(path: StoragePath, columns: tuple[str, ...]) -> dict[str, float]:
    """Area under the ROC curve of -score against each truth column (boolean) of a scores file."""
    from torchmetrics.functional.classification import binary_auroc

    table = path.read_table()
    areas = {}
    for name in columns:
        if name in table.column_names and pa.types.is_boolean(table.schema.field(name).type):
            truth = torch.from_numpy(table[name].to_numpy().astype(np.int64))
            score = torch.from_numpy(table["score"].to_numpy())
            # Mapped into [0, 1], because torchmetrics treats other values as logits.
            areas[name] = float(binary_auroc((1 - score) / 2, truth))
    return areas


@dataclass(frozen=True, kw_only=True)
class TrainConfig(CommandConfig):
    """Settings of `bss-ray train`.

    Args:
        data: Training data: `av-digits` (embedded), a Parquet file or folder (or one with the sub-folders train,
            validation, test), or `module:function` that is called with a split's name and returns a Ray Dataset or
            None.
        validation: Parquet file or folder of validation rows, which choose the epoch.
        test: Parquet file or folder of test rows, which are read once, at the end.
        columns: Roles of the columns (modalities, label, id and extras); null takes those of av-digits.
        num_classes: Number of values that a head returns: classes C, or the D numbers of a regression; null takes the
            number that the training labels have.
        mispaired: Share of av-digits' training rows that is paired wrongly, to test whether scores find these rows.
        model: Class of the model by import path, and its arguments.
        scheduler: Scheduler: Uniform, Heuristic (BSS-H), Learning (BSS-L), or your own by import path.
        measurer: How the balance of a row is measured, and the weights of the training loss.
        scoring: How and where rows are scored.
        initial_scores: Parquet file or folder of scores, from `bss-ray score` or another run, that the first epoch is
            drawn from; there is no burn-in then.
        initial_checkpoint: Checkpoint or state dict of a pre-trained model of the same kind, which scores the rows
            before the first epoch; there is no burn-in then. The trained model starts from scratch.
        store: Where rows are kept: in memory, on the nodes' disks, or in Lance.
        loop: Epochs, optimiser, learning rate, precision, checkpoints.
        batch_size: Number of rows of a global batch, over all ranks.
        tail: Whether to keep or drop the last, smaller batch of an epoch.
        seed: Seed of the order of rows and of the model.
        choose_by: Validation metric whose best epoch is tested; null takes val_accuracy_fused, or val_r2_fused for a
            regression. Of mae and rmse the lowest value is the best.
        num_workers: Number of ranks; null takes one per GPU, or two on CPUs. [lo, hi] is elastic: as many ranks as fit;
            nodes may come and go, and the global batches stay the same.
        use_gpu: Whether each rank gets a GPU; null gives GPUs if the cluster has any.
        placement: Where ranks and scorers run, and what they leave to others.
        max_failures: Number of times that training may restart from its last checkpoint after a rank, node or actor was
            lost.
        max_preemptions: Number of times that training may restart because the cloud took a (spot) node away with
            notice; -1 is without limit.
        wait_limit_s: Longest time, in seconds, that one process waits for another, and that a run continues without a
            live rank; raise it if a scoring pass or a validation takes longer.
        name: Name of the run; a run with the same name and settings is resumed.
        profile: Whether to record a training step, a scoring pass and a timeline of all processes in `profile/` of the
            run folder, for chrome://tracing or Perfetto.
    """

    data: str = AV_DIGITS
    validation: str | None = None
    test: str | None = None
    columns: Columns | None = None
    num_classes: int | None = None
    mispaired: float = 0.4
    model: ModelSpec = field(default_factory=ModelSpec)
    scheduler: Scheduler = field(default_factory=lambda: Learning(temperature=0.25, fraction=0.7))
    measurer: Measurer = field(default_factory=Measurer)
    scoring: Scoring = field(default_factory=Scoring)
    initial_scores: str | None = None
    initial_checkpoint: str | None = None
    store: StoreConfig = field(default_factory=StoreConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    batch_size: int = 64
    tail: Tail = "keep"
    seed: int = 0
    choose_by: str | None = None
    num_workers: int | tuple[int, int] | None = None
    use_gpu: bool | None = None
    placement: Placement = field(default_factory=Placement)
    max_failures: int = 2
    max_preemptions: int = -1
    wait_limit_s: float = DEFAULT_LIMIT_S
    name: str = "demo"
    profile: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial_scores is not None and self.initial_checkpoint is not None:
            raise ConfigError(
                "initial_scores and initial_checkpoint both say what the first epoch is drawn from; give one of them"
            )
        workers = self.num_workers
        low, high = workers if isinstance(workers, tuple) else (workers, workers)
        if low is not None and high is not None and not 1 <= low <= high:
            raise ConfigError(f"num_workers must be at least 1, and of [lo, hi] hi at least lo; received {workers}")


def train(config: TrainConfig, folder: RunFolder, on_message: OnMessage) -> dict[str, object]:
    """Train, choose the epoch on validation, test it, and write the run folder.

    Ray must be running. A stopped run is resumed.

    Args:
        config: All settings.
        folder: Folder that is claimed for this configuration.
        on_message: Function that is called with each message of the run, for progress displays.

    Returns:
        The content of `result.json`.

    Raises:
        BssRayError: See `BalancedTrainer.fit`.
    """
    profile = ProfileFolder(folder.path)
    scaling = train_scaling(config)
    choose_by = check_choice(config.choose_by, columns_of(config))
    if config.initial_checkpoint is not None:
        read_weights(config.initial_checkpoint)  # checked before anything is started
    load = functools.cache(functools.partial(load_shards, config, on_message))
    with _recording(folder, profile, on_message) as record:
        trainer = make_trainer(
            config,
            load,
            scaling,
            run_config=ray.train.RunConfig(
                name=folder.path.name,
                storage_path=folder.storage_path.uri,
                # Without validation no epoch has the metric, and the last checkpoints are kept.
                checkpoint_config=ray.train.CheckpointConfig(
                    num_to_keep=2,
                    checkpoint_score_attribute=choose_by,
                    checkpoint_score_order="min" if is_error(choose_by) else "max",
                ),
                failure_config=ray.train.FailureConfig(
                    max_failures=config.max_failures, max_preemption_failures=config.max_preemptions
                ),
            ),
            profile=config.profile,
            on_message=record,
        )
        outcome = trainer.fit()

    splits = load()
    on_message(Status("testing the chosen epoch"))
    last = SavedCheckpoint(outcome.checkpoint)
    history = last.manifest().history
    folder.write_metrics(history)
    chosen, row = _choose(outcome, choose_by)
    result: dict[str, object] = {"chosen_epoch": row["epoch"], "validation": _named(row, "val"), "test": {}}
    if splits.test is not None:
        result["test"] = _test_checkpoint(config, SavedCheckpoint(chosen), splits.test, use_gpu=scaling.use_gpu)
    if last.manifest().position.version:
        write_score_table(folder.path / "scores.parquet", last, splits.train)
        result["score_roc_area"] = roc_areas(folder.path / "scores.parquet", splits.train.columns.extra)
    if config.profile:
        profile.finish()
    folder.write_result(result)
    return result


# ---- parts ------------------------------------------------------------------------------------


def make_trainer(
    config: TrainConfig,
    load: Callable[[], Splits],
    scaling: ray.train.ScalingConfig,
    *,
    on_message: OnMessage,
    run_config: ray.train.RunConfig | None = None,
    backend: TrainBackend | None = None,
    initial_scores: SavedScores | None = None,
    profile: bool = False,
) -> BalancedTrainer:
    """The trainer of a run of the default loop.

    Args:
        config: What is trained, and how.
        load: Function that returns the shards, called when it is known that the cluster can hold the run.
        scaling: Ranks of the run.
        on_message: Function that is called with each message of the run.
        run_config: Name and storage of the run; see `BalancedTrainer`.
        backend: Backend that keeps the run's checkpoints; see `BalancedTrainer`.
        initial_scores: Scores to begin with, in place of those that `config` names.
        profile: Whether a training step and a scoring pass are recorded.
    """
    return BalancedTrainer(
        default_loop,
        dataset=lambda: load().train,
        columns=columns_of(config),
        validation=lambda: load().validation,
        # Burn-in is only for runs without scores.
        scheduler=config.scheduler if config.initial_checkpoint is None else replace(config.scheduler, burn_in=0),
        measurer=config.measurer,
        scoring=config.scoring,
        batch_size=config.batch_size,
        tail=config.tail,
        seed=config.seed,
        train_loop_config=LoopArgs(
            loop=config.loop,
            model=config.model,
            seed=config.seed,
            initial_checkpoint=None if config.initial_checkpoint is None else absolute(config.initial_checkpoint),
        ),
        scaling_config=scaling,
        placement=config.placement,
        run_config=run_config,
        wait_limit_s=config.wait_limit_s,
        initial_scores=config.initial_scores if initial_scores is None else initial_scores,
        backend=backend,
        profile=profile,
        on_message=on_message,
    )


def train_scaling(config: TrainConfig) -> ray.train.ScalingConfig:
    """The ranks of a run on the cluster that Ray is connected to."""
    there = ray.cluster_resources()
    gpus, cpus = int(there.get("GPU", 0)), int(there.get("CPU", 0))
    use_gpu = gpus > 0 if config.use_gpu is None else config.use_gpu
    workers = config.num_workers
    if workers is None:
        workers = max(1, gpus if use_gpu else min(2, cpus))
    return config.placement.scaling(ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu))


def columns_of(config: TrainConfig) -> Columns:
    """Roles of the columns of a run's data.

    Raises:
        DataError: The settings do not name them.
    """
    columns = config.columns or (AV_DIGITS_COLUMNS if config.data == AV_DIGITS else None)
    if columns is None:
        raise DataError(
            f"name the columns of {config.data}: --columns.modalities '[audio, image]' --columns.label label"
        )
    return columns


class Splits(NamedTuple):
    """Shards of the splits of a run; None for a split that does not exist."""

    train: Shards
    validation: Shards | None = None
    test: Shards | None = None


def load_shards(config: TrainConfig, on_message: OnMessage) -> Splits:
    """Checked shards of all splits; nothing is trained before all of them are sound.

    Raises:
        DataError: The data breaks a rule.
    """
    columns = columns_of(config)
    datasets = load_splits(
        config.data,
        validation=config.validation,
        test=config.test,
        mispaired=config.mispaired,
        seed=config.seed,
    )
    paths = parquet_paths(config.data, validation=config.validation, test=config.test)
    shards: dict[str, Shards] = {}
    for split, dataset in datasets.items():  # train is the first split
        if dataset is not None:
            on_message(Status(f"reading {split} rows"))
            shards[split] = build_split(
                split,
                dataset,
                columns,
                train=shards.get("train"),
                num_classes=config.num_classes,
                min_shards=max(config.scoring.num_holders, config.scoring.num_scorers),
                store=config.store,
                source_key=None if (path := paths[split]) is None else files_key(path),
                on_progress=_shards_made(split, on_message),
                on_notice=lambda text: on_message(Notice(text)),
            )
    return Splits(**shards)


def _shards_made(split: str, on_message: OnMessage) -> Callable[[int, int], None]:
    """Sends how many shards of a split are made."""
    return lambda done, of: on_message(ShardsProgress(split, done, of))


@contextlib.contextmanager
def _recording(folder: RunFolder, profile: ProfileFolder, on_message: OnMessage) -> Iterator[OnMessage]:
    """Writes each epoch and each profile to the run folder as it is reported, before it is passed on."""
    with Events(folder.path / "tensorboard") as events:

        def record(message: Message) -> None:
            if isinstance(message, ProfileRecorded):
                message = Notice(profile.take(message))
            if isinstance(message, EpochFinished):
                try:
                    events.add(message.row)
                    folder.write_metrics(message.history)
                except StorageError as error:  # the next epoch and the end of the run write everything again
                    on_message(Notice(f"the metrics of this epoch are not written: {error}"))
            on_message(message)

        yield record


def check_choice(metric: str | None, columns: Columns) -> str:
    """The metric that chooses the epoch, which must exist; None takes the default of the task.

    Raises:
        ConfigError: The metric does not exist; the error has the nearest name.
    """
    names = metric_names("val", columns.modalities, columns.task)
    chosen = default_metric("val", columns.task) if metric is None else metric
    if chosen not in names:
        raise ConfigError(f"choose_by={chosen!r} is no validation metric; {nearest(chosen, names)}")
    return chosen


def _choose(outcome: ray.train.Result, metric: str) -> tuple[ray.train.Checkpoint, Metrics]:
    """The checkpoint of the best epoch on validation (the last epoch without validation), and its metrics."""
    scored = [(saved, row) for saved, row in outcome.best_checkpoints or [] if metric in row]
    if scored:
        return max(scored, key=lambda pair: _rank(pair[1], metric))
    return outcome.checkpoint, outcome.metrics


def best_row(history: Sequence[Metrics], metric: str) -> Metrics:
    """The metrics of the epoch that `metric` chooses; of equal epochs the first."""
    return max(history, key=lambda row: _rank(row, metric))


def _rank(row: Metrics, metric: str) -> tuple[float, int]:
    value = row[metric] if math.isfinite(row[metric]) else -math.inf
    return (-value if is_error(metric) and math.isfinite(value) else value), -row["epoch"]


def _named(row: Metrics, prefix: str) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith(f"{prefix}_")}


def _test_checkpoint(config: TrainConfig, saved: SavedCheckpoint, shards: Shards, *, use_gpu: bool) -> dict[str, float]:
    """Test metrics of a checkpoint's model."""
    if is_alone() and not use_gpu:  # this node is as good as any, and a task would import torch again
        with _one_thread():  # as a task of one CPU has
            return test_model(config, saved.state("model"), shards)
    task = _test_task.options(num_cpus=1, num_gpus=int(use_gpu)).remote(config, saved, shards)
    tested: dict[str, float] = wait_for(task, "the test of the chosen epoch")
    return tested


@ray.remote(name="bss_ray.test_checkpoint")
def _test_task(config: TrainConfig, saved: SavedCheckpoint, shards: Shards) -> dict[str, float]:
    return test_model(config, saved.state("model"), shards)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """In the block torch computes in one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def test_model(config: TrainConfig, state: Mapping[str, torch.Tensor], shards: Shards) -> dict[str, float]:
    """Test metrics of the model with these weights."""
    from bss_ray.train.metrics import HeadMetrics, evaluate  # torchmetrics: when the run is done

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config.model, shards).to(device)
    model.load_state_dict(state)
    metrics = HeadMetrics(shards.columns.modalities, shards.num_classes, device, shards.columns.task)
    size = config.loop.eval_batch_size
    batches = (
        to_tensors(shards.gather(np.arange(start, min(start + size, shards.rows))), device)
        for start in range(0, shards.rows, size)
    )
    return evaluate(
        model,
        batches,
        metrics,
        label=shards.columns.label,
        prefix="test",
        device=device,
        precision=resolve_precision(config.loop.precision, device),
    )
