"""The roles of a dataset's columns, and the kind of its labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from bss_ray.errors import DataError, nearest
from bss_ray.names import FEATURES, FUSED, loss_column, presence_column

# Columns that batches and score files add; a dataset cannot have columns of these names.
RESERVED = ("row_id", "similarity", "information", "score")

# Kinds of labels:
#   multiclass   one of the classes 0..C-1, an integer for each row
#   multilabel   any of C classes, a tensor (C,) of 0 and 1 for each row
#   regression   a number, or a tensor (D,) of numbers, for each row
Task = Literal["multiclass", "multilabel", "regression"]
TASKS: tuple[Task, ...] = get_args(Task)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Roles of a dataset's columns.

    Args:
        modalities: Names of the input columns, at least two. A null means that the row lacks the modality.
        label: Name of the label column.
        id: Name of a column of unique ids by which people identify rows; optional.
        extra: Names of columns that are only copied into the scores file, e.g. a known truth to compare scores with.
        task: Kind of the labels. `multiclass`: an integer 0..C-1 for each row; `multilabel`: a tensor (C,) of 0 and 1
            for each row; `regression`: a finite number or a tensor (D,) of finite numbers for each row.

    Raises:
        DataError: There are fewer than two modalities, a column has two roles, or a name is reserved or a task unknown.
    """

    modalities: tuple[str, ...]
    label: str = "label"
    id: str | None = None
    extra: tuple[str, ...] = ()
    task: Task = "multiclass"

    def __post_init__(self) -> None:
        # YAML and JSON bring lists.
        object.__setattr__(self, "modalities", tuple(self.modalities))
        object.__setattr__(self, "extra", tuple(self.extra))
        if self.task not in TASKS:
            raise DataError(f"unknown task {self.task!r}; {nearest(self.task, TASKS)}")
        if len(self.modalities) < 2:
            raise DataError(
                "balance is measured between modalities: name at least two input columns; "
                f"received {list(self.modalities)}"
            )
        names = self.all
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"each column has one role; {twice} are named more than once")
        _refuse_taken(names, RESERVED, "used by batches and score files")
        added = [make(name) for name in self.modalities for make in (presence_column, loss_column)]
        _refuse_taken(names, added, "made of the modalities' names in batches and score files")
        _refuse_taken(self.modalities, (FUSED, FEATURES), "used by the outputs of models")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Columns that every batch holds: modalities and label. `Shards.features` has all columns of batches."""
        return (*self.modalities, self.label)

    @property
    def all(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (*self.inputs, *(() if self.id is None else (self.id,)), *self.extra)


def _refuse_taken(names: Sequence[str], taken: Sequence[str], why: str) -> None:
    """Refuse names that have another meaning already.

    Raises:
        DataError: A name is reserved; the error says why.
    """
    both = sorted(set(names) & set(taken))
    if both:
        raise DataError(f"the names {list(taken)} are {why}; rename {both}")
