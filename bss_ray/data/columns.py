"""Which column of a data set plays which role."""

from __future__ import annotations

from dataclasses import dataclass

from bss_ray.errors import DataError

# Columns that batches and score files add; a data set cannot have them itself.
RESERVED = ("row_id", "similarity", "information", "score")


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Roles of a data set's columns.

    Args:
        modalities: names of the input columns, at least two.
        label: name of the label column: integer classes 0..C-1.
        id: name of a column that identifies rows for people; optional, must be unique.
        extra: columns that are only carried into the scores file, e.g. a truth to compare with.

    Raises:
        DataError: fewer than two modalities, a column with two roles, or a reserved name.
    """

    modalities: tuple[str, ...]
    label: str = "label"
    id: str | None = None
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # YAML and JSON bring lists.
        object.__setattr__(self, "modalities", tuple(self.modalities))
        object.__setattr__(self, "extra", tuple(self.extra))
        if len(self.modalities) < 2:
            raise DataError(
                "balance is measured between modalities: name at least two input columns; "
                f"received {list(self.modalities)}"
            )
        names = self.all
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise DataError(f"each column has one role; {twice} are named more than once")
        taken = sorted(set(names) & set(RESERVED))
        if taken:
            raise DataError(f"the names {list(RESERVED)} are used by batches and score files; rename {taken}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """What a batch holds beside `row_id`: modalities and label."""
        return (*self.modalities, self.label)

    @property
    def all(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (*self.inputs, *(() if self.id is None else (self.id,)), *self.extra)
