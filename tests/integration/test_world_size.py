"""What an epoch presents depends on neither the ranks, holders and shards nor on where rows are kept."""

from pathlib import Path

import pytest

from bss_ray import Scoring
from bss_ray.data.store import StoreConfig
from tests.runs import BATCH, ROWS, make_shards, run

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def test_global_batches_are_the_same_for_1_2_and_4_ranks(tmp_path: Path) -> None:
    # Without dropout only the rounding of gradients differs between the runs; it moves scores by
    # about 1e-7 of their range, far below the distance between two of the 203 keys.
    on_disk = StoreConfig(kind="disk", folder=str(tmp_path / "cache"))
    outcomes = [
        run(
            tmp_path / str(ranks),
            make_shards(shards, store),
            workers=ranks,
            scoring=Scoring(engine=engine, num_holders=holders, momentum=0.5),  # type: ignore[arg-type]
            epochs=2,
            dropout=0.0,
        )
        for ranks, shards, holders, engine, store in (
            (1, 1, 1, "actors", None),
            (2, 3, 2, "workers", on_disk),
            (4, 5, 3, "workers", None),
        )
    ]
    first = outcomes[0].batches
    # The first epoch is burn-in: all rows once. The second is drawn from the scores of the model.
    for epoch, size in ((0, ROWS), (1, round(0.9 * ROWS))):
        rows = [row for (at, _), batch in first.items() if at == epoch for row in batch]
        assert len(rows) == len(set(rows)) == size
        assert sorted(number for at, number in first if at == epoch) == list(range(-(-size // BATCH)))
    assert outcomes[1].batches == first
    assert outcomes[2].batches == first
    for other in outcomes[1:]:
        assert other.metrics["weight"] == pytest.approx(outcomes[0].metrics["weight"], rel=1e-4)
