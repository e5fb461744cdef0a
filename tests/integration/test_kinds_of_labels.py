"""The default loop over every kind of label, with rows that lack a modality, and each engine."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import ray.data
import ray.train

import bss_ray
from bss_ray.data.build import build_shards
from bss_ray.data.shards import Shards
from bss_ray.runtime.messages import EpochFinished
from bss_ray.sample.state import ScoreBlock
from bss_ray.train.loop import LoopArgs, LoopConfig, ModelSpec, default_loop
from tests.support import state_of

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

ROWS, ONLY_AUDIO, ONLY_IMAGE = 120, range(15), range(15, 30)


def make_shards(task: Any) -> Shards:
    """Two noisy views of four numbers; labels are what can be read from them; some rows lack a view."""
    rng = np.random.default_rng(3)
    hidden = rng.normal(size=(ROWS, 4))
    labels = {
        "multiclass": hidden.argmax(1),
        "multilabel": (hidden > 0).astype(np.int64),
        "regression": hidden[:, :2].astype(np.float32),
    }[task]
    rows: list[dict[str, Any]] = [
        {
            "audio": None if row in ONLY_IMAGE else (hidden[row] + rng.normal(0, 0.5, 4)).astype(np.float32),
            "image": None if row in ONLY_AUDIO else (hidden[row] + rng.normal(0, 0.1, 4)).astype(np.float32),
            "label": labels[row],
        }
        for row in range(ROWS)
    ]
    columns = bss_ray.Columns(modalities=("audio", "image"), task=task)
    return build_shards(ray.data.from_items(rows, override_num_blocks=4), columns, min_shards=2)


@pytest.mark.parametrize(
    ("task", "engine", "criteria"),
    [
        ("multiclass", "online", ("feature", "gradient_norm")),
        ("multilabel", "workers", ("prediction", "full_gradient_norm")),
        ("regression", "actors", ("prediction", "gradient_norm")),
    ],
)
def test_training(task: Any, engine: Any, criteria: tuple[str, str], tmp_path: Path) -> None:
    shards = make_shards(task)
    assert {"has_audio", "has_image"} <= shards.features.keys()
    losses: list[float] = []
    parts: list[ScoreBlock] = []

    def loop(args: LoopArgs) -> None:
        default_loop(args)
        sampler = bss_ray.get_sampler()
        parts.append(state_of(sampler._context.coordinator, sampler.position.version))

    result = bss_ray.BalancedTrainer(
        loop,
        dataset=shards,
        validation=shards,
        scheduler=bss_ray.Learning(temperature=0.5, fraction=0.8),
        measurer=bss_ray.Measurer(similarity=criteria[0], information=criteria[1]),
        scoring=bss_ray.Scoring(engine=engine, normalise="rank", unpaired="lowest"),
        batch_size=20,
        train_loop_config=LoopArgs(loop=LoopConfig(epochs=5, lr=0.01), model=ModelSpec(), seed=0),
        scaling_config=ray.train.ScalingConfig(num_workers=0),
        run_config=ray.train.RunConfig(name="run", storage_path=str(tmp_path)),
        on_message=lambda m: losses.append(m.row["train_loss"]) if isinstance(m, EpochFinished) else None,
    ).fit()
    assert losses[-1] < 0.8 * losses[0]
    assert result.metrics["unscored_rows"] == 0
    similarity, score = parts[0].similarity, parts[0].score
    # One modality: no similarity, and the lowest place; but its information counts.
    assert np.flatnonzero(np.isnan(similarity)).tolist() == [*ONLY_AUDIO, *ONLY_IMAGE]
    assert np.isfinite(score).all()
    assert score[:30].max() <= 0 < score[30:].max()
