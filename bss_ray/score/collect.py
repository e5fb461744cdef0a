"""The results of the actors of `score_dataset`: blocks of measures, each with a report on its rows."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray

from bss_ray.errors import DataError, ModelOutputError, Problem, raise_first_problem
from bss_ray.measure.normalise import Normalise
from bss_ray.measure.score import Unpaired
from bss_ray.runtime.wait import wait_for
from bss_ray.score.measuring import Measured, Norms, check_pairs, kept_notice
from bss_ray.scoring.config import BadRows

# Column of an actor's report on a block, in the block's first row: an actor does not know the ids of its rows, and
# the driver does not see what an actor returns.
REPORT = "__report"

# Most blocks that one task reads.
_GROUP = 64

# Most bad rows that are named.
_NAMED = 5


def with_report(found: Measured, rows: int) -> pa.Table:
    """The measures of a block, and the report on them. Row ids in it count from the block's first row."""
    text = None
    if found.problems or found.notices:
        problems = [[problem.rule, problem.count, problem.first_ids] for problem in found.problems]
        text = json.dumps({"problems": problems, "sound_data": found.sound_data, "notices": found.notices})
    report = pa.array([text, *[None] * (rows - 1)], pa.string())
    return pa.table({REPORT: report}) if found.table is None else found.table.append_column(REPORT, report)


@dataclass
class Look:
    """Summary of some blocks.

    Attributes:
        norms: Norms of the blocks' measures.
        data_problems: Rules for data that rows break.
        output_problems: Problem of the rows whose outputs are not finite.
        notices: Messages to the user.
    """

    norms: list[Norms] = field(default_factory=list)
    data_problems: list[Problem] = field(default_factory=list)
    output_problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def add(self, table: pa.Table, first_row: int, normalise: Normalise, unpaired: Unpaired) -> None:
        """Add one more block."""
        sound = True
        for place, text in enumerate(table[REPORT].to_pylist()):
            if text is not None:
                sound &= self._read(json.loads(text), first_row + place)
        if sound:
            self.data_problems += check_pairs(table, first_row, unpaired)
            self.norms.append(Norms.of(table, normalise))

    def _read(self, said: dict[str, Any], first_row: int) -> bool:
        """Add a report; returns whether the data break no rule."""
        sound: bool = said["sound_data"]
        target = self.output_problems if sound else self.data_problems
        target += [Problem(rule, count, [first_row + row for row in ids]) for rule, count, ids in said["problems"]]
        self.notices += said["notices"]
        return sound


class Collector:
    """Collects the blocks of the first pass, and raises for the first problem while other blocks are still measured.

    One task at a time reads the blocks that have arrived: more tasks would take CPUs from the measuring, just for
    starting processes.
    """

    def __init__(self, bad_rows: BadRows, normalise: Normalise, unpaired: Unpaired) -> None:
        self.blocks: list[tuple[Any, int]] = []
        self._bad_rows = bad_rows
        self._settings = (normalise, unpaired)
        self._begun = 0
        self._running: Any = None
        self._norms: list[Norms] = []
        self._said: set[str] = set()
        self._kept, self._kept_ids = 0, list[int]()

    @property
    def norms(self) -> Norms:
        """Norms over all rows."""
        return Norms.union(self._norms)

    def add(self, ref: Any, first_row: int) -> None:
        """Add the next block.

        Raises:
            BssRayError: Rows of an earlier block break a rule.
        """
        self.blocks.append((ref, first_row))
        self._advance(wait=False)

    def finish(self) -> None:
        """Finish after the last block.

        Raises:
            BssRayError: Rows break a rule, or there are no rows.
        """
        if not self.blocks:
            raise DataError("the dataset has no rows. Check the path, or the filter that left none")
        while self._running is not None or self._begun < len(self.blocks):
            self._advance(wait=True)
        if self._kept:
            self._say(kept_notice(self._kept, self._kept_ids))

    def _advance(self, *, wait: bool) -> None:
        if self._running is not None and (wait or ray.wait([self._running], timeout=0)[0]):
            look, self._running = wait_for(self._running, "a look at the measures"), None
            self._judge(look)
        if self._running is None and self._begun < len(self.blocks):
            group = self.blocks[self._begun : self._begun + _GROUP]
            self._begun += len(group)
            first_rows = [first_row for _, first_row in group]
            # No CPU, because Ray Data may hold all CPUs.
            self._running = _look.options(num_cpus=0).remote(first_rows, *self._settings, *(ref for ref, _ in group))

    def _judge(self, look: Look) -> None:
        """Raise for problems that are errors, and remember the others."""
        for notice in look.notices:
            self._say(notice)
        raise_first_problem(look.data_problems, DataError)
        if self._bad_rows == "error":
            raise_first_problem(look.output_problems, ModelOutputError)
        for problem in look.output_problems:
            self._kept += problem.count
            self._kept_ids += problem.first_ids[: _NAMED - len(self._kept_ids)]
        self._norms += look.norms

    def _say(self, notice: str) -> None:
        """Log each notice once."""
        if notice not in self._said:
            logging.getLogger("bss_ray").warning(notice)
            self._said.add(notice)


@ray.remote(name="bss_ray.look_at_measures")
def _look(first_rows: list[int], normalise: Normalise, unpaired: Unpaired, *tables: pa.Table) -> Look:
    """Norms and reports of blocks."""
    look = Look()
    for first_row, table in zip(first_rows, tables, strict=True):
        look.add(table, first_row, normalise, unpaired)
    look.norms = [Norms.union(look.norms)] if look.norms else []
    return look
