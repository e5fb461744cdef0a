"""The work of an actor of the scoring pool: forward rows, measure them, and make a small table of the measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import ray
import torch

from bss_ray.data.checks import check_labels
from bss_ray.data.columns import Columns
from bss_ray.errors import DataError, ModelOutputError, Problem, find_problem, raise_first_problem
from bss_ray.measure.forward import autocast, evaluating, to_tensors
from bss_ray.measure.measurer import Measurer
from bss_ray.measure.normalise import NORMALISATIONS, Norm, Normalise, join
from bss_ray.measure.observation import check_outputs
from bss_ray.measure.score import BadRows, ScoreRule, Unpaired, current_scores
from bss_ray.measure.snapshot import ModelSnapshot
from bss_ray.names import FUSED, loss_column, presence_column
from bss_ray.runtime.threads import keep_freed_memory
from bss_ray.scoring.config import ScoringPass
from bss_ray.scoring.pool import kept_rows_notice
from bss_ray.scoring.scorer import RowMeasures, Scorer

SIMILARITY, INFORMATION, SCORE = "similarity", "information", "score"

BAD_OUTPUTS = (
    "logits must be finite: NaN or infinite measures. Check these rows' inputs and the weights, or have such rows "
    "written without a score: bad_rows=keep"
)


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """How rows are measured and scored.

    Args:
        columns: Roles of the columns.
        measurer: Criteria and weights of the loss.
        forward: Settings of the forward pass, and what happens to rows whose outputs are not finite.
        rule: How measures become scores.
        num_classes: Number of values that a head returns; None asks the model.

    Raises:
        ConfigError: The measurer was made for another kind of labels.
    """

    columns: Columns
    measurer: Measurer = field(default_factory=Measurer)
    forward: ScoringPass = field(default_factory=ScoringPass)
    rule: ScoreRule = field(default_factory=ScoreRule)
    num_classes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "measurer", self.measurer.for_task(self.columns.task))


@dataclass(frozen=True)
class Measured:
    """Measures of consecutive rows.

    Attributes:
        table: Id, label and extra columns of one number or text for each row; similarity, information, losses. A
            measure that a row does not have is null.
        problems: Rules that rows break: rules for data, and then there is no table, or the rule for outputs.
        notices: Messages to the user.
    """

    table: pa.Table | None
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


class RowMeasurer:
    """A model on a device that measures rows.

    Args:
        snapshot: Snapshot of the model.
        measuring: How rows are measured.
        device: Device of the model.
    """

    def __init__(self, snapshot: ModelSnapshot, measuring: Measuring, device: torch.device | str = "cpu") -> None:
        self._measuring = measuring
        self._device = torch.device(device)
        self._num_classes = measuring.num_classes
        self._scorer = Scorer(
            measuring.measurer,
            measuring.columns.label,
            forward=measuring.forward,
            device=self._device,
            losses=True,
        )
        self._scorer.load(snapshot)

    def measure(self, arrays: Mapping[str, np.ndarray], first_row: int) -> Measured:
        """Measure consecutive rows with the columns of `read_rows`.

        Raises:
            ModelOutputError: The outputs break the contract.
        """
        columns = self._measuring.columns
        inputs = {name: arrays[name] for name in (*columns.inputs, *_presence(arrays, columns))}
        label = inputs[columns.label]
        if self._num_classes is None:
            self._num_classes = self._ask_model(inputs)
        # A label beyond the heads would be an index error in the loss, which on a GPU ends the process.
        everywhere = np.ones(len(label), dtype=bool)
        problems = check_labels(label, everywhere, columns, first_row, self._num_classes)
        if problems:
            return Measured(None, problems)
        measures = self._scorer.measure(inputs, first_row)
        notices = [text.replace("scoring.batch_size", "batch_size") for text in measures.notices]
        problems = [replace(problem, rule=BAD_OUTPUTS) for problem in measures.problems]
        return Measured(_table(arrays, columns, measures), problems, notices=notices)

    def _ask_model(self, inputs: Mapping[str, np.ndarray]) -> int:
        """Number of values that the heads return, for the first row."""
        row = {name: np.array(values[:1]) for name, values in inputs.items()}
        batch = to_tensors({**row, "row_id": np.array([-1])}, self._device)
        model = self._scorer.model
        with evaluating(model), autocast(self._device, self._measuring.forward.precision):
            outputs = model(batch)
            check_outputs(outputs, batch[self._measuring.columns.label])
        return int(outputs[FUSED].shape[1])


def prepare_actor() -> torch.device:
    """Set up the process of an actor; returns the device that Ray gave it."""
    keep_freed_memory()
    return torch.device("cuda" if ray.get_gpu_ids() else "cpu")


def _presence(arrays: Mapping[str, np.ndarray], columns: Columns) -> list[str]:
    return [name for name in map(presence_column, columns.modalities) if name in arrays]


def _table(arrays: Mapping[str, np.ndarray], columns: Columns, measures: RowMeasures) -> pa.Table:
    """The table of the rows' measures and columns."""
    bad = np.isnan(measures.information)
    table = {name: to_arrow(arrays[name]) for name in carried_columns(columns) if arrays[name].ndim == 1}
    table[SIMILARITY] = _with_nulls(measures.similarity, bad | np.isnan(measures.similarity))
    table[INFORMATION] = _with_nulls(measures.information, bad)
    for name, loss in measures.losses.items():
        present = arrays.get(presence_column(name.removeprefix(loss_column(""))), ~bad)
        table[name] = _with_nulls(loss, bad | ~present | ~np.isfinite(loss))
    return pa.table(table)


def carried_columns(columns: Columns) -> tuple[str, ...]:
    """Columns of a dataset that are kept with the measures."""
    return (*(() if columns.id is None else (columns.id,)), columns.label, *columns.extra)


def _with_nulls(values: np.ndarray, missing: np.ndarray) -> pa.Array:
    return pa.array(values, pa.float32(), mask=missing)


def to_arrow(values: np.ndarray) -> pa.Array:
    """A column (n,) as Arrow array; Ray Data passes on text as Python objects."""
    return pa.array(values.tolist() if values.dtype.kind == "O" else values, from_pandas=True)


def kept_notice(problems: Sequence[Problem]) -> str:
    """The notice of rows without a score."""
    return kept_rows_notice(problems, "they are written without measures and score")


def snapshot_of(reference: ray.ObjectRef) -> ModelSnapshot:
    """The model behind a reference; Ray Data passes references to constructors unresolved."""
    snapshot: ModelSnapshot = ray.get(reference)
    return snapshot


_NO_PAIR = (
    "a row needs two modalities for a similarity, as unpaired=error says. Let such rows count as unpaired=neutral or "
    "lowest, or filter them out"
)


@dataclass(frozen=True)
class Norms:
    """Normalisations of both measures, of some rows or of all.

    Attributes:
        similarity: Norm over the rows that have two modalities.
        information: Norm over the rows with finite outputs.
    """

    similarity: Norm
    information: Norm

    @staticmethod
    def of(table: pa.Table, normalise: Normalise) -> Norms:
        """Norms of some rows."""
        kind = NORMALISATIONS[normalise]
        return Norms(*(kind.of(column(table, name)) for name in (SIMILARITY, INFORMATION)))

    @staticmethod
    def union(parts: Sequence[Norms]) -> Norms:
        """Exact norms over all parts; there must be at least one part."""
        return Norms(join([part.similarity for part in parts]), join([part.information for part in parts]))


def column(table: pa.Table, name: str) -> np.ndarray:
    """A measure (n,) float32; NaN for nulls."""
    values: np.ndarray = table[name].to_numpy(zero_copy_only=False).astype(np.float32)
    return values


def no_similarity(table: pa.Table) -> np.ndarray:
    """(n,) true for rows with finite outputs and fewer than two modalities."""
    return np.asarray(np.isnan(column(table, SIMILARITY)) & ~np.isnan(column(table, INFORMATION)))


def bad_outputs(table: pa.Table, first_row: int) -> list[Problem]:
    """The problem of rows whose outputs are not finite, which have no measures."""
    return find_problem(BAD_OUTPUTS, np.isnan(column(table, INFORMATION)), first_row)


def check_pairs(table: pa.Table, first_row: int, unpaired: Unpaired) -> list[Problem]:
    """Problem of the rows without a similarity, if they are an error."""
    return find_problem(_NO_PAIR, no_similarity(table), first_row) if unpaired == "error" else []


@dataclass
class Look:
    """Norms and problems of some tables of measures.

    Attributes:
        norms: Norms of the measures.
        data_problems: Rules for data that rows break.
        output_problems: Problems of rows whose outputs are not finite.
        notices: Messages to the user.
    """

    norms: list[Norms] = field(default_factory=list)
    data_problems: list[Problem] = field(default_factory=list)
    output_problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def add(self, table: pa.Table, first_row: int, rule: ScoreRule) -> None:
        """Add the measures of consecutive rows."""
        self.data_problems += check_pairs(table, first_row, rule.unpaired)
        self.output_problems += bad_outputs(table, first_row)
        self.norms.append(Norms.of(table, rule.normalise))

    def joined(self) -> Look:
        """The same with one norm in place of many."""
        return replace(self, norms=[Norms.union(self.norms)] if self.norms else [])

    def check(self, bad_rows: BadRows) -> None:
        """Raise for problems that are errors.

        Raises:
            DataError: Rows break a rule for data.
            ModelOutputError: Outputs are not finite, and the settings make this an error.
        """
        raise_first_problem(self.data_problems, DataError)
        if bad_rows == "error":
            raise_first_problem(self.output_problems, ModelOutputError)

    @staticmethod
    def union(parts: Sequence[Look]) -> Look:
        """All parts together."""
        whole = Look()
        for part in parts:
            whole.norms += part.norms
            whole.data_problems += part.data_problems
            whole.output_problems += part.output_problems
            whole.notices += part.notices
        return whole


def with_scores(table: pa.Table, norms: Norms, unpaired: Unpaired) -> pa.Table:
    """The table with a column of scores: the same bits as `balance_scores`; null if there is no information."""
    similarity, information = column(table, SIMILARITY), column(table, INFORMATION)
    scores = current_scores(similarity, information, (norms.similarity, norms.information), unpaired)
    missing = np.isnan(information)
    return table.append_column(SCORE, pa.array(scores.astype(np.float32), pa.float32(), mask=missing))


def with_row_ids(table: pa.Table, first_row: int) -> pa.Table:
    """The table with the row ids as first column."""
    ids = np.arange(first_row, first_row + len(table), dtype=np.int64)
    return table.add_column(0, "row_id", pa.array(ids))
