"""What a trial is worth: metrics and their directions, the chosen epoch, the weaker modality, several seeds."""

import math
from typing import Any

import pytest

from bss_ray.data.columns import Columns
from bss_ray.errors import ConfigError
from bss_ray.tune.objective import Objective

COLUMNS = Columns(modalities=("audio", "image"))
NUMBERS = Columns(modalities=("audio", "image"), task="regression")
NAN = float("nan")


def row(epoch: int, *, fused: float, audio: float = 0.0, image: float = 0.0, seconds: float = 1.0) -> dict[str, Any]:
    parts = {"seconds_scoring": seconds, "seconds_planning": seconds / 2, "seconds_training": seconds / 4}
    found: dict[str, Any] = {"epoch": epoch, **parts}
    for metric in ("accuracy", "f1", "mae", "r2"):
        for head, value in (("fused", fused), ("audio", audio), ("image", image)):
            found[f"val_{metric}_{head}"] = value
    return found


def of(*metrics: str, choose_by: str | None = None, columns: Columns = COLUMNS, aggregate: str = "mean") -> Objective:
    return Objective.of(metrics or None, choose_by, columns, aggregate)


# ---- names and directions -------------------------------------------------------------------------


def test_by_default_it_is_what_chooses_the_epoch() -> None:
    assert of().metrics == ("val_accuracy_fused",)
    assert of(choose_by="val_f1_image").metrics == ("val_f1_image",)
    assert of(columns=NUMBERS).metrics == ("val_r2_fused",)


@pytest.mark.parametrize(
    ("metric", "columns", "direction", "mode"),
    [
        ("val_accuracy_fused", COLUMNS, "maximize", "max"),
        ("val_f1_weaker", COLUMNS, "maximize", "max"),
        ("seconds", COLUMNS, "minimize", "min"),
        ("val_r2_fused", NUMBERS, "maximize", "max"),
        ("val_mae_fused", NUMBERS, "minimize", "min"),
        ("val_rmse_weaker", NUMBERS, "minimize", "min"),
        ("val_mae_mean", NUMBERS, "minimize", "min"),
    ],
)
def test_directions(metric: str, columns: Columns, direction: str, mode: str) -> None:
    objective = of(metric, columns=columns)
    assert (objective.directions, objective.mode) == ([direction], mode)


def test_several_have_a_direction_each() -> None:
    objective = of("val_accuracy_fused", "seconds")
    assert objective.directions == ["maximize", "minimize"]
    assert objective.mode == "max"


@pytest.mark.parametrize(
    ("metrics", "choose_by", "said"),
    [
        (
            ["val_acuracy_fused"],
            None,
            "metrics: 'val_acuracy_fused' is no validation metric; did you mean 'val_accuracy_",
        ),
        (["val_accuracy_weeker"], None, "did you mean 'val_accuracy_weaker'?"),
        (["second"], None, "did you mean 'seconds'?"),
        (["val_mae_fused"], None, "is no validation metric"),
        (["test_accuracy_fused"], None, "is no validation metric"),
        (["seconds", "seconds"], None, "metrics must differ; received ['seconds', 'seconds']"),
        (["seconds"], "val_acuracy_fused", "choose_by='val_acuracy_fused' is no validation metric; did you mean"),
        (None, "seconds", "choose_by='seconds' is no validation metric"),
    ],
)
def test_names_of_no_metric(metrics: list[str] | None, choose_by: str | None, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Objective.of(metrics, choose_by, COLUMNS, "mean")
    assert said in str(raised.value)


# ---- of one run -----------------------------------------------------------------------------------


def test_values_are_of_the_best_epoch_and_seconds_of_all() -> None:
    history = [
        row(0, fused=0.5, audio=0.9, image=0.4),
        row(1, fused=0.8, audio=0.3, image=0.7, seconds=2),
        row(2, fused=0.6),
    ]
    objective = of("val_f1_fused", "val_f1_weaker", "seconds", choose_by="val_accuracy_fused")
    assert objective.values(history) == [0.8, 0.3, pytest.approx(4 * 1.75)]
    assert objective.best_epoch(history) == 1
    assert objective.values(history[:1]) == [0.5, 0.4, 1.75], "so far"


def test_of_an_error_the_lowest_epoch_and_the_higher_modality() -> None:
    history = [row(0, fused=0.5), row(1, fused=0.2, audio=0.3, image=0.7), row(2, fused=0.3)]
    objective = of("val_mae_fused", "val_mae_weaker", "val_r2_weaker", choose_by="val_mae_fused", columns=NUMBERS)
    assert objective.best_epoch(history) == 1
    assert objective.values(history) == [0.2, 0.7, 0.3]


@pytest.mark.parametrize("choose_by", ["val_r2_fused", "val_mae_fused"])
@pytest.mark.parametrize(
    ("values", "best"),
    [([0.5, 0.5, 0.5], 0), ([NAN, 0.5, 0.5], 1), ([0.5, NAN, NAN], 0), ([NAN, NAN], 0), ([math.inf, 0.1], 1)],
    ids=str,
)
def test_of_equal_epochs_the_first_and_never_nan(choose_by: str, values: list[float], best: int) -> None:
    objective = of(choose_by=choose_by, columns=NUMBERS)
    assert objective.best_epoch([row(epoch, fused=value) for epoch, value in enumerate(values)]) == best


def test_a_run_of_nan_is_worth_nan() -> None:
    assert math.isnan(of().values([row(0, fused=NAN), row(1, fused=NAN)])[0])


@pytest.mark.parametrize(("audio", "image"), [(NAN, 0.5), (0.5, NAN)])
@pytest.mark.parametrize("metric", ["val_r2_weaker", "val_mae_weaker"])
def test_a_modality_of_nan_is_the_weaker_one(metric: str, audio: float, image: float) -> None:
    assert math.isnan(of(metric, columns=NUMBERS).values([row(0, fused=0.5, audio=audio, image=image)])[0])


# ---- of several seeds -----------------------------------------------------------------------------


def test_the_mean_over_seeds() -> None:
    assert of("val_accuracy_fused", "seconds").combine([[0.5, 10], [0.7, 20]]) == pytest.approx([0.6, 15])


def test_the_bound_on_the_worse_side() -> None:
    objective = of("val_r2_fused", "val_mae_fused", "seconds", columns=NUMBERS, aggregate="lower")
    seeds = [[0.5, 0.5, 5.0], [0.6, 0.6, 6.0], [0.7, 0.7, 7.0]]
    half = 4.3027 * 0.1 / math.sqrt(3)  # t of two degrees of freedom, from a table
    assert objective.combine(seeds) == pytest.approx([0.6 - half, 0.6 + half, 6 + 10 * half], abs=1e-4)
    assert objective.combine(seeds[:1]) == [0.5, 0.5, 5.0], "one seed has no interval"
    assert objective.combine([[0.5, 0.5, 5.0]] * 4) == pytest.approx([0.5, 0.5, 5.0])


@pytest.mark.parametrize("aggregate", ["mean", "lower"])
def test_a_seed_of_nan_is_not_forgotten(aggregate: str) -> None:
    assert math.isnan(of(aggregate=aggregate).combine([[0.5], [NAN], [0.7]])[0])
