"""What an actor makes of rows: tables of measures, nulls, other kinds of labels, memory that runs out."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from bss_ray.data.columns import Columns
from bss_ray.errors import ConfigError
from bss_ray.measure.measurer import Measurer
from bss_ray.measure.score import ScoreRule
from bss_ray.measure.snapshot import pack_model
from bss_ray.score.dataset import look_at_block, with_report
from bss_ray.score.measuring import BAD_OUTPUTS, Look, Measured, Measuring, RowMeasurer
from bss_ray.score.read_tasks import read_rows
from bss_ray.scoring.config import ScoringPass
from tests.scoring import COLUMNS, make_columns, make_recorder, make_table

ROWS = 50


def measure(model: nn.Module, table: pa.Table, first_row: int = 0, **settings: Any) -> Measured:
    measuring = Measuring(**{"columns": COLUMNS, **settings})
    rows = read_rows([table], measuring.columns, first_row, {}, finite=False)
    assert rows.problems == []
    return RowMeasurer(pack_model(model), measuring).measure(rows.arrays, first_row)


class Small(nn.Module):
    """Has memory for eight rows at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_recorder()

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if len(batch["label"]) > 8:
            raise torch.OutOfMemoryError("no memory")
        outputs: dict[str, torch.Tensor] = self.inner(batch)
        return outputs


def test_memory_that_runs_out_is_told_by_this_command_s_setting() -> None:
    table = make_table(make_columns(ROWS))
    found = measure(Small(), table, forward=ScoringPass(batch_size=32))
    assert [text.split("with")[1].strip() for text in found.notices[:1]] == ["batches of 32 rows and continues"]
    assert all("Lower batch_size to begin there" in text for text in found.notices)
    assert found.table is not None
    whole = measure(make_recorder(), table).table
    assert whole is not None
    np.testing.assert_allclose(found.table["information"].to_numpy(), whole["information"].to_numpy(), rtol=1e-5)


def test_bad_rows_have_no_measures_and_are_named() -> None:
    columns = make_columns(ROWS)
    columns["b"][[3, 4]] = 1e38
    found = measure(make_recorder(), make_table(columns), first_row=100)
    (problem,) = found.problems
    assert (problem.rule, problem.count, problem.first_ids) == (BAD_OUTPUTS, 2, [103, 104])
    assert found.table is not None
    for name in ("similarity", "information", "loss_a", "loss_b"):
        assert np.flatnonzero(found.table[name].is_null().to_numpy()).tolist() == [3, 4], name
    assert found.table["name"].null_count == 0


def test_a_modality_that_is_not_there_has_no_loss() -> None:
    gone = np.arange(ROWS) % 5 == 0
    table = measure(make_recorder(), make_table(make_columns(ROWS), {"a": gone})).table
    assert table is not None
    for name in ("similarity", "loss_a"):
        np.testing.assert_array_equal(table[name].is_null().to_numpy(), gone)
    assert table["information"].null_count == table["loss_b"].null_count == 0


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_other_kinds_of_labels(task: Any) -> None:
    columns = make_columns(ROWS)
    label = np.eye(3, dtype=np.float32)[columns["label"]]
    table = make_table(columns).drop_columns(["label"])
    table = table.append_column("label", pa.array(label.tolist(), pa.list_(pa.float32())))
    found = measure(make_recorder(), table, columns=Columns(modalities=("a", "b"), id="name", task=task))
    assert found.table is not None
    assert found.table.column_names == ["name", "similarity", "information", "loss_a", "loss_b"]
    assert np.isfinite(found.table["information"].to_numpy()).all()


def test_labels_beyond_the_heads_are_found_before_the_loss() -> None:
    columns = make_columns(ROWS)
    columns["label"][20] = 3
    found = measure(make_recorder(), make_table(columns), first_row=1000)
    assert found.table is None
    assert found.problems[0].first_ids == [1020]


def test_reports_name_rows_of_the_whole_data_set() -> None:
    columns = make_columns(ROWS)
    columns["b"][7] = 1e38
    good, bad = measure(make_recorder(), make_table(make_columns(ROWS))), measure(make_recorder(), make_table(columns))
    # Ray Data may join what two calls of an actor return.
    table = pa.concat_tables([with_report(good, ROWS), with_report(bad, ROWS)])
    look = Look()
    look_at_block(look, table, 500, ScoreRule(unpaired="error"))
    assert [problem.first_ids for problem in look.output_problems] == [[500 + ROWS + 7]]
    assert look.data_problems == []


def test_a_block_that_breaks_a_rule_for_data_has_no_measures() -> None:
    columns = make_columns(ROWS)
    columns["label"][20] = 3
    look = Look()
    look_at_block(look, with_report(measure(make_recorder(), make_table(columns)), ROWS), 500, ScoreRule())
    assert ([problem.first_ids for problem in look.data_problems], look.norms) == ([[520]], [])


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="did you mean 'keep'"):
        ScoringPass(bad_rows="kep")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="task='regression'"):
        Measuring(columns=COLUMNS, measurer=Measurer(task="regression"))
