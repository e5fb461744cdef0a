"""What an epoch presents does not depend on how many ranks, scorers and shards there are."""

from pathlib import Path

import pytest

from tests.runs import BATCH, ROWS, make_shards, run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]


def test_global_batches_are_the_same_for_1_2_and_4_ranks(tmp_path: Path) -> None:
    # Other numbers of shards and scorers too: only rounding may tell the runs apart, and does not
    # reach the order (all three score the same rows in batches larger than a shard).
    outcomes = {
        ranks: run(tmp_path / str(ranks), make_shards(shards), workers=ranks, scorers=scorers, epochs=2)
        for ranks, shards, scorers in ((1, 1, 1), (2, 3, 2), (4, 3, 3))
    }
    first = outcomes[1].batches
    # The first epoch is burn-in: all rows once. The second is drawn from the scores of the model.
    for epoch, size in ((0, ROWS), (1, round(0.9 * ROWS))):
        rows = [row for (at, _), batch in first.items() if at == epoch for row in batch]
        assert len(rows) == len(set(rows)) == size
        numbers = sorted(number for at, number in first if at == epoch)
        assert numbers == list(range(-(-size // BATCH)))
        for ranks in (2, 4):
            theirs = {key: rows for key, rows in outcomes[ranks].batches.items() if key[0] == epoch}
            assert theirs.keys() == {key for key in first if key[0] == epoch}
            if epoch == 0:
                assert theirs == {key: first[key] for key in theirs}
    # With other ranks dropout draws other numbers, so the models and thus the scored epoch differ;
    # the number of rows and their uniqueness must not.
    for ranks in (2, 4):
        rows = [row for (at, _), batch in outcomes[ranks].batches.items() if at == 1 for row in batch]
        assert len(rows) == len(set(rows)) == round(0.9 * ROWS)
