"""The default loop over every kind of label, with rows that lack a modality, and each engine."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bss_ray
from bss_ray.data.arrays import shards_of_arrays
from bss_ray.data.shards import Shards
from bss_ray.runtime.messages import EpochFinished
from bss_ray.sample.state import ScoreBlock
from bss_ray.testing import LocalCluster
from bss_ray.train.loop import LoopArgs, LoopConfig, ModelSpec, default_loop
from tests.support import state_of

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
    there = {"audio": ~np.isin(np.arange(ROWS), ONLY_IMAGE), "image": ~np.isin(np.arange(ROWS), ONLY_AUDIO)}
    views = {name: hidden + rng.normal(0, noise, (ROWS, 4)) for name, noise in (("audio", 0.5), ("image", 0.1))}
    columns = {name: (view * there[name][:, None]).astype(np.float32) for name, view in views.items()}
    columns |= {"label": labels, **{f"has_{name}": present for name, present in there.items()}}
    return shards_of_arrays(columns, bss_ray.Columns(modalities=("audio", "image"), task=task), nodes=("", ""))


@pytest.mark.parametrize(
    ("task", "engine", "criteria"),
    [
        ("multiclass", "online", ("feature", "gradient_norm")),
        ("multilabel", "workers", ("prediction", "full_gradient_norm")),
        ("regression", "actors", ("prediction", "gradient_norm")),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_training(ranks: int, task: Any, engine: Any, criteria: tuple[str, str], tmp_path: Path) -> None:
    shards = make_shards(task)
    assert {"has_audio", "has_image"} <= shards.features.keys()
    losses: list[float] = []
    parts: list[ScoreBlock] = []

    def loop(args: LoopArgs) -> None:
        default_loop(args)
        sampler = bss_ray.get_sampler()
        if sampler.rank == 0:
            parts.append(state_of(sampler._context.coordinator, sampler.position.version))

    cluster = LocalCluster(
        shards,
        tmp_path,
        ranks=ranks,
        validation=shards,
        scheduler=bss_ray.Learning(temperature=0.5, fraction=0.8),
        measurer=bss_ray.Measurer(similarity=criteria[0], information=criteria[1]),
        scoring=bss_ray.Scoring(engine=engine, normalise="rank", unpaired="lowest"),
        batch_size=20,
        on_message=lambda m: losses.append(m.row["train_loss"]) if isinstance(m, EpochFinished) else None,
    )
    result = cluster.run(loop, LoopArgs(loop=LoopConfig(epochs=5, lr=0.01), model=ModelSpec(), seed=0))
    assert losses[-1] < 0.8 * losses[0]
    assert result.metrics["unscored_rows"] == 0
    similarity, score = parts[0].similarity, parts[0].score
    # One modality: no similarity, and the lowest place; but its information counts.
    assert np.flatnonzero(np.isnan(similarity)).tolist() == [*ONLY_AUDIO, *ONLY_IMAGE]
    assert np.isfinite(score).all()
    assert score[:30].max() <= 0 < score[30:].max()
