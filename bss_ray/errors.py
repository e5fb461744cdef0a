"""The errors of bss_ray.

Every error that a user can cause is a `BssRayError` and says three things: the rule, the value received
and the remedy. Errors that only a bug can cause are an `assert`.

    BssRayError
    ├── ConfigError (ValueError)        a setting is unknown, impossible, or contradicts another
    │   └── ScheduleError               ... of a scheduler or a pacing function
    ├── DataError (ValueError)          columns, labels, inputs or ids of a dataset
    ├── ModelOutputError (ValueError)   the outputs of a model
    ├── WeightError (ValueError)        scores or sampling weights
    ├── CheckpointError (ValueError)    a checkpoint of other data, seed or format, or a damaged one
    ├── ResourceError (ValueError)      resources that the cluster can never provide
    ├── ScoringError (RuntimeError)     scores that repeatedly could not be updated
    ├── SearchError (RuntimeError)      a search without any complete trial
    ├── SubmitError (RuntimeError)      a cluster that does not accept a job
    ├── StorageError (OSError)          a folder that cannot be written or read
    ├── MissingDependencyError (ImportError)   an optional package that is not installed
    └── RayVersionError (ImportError)   a version of Ray that lacks what bss_ray needs

All of them have one message as their only argument, so they survive pickling between processes.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

# Most row ids that a message names.
NAMED_IDS = 5


class BssRayError(Exception):
    """Root of all errors that bss_ray raises on purpose."""


class ConfigError(BssRayError, ValueError):
    """A setting is unknown, impossible, or contradicts another."""


class ScheduleError(ConfigError):
    """A setting of a scheduler or of a pacing function is impossible."""


class DataError(BssRayError, ValueError):
    """Columns, labels, inputs or ids of a dataset break a rule."""


class ModelOutputError(BssRayError, ValueError):
    """A model returned outputs that cannot be measured."""


class WeightError(BssRayError, ValueError):
    """Scores or sampling weights from which no order can be drawn."""


class CheckpointError(BssRayError, ValueError):
    """A checkpoint is damaged, or belongs to other data, another seed or another format."""


class ResourceError(BssRayError, ValueError):
    """More CPUs, GPUs or memory than the cluster can ever provide."""


class ScoringError(BssRayError, RuntimeError):
    """Scores could not be updated more often in a row than allowed."""


class SearchError(BssRayError, RuntimeError):
    """A search has no trial that ran to its end."""


class SubmitError(BssRayError, RuntimeError):
    """A cluster does not answer, refuses a job, or was lost while a job ran."""


class StorageError(BssRayError, OSError):
    """A folder cannot be written or read."""


class MissingDependencyError(BssRayError, ImportError):
    """An optional package is needed and not installed."""


class RayVersionError(BssRayError, ImportError):
    """The installed version of Ray lacks something that is not public, and that bss_ray needs."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The end of an "unknown name" message: the nearest choice first, then all of them."""
    names = sorted(choices)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Choose from: {', '.join(names)}"


def check_one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a setting that is none of its choices.

    Raises:
        ConfigError: names the nearest choice, and all of them.
    """
    if value not in choices:
        raise ConfigError(f"unknown {name} {value!r}; {nearest(value, choices)}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop; the error's class where the message is empty."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


def first_ids(bad: np.ndarray, first_row: int = 0, limit: int = NAMED_IDS) -> str:
    """`"3 rows; first row ids 17, 90, 91"` for a boolean mask (N,) over rows that start at `first_row`."""
    rows = np.flatnonzero(bad)
    shown = ", ".join(str(first_row + int(row)) for row in rows[:limit])
    count = "1 row" if len(rows) == 1 else f"{len(rows)} rows"
    return f"{count}; first row ids {shown}"


@dataclass(frozen=True)
class Problem:
    """A rule that some rows break, found by one of several processes.

    Attributes:
        rule: Rule that must hold; the text after a colon may differ between processes.
        count: Number of rows that break the rule.
        first_ids: First row ids of these rows.
    """

    rule: str
    count: int
    first_ids: list[int]


def find_problem(rule: str, bad: np.ndarray, first_row: int = 0) -> list[Problem]:
    """The problem of the rows for which `bad` (n,) is true, if there are such rows."""
    rows = np.flatnonzero(bad)
    return [Problem(rule, len(rows), (first_row + rows[:NAMED_IDS]).tolist())] if len(rows) else []


def raise_first_problem(found: Sequence[Problem], kind: type[BssRayError]) -> None:
    """Raise for the first broken rule, with its count and first row ids over all processes.

    Args:
        found: Problems of all processes, in the order of their rows.
        kind: Type of the error.

    Raises:
        BssRayError: There is a problem; the error has the type `kind`.
    """
    if not found:
        return
    rule = found[0].rule
    same = [problem for problem in found if problem.rule.split(":")[0] == rule.split(":")[0]]
    count = sum(problem.count for problem in same)
    ids = [row for problem in same for row in problem.first_ids][:NAMED_IDS]
    if not ids:
        raise kind(rule)
    raise kind(f"{rule} ({count} {'row' if count == 1 else 'rows'}; first row ids {', '.join(map(str, ids))})")


def optional_import(module: str, *, extra: str, needed_for: str) -> ModuleType:
    """Import an optional dependency, or say which extra installs it.

    Raises:
        MissingDependencyError: The package of `module` is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{needed_for} needs the package {module.split('.')[0]!r}, which is not installed. "
            f"Install it with: pip install 'bss_ray[{extra}]'"
        ) from error
