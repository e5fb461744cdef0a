"""The settings of `bss-ray score`, and those that are filled in from a checkpoint's run."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

import yaml
from torch import nn

from bss_ray.data.columns import Columns
from bss_ray.data.shards import Feature
from bss_ray.data.sources import AV_DIGITS, AV_DIGITS_COLUMNS
from bss_ray.errors import ConfigError, DataError, check_one_of
from bss_ray.measure.measurer import Measurer
from bss_ray.measure.score import ScoreRule
from bss_ray.models.weights import classes_of_weights, load_weights
from bss_ray.names import import_name
from bss_ray.runtime.logs import CommandConfig
from bss_ray.runtime.wait import DEFAULT_LIMIT_S
from bss_ray.score.measure_files import FILE_ROWS
from bss_ray.score.measuring import Measuring
from bss_ray.score.pool import PoolConfig
from bss_ray.scoring.config import ScoringPass
from bss_ray.storage import absolute
from bss_ray.train.initial import Weights
from bss_ray.train.loop import ModelSpec as ModelSpec  # also for the command

T = TypeVar("T")

Split = Literal["train", "validation", "test"]

# Settings that may differ between two commands of one job: how and where it works. A batch size or a precision
# changes only the rounding of floats. A job that has met bad rows may resume with another policy, because measure
# files with such rows are not kept under `error`.
MAY_CHANGE = frozenset(
    {
        "bad_rows",
        "batch_size",
        "channels_last",
        "compile",
        "min_actors",
        "max_actors",
        "cpus_per_actor",
        "gpus_per_actor",
        "piece_rows",
        "ray_address",
        "log_format",
        "verbose",
        "wait_limit_s",
    }
)


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ScoreRule, ScoringPass, PoolConfig, CommandConfig):
    """Settings of `bss-ray score`.

    Args:
        checkpoint: Weights of the model: a .pt file with a state dict, a checkpoint folder, or the folder of a run of
            `bss-ray train` (the epoch it has chosen; the run's model, data, columns and measurer are used unless they
            are given here). null takes the run `demo`.
        data: Data to score: `av-digits`, a Parquet file or folder (or one with the sub-folders train, validation,
            test), or `module:function`; see `bss-ray train --help`.
        split: Split of the data: train, validation or test.
        columns: Roles of the columns (modalities, label, id and extras): --columns.modalities '[audio, image]' and so
            on.
        num_classes: Number of values that the model's heads return; null takes it from the shapes of the weights.
        mispaired: Share of av-digits' training rows that is paired wrongly.
        seed: Seed of the wrong pairs.
        model: Class of the model by import path, and its arguments.
        measurer: How the balance of a row is measured.
        piece_rows: Largest number of rows in a file of measures; a stop loses only the files that are being made.
        wait_limit_s: Longest time, in seconds, without a new result from the actors and tasks of the job.
        name: Name of the job; a job with the same name and settings is resumed.
    """

    checkpoint: str | None = None
    data: str | None = None
    split: Split = "train"
    columns: Columns | None = None
    num_classes: int | None = None
    mispaired: float | None = None
    seed: int | None = None
    model: ModelSpec | None = None
    measurer: Measurer | None = None
    piece_rows: int = FILE_ROWS
    wait_limit_s: float = DEFAULT_LIMIT_S
    name: str = "scores"

    def __post_init__(self) -> None:
        for settings in (ScoreRule, ScoringPass, PoolConfig, CommandConfig):
            settings.__post_init__(self)
        check_one_of("split", self.split, get_args(Split))
        if not self.wait_limit_s > 0:
            raise ConfigError(f"wait_limit_s must be positive; received {self.wait_limit_s}")
        for name in ("num_classes", "piece_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1; received {value}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job with all its settings and the weights of its model.

    Attributes:
        config: Settings as given; null settings are filled in from the checkpoint's run or by defaults.
        weights: Weights of the model.
    """

    config: ScoreConfig
    weights: Weights = field(repr=False)

    @property
    def columns(self) -> Columns:
        """Roles of the columns."""
        assert self.config.columns is not None
        return self.config.columns

    @property
    def data(self) -> str:
        """Source of the rows."""
        assert self.config.data is not None
        return self.config.data

    @property
    def measuring(self) -> Measuring:
        """How rows are measured."""
        config = self.config
        return Measuring(
            columns=self.columns,
            measurer=config.measurer or Measurer(),
            forward=config,
            rule=config,
        )

    def model(self, features: dict[str, Feature]) -> nn.Module:
        """The model with its weights, for rows of these shapes.

        Raises:
            CheckpointError: The weights do not fit the model, or do not tell the number of classes.
            ConfigError: The model cannot be built.
        """
        spec, source = self.config.model or ModelSpec(), self.weights.source
        shapes = {name: features[name].shape for name in self.columns.modalities}
        build = functools.partial(spec.build, shapes)
        classes = self.config.num_classes
        if classes is None and _asks_classes(spec):
            classes = classes_of_weights(build, self.weights.state, source)
        model = build(classes or 0)
        load_weights(model, self.weights.state, source)
        return model

    def to_yaml(self) -> str:
        """All settings in the form that `--config` reads."""
        return yaml.safe_dump(_plain(dataclasses.asdict(self.config)), sort_keys=False)


def resolve(config: ScoreConfig, weights: Weights) -> Job:
    """Fill in the settings that were not given, from the run that made the weights or by defaults.

    Raises:
        DataError: No setting says which columns to read.
    """
    known = weights.settings
    data = config.data or known.get("data") or AV_DIGITS
    same_data = known.get("data") == data
    columns = config.columns or _made(Columns, known.get("columns"))
    if columns is None and data == AV_DIGITS:
        columns = AV_DIGITS_COLUMNS
    if columns is None:
        raise DataError(f"name the columns of {data}: --columns.modalities '[audio, image]' --columns.label label")
    filled = dataclasses.replace(
        config,
        # An absolute path: the same command from another folder reads other files.
        checkpoint=absolute(weights.source),
        data=data,
        columns=columns,
        model=config.model or _made(ModelSpec, known.get("model")) or ModelSpec(),
        measurer=config.measurer or _made(Measurer, known.get("measurer")) or Measurer(),
        mispaired=_first(config.mispaired, known.get("mispaired") if same_data else None, 0.0),
        seed=_first(config.seed, known.get("seed") if same_data else None, 0),
        num_classes=_first(config.num_classes, known.get("num_classes")),
    )
    return Job(config=filled, weights=weights)


def _asks_classes(spec: ModelSpec) -> bool:
    """Whether the model gets the number of classes from the data and not from its own settings."""
    kind = import_name(spec.class_path)
    return "num_classes" in inspect.signature(kind).parameters and "num_classes" not in spec.init_args


def _made(kind: type[T], settings: object) -> T | None:
    """An instance from the settings of a run that this version knows; None without settings."""
    if not isinstance(settings, Mapping) or not settings:
        return None
    names = {one.name for one in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in settings.items() if name in names and value is not None})


def _first(*values: T | None) -> T | None:
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def _plain(tree: object) -> object:
    """The value in types that YAML can write: lists for tuples."""
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, (list, tuple)) else tree
