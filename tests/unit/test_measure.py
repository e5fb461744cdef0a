"""Measures and balance scores, against a straight-line computation that takes nothing from the package."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bss_ray.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelOutputError,
    WeightError,
    raise_first_problem,
)
from bss_ray.measure.forward import Forward, autocast, evaluating
from bss_ray.measure.measurer import Measurer, per_row_loss
from bss_ray.measure.score import Accumulation, balance_scores
from bss_ray.measure.snapshot import pack_model, unpack_model, unwrap_model
from bss_ray.sample.client import LocalHolders
from bss_ray.sample.coordinator import Coordinator
from bss_ray.sample.holder import Holder
from bss_ray.sample.state import MeasureBatch, ScoreBlock
from bss_ray.schedule import Learning
from bss_ray.scoring.scorer import Scorer

# ---- the method once more, a row at a time, in float64 ------------------------------------------


def reference_softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def reference_cross_entropy(logits: np.ndarray, label: int) -> float:
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label])


def reference_measures(
    outputs: Mapping[str, np.ndarray], labels: np.ndarray, fused_weight: float, unimodal_weight: float
) -> tuple[np.ndarray, np.ndarray]:
    modalities = [name for name in outputs if name != "fused"]
    similarity, information = [], []
    for row, label in enumerate(labels):
        predictions = [reference_softmax(outputs[name][row].astype(np.float64)) for name in modalities]
        cosines = []
        for m in range(len(predictions)):
            for n in range(m + 1, len(predictions)):
                a, b = predictions[m], predictions[n]
                cosines.append(a @ b / (math.sqrt(a @ a) * math.sqrt(b @ b)))
        similarity.append(sum(cosines) / len(cosines))
        loss = fused_weight * reference_cross_entropy(outputs["fused"][row].astype(np.float64), label)
        for name in modalities:
            loss += unimodal_weight * reference_cross_entropy(outputs[name][row].astype(np.float64), label)
        information.append(loss)
    return np.array(similarity), np.array(information)


def reference_norm(column: np.ndarray) -> np.ndarray:
    low, high = column.min(), column.max()
    return np.zeros(len(column)) if high == low else (column - low) / (high - low)


def reference_scores(
    updates: list[tuple[np.ndarray, np.ndarray]], momentum: float, accumulate: str = "ema"
) -> list[np.ndarray]:
    """Scores after each of some updates, from their raw measures."""
    currents = [reference_norm(similarity) - reference_norm(information) for similarity, information in updates]
    scores = [currents[0]]
    for index, current in enumerate(currents[1:], start=2):
        if accumulate == "sum":
            scores.append(np.sum(currents[:index], axis=0) / index)
        else:
            scores.append(momentum * scores[-1] + (1 - momentum) * current)
    return scores


def make_outputs(rows: int, modalities: int, seed: int, classes: int = 5) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    names = ["audio", "image", "text"][:modalities]
    outputs = {name: rng.normal(0, 2, (rows, classes)).astype(np.float32) for name in (*names, "fused")}
    return outputs, rng.integers(0, classes, rows)


def as_tensors(outputs: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(logits) for name, logits in outputs.items()}


all_cases = pytest.mark.parametrize(
    ("modalities", "weights", "momentum"),
    [(m, w, mu) for m in (2, 3) for w in ((0.1, 0.9), (1.0, 1.0)) for mu in (0.0, 0.6)],
)


# ---- measures and scores ------------------------------------------------------------------------


class TestAgainstReference:
    @all_cases
    def test_several_updates(self, modalities: int, weights: tuple[float, float], momentum: float) -> None:
        measurer = Measurer(fused_weight=weights[0], unimodal_weight=weights[1])
        expected_measures, score = [], None
        for update in range(4):
            outputs, labels = make_outputs(97, modalities, seed=update)
            measures = measurer.measure(as_tensors(outputs), torch.from_numpy(labels))
            expected_measures.append(reference_measures(outputs, labels, *weights))
            np.testing.assert_allclose(measures.similarity.numpy(), expected_measures[-1][0], atol=1e-6)
            np.testing.assert_allclose(measures.information.numpy(), expected_measures[-1][1], rtol=1e-6, atol=1e-6)

            score = balance_scores(
                measures.similarity.numpy(), measures.information.numpy(), previous=score, momentum=momentum
            )
            np.testing.assert_allclose(score, reference_scores(expected_measures, momentum)[-1], atol=1e-6)

    def test_accumulate_sum(self) -> None:
        measurer, measured, score = Measurer(), [], None
        for update in range(4):
            outputs, labels = make_outputs(50, 2, seed=10 + update)
            measures = measurer.measure(as_tensors(outputs), torch.from_numpy(labels))
            measured.append(reference_measures(outputs, labels, 0.1, 0.9))
            score = balance_scores(
                measures.similarity.numpy(),
                measures.information.numpy(),
                previous=score,
                accumulate="sum",
                updates=max(update, 1),
            )
        np.testing.assert_allclose(score, reference_scores(measured, 0.0, "sum")[-1], atol=1e-6)

    def test_training_loss_is_the_information(self) -> None:
        outputs, labels = make_outputs(20, 3, seed=0)
        tensors = {name: logits.requires_grad_() for name, logits in as_tensors(outputs).items()}
        measurer = Measurer(fused_weight=0.4, unimodal_weight=2.0)
        loss = measurer.loss(tensors, torch.from_numpy(labels))
        expected = reference_measures(outputs, labels, 0.4, 2.0)[1]
        np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-6, atol=1e-6)
        loss.mean().backward()
        assert all(logits.grad is not None and logits.grad.abs().sum() > 0 for logits in tensors.values())
        again = per_row_loss(tensors, torch.from_numpy(labels), fused_weight=0.4, unimodal_weight=2.0)
        assert torch.equal(again, loss)


class TestBalanceScores:
    def test_known_numbers(self) -> None:
        score = balance_scores(np.array([0.2, 0.6, 1.0]), np.array([3.0, 1.0, 5.0]))
        assert score.tolist() == pytest.approx([0.0 - 0.5, 0.5 - 0.0, 1.0 - 1.0])

    @pytest.mark.parametrize("constant", [0.0, 0.3, 7.0])
    def test_constant_column_counts_nothing(self, constant: float) -> None:
        column = np.array([1.0, 3.0, 2.0])
        flat = np.full(3, constant)
        assert balance_scores(column, flat).tolist() == [0.0, 1.0, 0.5]
        assert balance_scores(flat, column).tolist() == [0.0, -1.0, -0.5]
        assert balance_scores(flat, flat).tolist() == [0.0, 0.0, 0.0]

    def test_one_row(self) -> None:
        assert balance_scores(np.array([0.4]), np.array([2.0])).tolist() == [0.0]

    def test_range_and_dtype(self) -> None:
        rng = np.random.default_rng(0)
        score = None
        for _ in range(5):
            score = balance_scores(
                rng.random(200).astype(np.float32), rng.exponential(size=200), previous=score, momentum=0.9
            )
            assert score.dtype == np.float32  # what holders keep
            assert score.min() >= -1
            assert score.max() <= 1

    def test_momentum_zero_forgets(self) -> None:
        similarity, information = np.array([0.1, 0.9]), np.array([1.0, 2.0])
        fresh = balance_scores(similarity, information)
        assert balance_scores(similarity, information, np.array([5.0, -5.0])).tolist() == fresh.tolist()

    def test_previous_is_left_alone(self) -> None:
        previous = np.array([0.5, -0.5])
        balance_scores(np.array([0.1, 0.9]), np.array([1.0, 2.0]), previous, momentum=0.5)
        assert previous.tolist() == [0.5, -0.5]

    @pytest.mark.parametrize(
        "columns",
        [(np.zeros(3), np.zeros(4)), (np.zeros(4), np.zeros(4), np.zeros(3))],
        ids=["information", "previous"],
    )
    def test_lengths_differ(self, columns: tuple[np.ndarray, ...]) -> None:
        with pytest.raises(WeightError, match=r"3.*4|4.*3"):
            balance_scores(*columns)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("name", ["similarity", "information"])
    def test_not_finite(self, name: str, bad: float) -> None:
        columns = {"similarity": np.linspace(0, 1, 9), "information": np.linspace(1, 2, 9)}
        columns[name][[2, 6]] = bad
        with pytest.raises(WeightError, match=f"{name} must be finite.*2 rows.*2, 6"):
            balance_scores(**columns)

    @pytest.mark.parametrize("momentum", [-0.1, 1.0, 1.5, math.nan])
    def test_momentum_out_of_range(self, momentum: float) -> None:
        with pytest.raises(ConfigError, match=rf"momentum.*\[0, 1\).*{momentum}"):
            balance_scores(np.zeros(2), np.zeros(2), momentum=momentum)
        with pytest.raises(ConfigError, match=rf"momentum.*{momentum}"):
            Accumulation(momentum=momentum)

    def test_unknown_accumulate(self) -> None:
        with pytest.raises(ConfigError, match="'emma'; did you mean 'ema'"):
            balance_scores(np.zeros(2), np.zeros(2), accumulate="emma")  # type: ignore[arg-type]

    def test_setting_without_effect(self) -> None:
        with pytest.raises(ConfigError, match=r"momentum=0.5 has no effect"):
            balance_scores(np.zeros(2), np.zeros(2), momentum=0.5, accumulate="sum")


class TestMeasurer:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_measured_in_single(self, dtype: torch.dtype) -> None:
        outputs, labels = make_outputs(60, 2, seed=1)
        halves = {name: logits.to(dtype) for name, logits in as_tensors(outputs).items()}
        measures = Measurer().measure(halves, torch.from_numpy(labels))
        # The rounded logits are the input; from there on nothing more may be lost.
        rounded = {name: logits.float().numpy() for name, logits in halves.items()}
        similarity, information = reference_measures(rounded, labels, 0.1, 0.9)
        assert measures.similarity.dtype == measures.information.dtype == torch.float32
        np.testing.assert_allclose(measures.similarity.numpy(), similarity, atol=1e-6)
        np.testing.assert_allclose(measures.information.numpy(), information, rtol=1e-6, atol=1e-6)

    def test_no_gradients(self) -> None:
        outputs, labels = make_outputs(6, 2, seed=2)
        tensors = {name: logits.requires_grad_() for name, logits in as_tensors(outputs).items()}
        measures = Measurer().measure(tensors, torch.from_numpy(labels))
        assert not measures.similarity.requires_grad
        assert not measures.information.requires_grad

    def test_large_logits_do_not_overflow(self) -> None:
        logits = torch.tensor([[1000.0, -1000.0], [-1000.0, 1000.0]])
        measures = Measurer(fused_weight=1, unimodal_weight=1).measure(
            {"a": logits, "b": logits, "fused": logits}, torch.tensor([0, 0])
        )
        assert measures.similarity.tolist() == pytest.approx([1.0, 1.0])
        assert measures.information.tolist() == pytest.approx([0.0, 6000.0])

    def test_order_of_keys_does_not_matter(self) -> None:
        outputs, labels = make_outputs(30, 3, seed=3)
        turned = {name: outputs[name] for name in reversed(outputs)}
        first = Measurer().measure(as_tensors(outputs), torch.from_numpy(labels))
        second = Measurer().measure(as_tensors(turned), torch.from_numpy(labels))
        torch.testing.assert_close(first.similarity, second.similarity)
        torch.testing.assert_close(first.information, second.information)

    def test_no_fused(self) -> None:
        with pytest.raises(ModelOutputError, match=r"'fused'; received the keys \['audio', 'image'\]"):
            Measurer().measure({"image": torch.zeros(2, 3), "audio": torch.zeros(2, 3)}, torch.tensor([0, 1]))

    def test_one_modality(self) -> None:
        with pytest.raises(ModelOutputError, match=r"at least two.*\['audio', 'fused'\]"):
            Measurer().measure({"audio": torch.zeros(2, 3), "fused": torch.zeros(2, 3)}, torch.tensor([0, 1]))

    @pytest.mark.parametrize(
        ("a", "b", "fused"),
        [((2, 3), (2, 4), (2, 3)), ((2, 3), (2, 3), (2, 4)), ((3, 3), (2, 3), (2, 3)), ((2,), (2,), (2,))],
    )
    def test_unequal_shapes(self, a: tuple[int, ...], b: tuple[int, ...], fused: tuple[int, ...]) -> None:
        outputs = {"a": torch.zeros(a), "b": torch.zeros(b), "fused": torch.zeros(fused)}
        with pytest.raises(ModelOutputError) as error:
            Measurer().measure(outputs, torch.tensor([0, 1]))
        assert f"'a': {a}" in str(error.value)
        assert f"'fused': {fused}" in str(error.value)

    def test_rows_differ_from_labels(self) -> None:
        outputs = {name: torch.zeros(2, 3) for name in ("a", "b", "fused")}
        with pytest.raises(ModelOutputError, match="B = 3"):
            Measurer().measure(outputs, torch.tensor([0, 1, 2]))

    @pytest.mark.parametrize("outputs", [torch.zeros(2, 3), (torch.zeros(2, 3),) * 3, None])
    def test_not_a_dict(self, outputs: Any) -> None:
        with pytest.raises(ModelOutputError, match=f"must return a dict.*received {type(outputs).__name__}"):
            Measurer().measure(outputs, torch.tensor([0, 1]))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool])
    def test_labels_are_not_classes(self, dtype: torch.dtype) -> None:
        outputs = {name: torch.zeros(2, 3) for name in ("a", "b", "fused")}
        with pytest.raises(DataError, match=f"integer.*{dtype}"):
            Measurer().measure(outputs, torch.tensor([0, 1]).to(dtype))

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
    def test_small_integer_labels_work_like_int64(self, dtype: torch.dtype) -> None:
        # They pass the check of dtypes, so they must not end in an error of torch.
        outputs, labels = make_outputs(8, 2, seed=4)
        wide = Measurer().measure(as_tensors(outputs), torch.from_numpy(labels))
        narrow = Measurer().measure(as_tensors(outputs), torch.from_numpy(labels).to(dtype))
        assert torch.equal(wide.information, narrow.information)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"similarity": "predictions"}, "similarity 'predictions'; did you mean 'prediction'"),
            ({"information": "los"}, "information 'los'; did you mean 'loss'"),
        ],
    )
    def test_unknown_criterion_names_the_nearest(self, settings: dict[str, str], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Measurer(**settings)  # type: ignore[arg-type]

    @pytest.mark.parametrize("weights", [(-0.1, 1.0), (math.nan, 1.0), (1.0, math.inf), (0.0, 0.0)])
    def test_impossible_weights(self, weights: tuple[float, float]) -> None:
        with pytest.raises(ConfigError, match=f"received {weights[0]} and {weights[1]}"):
            Measurer(fused_weight=weights[0], unimodal_weight=weights[1])


# ---- a model over rows --------------------------------------------------------------------------

CLASSES, WIDTH, ROWS = 4, 6, 53


class TinyModel(nn.Module):
    """Two modalities with batch norm and dropout: both betray a forward pass in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.heads = nn.ModuleDict({name: nn.Linear(WIDTH, CLASSES) for name in ("audio", "image")})
        self.fused = nn.Linear(2 * WIDTH, CLASSES)
        self.batches: list[tuple[int, bool]] = []
        self.row_ids: list[int] = []

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.batches.append((len(batch["row_id"]), self.training))
        self.row_ids += batch["row_id"].tolist()
        features = {name: self.dropout(self.norm(batch[name])) for name in self.heads}
        outputs = {name: head(features[name]) for name, head in self.heads.items()}
        return {**outputs, "fused": self.fused(torch.cat(list(features.values()), dim=1))}


def make_model(seed: int) -> TinyModel:
    torch.manual_seed(seed)
    model = TinyModel()
    model.norm.running_mean.normal_()  # type: ignore[union-attr]
    model.norm.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return model


def make_columns(rows: int = ROWS, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    columns: dict[str, np.ndarray] = {
        name: rng.normal(0, 1.5, (rows, WIDTH)).astype(np.float32) for name in ("audio", "image")
    }
    columns["label"] = rng.integers(0, CLASSES, rows)
    for values in columns.values():
        values.flags.writeable = False  # as the object store hands them out
    return columns


def reference_forward(model: TinyModel, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The model's outputs in eval mode, in NumPy."""
    state = {name: value.detach().numpy().astype(np.float64) for name, value in model.state_dict().items()}
    features = {}
    for name in ("audio", "image"):
        scale = state["norm.weight"] / np.sqrt(state["norm.running_var"] + model.norm.eps)
        features[name] = (columns[name] - state["norm.running_mean"]) * scale + state["norm.bias"]
    outputs = {
        name: features[name] @ state[f"heads.{name}.weight"].T + state[f"heads.{name}.bias"] for name in features
    }
    joined = np.concatenate([features["audio"], features["image"]], axis=1)
    return {**outputs, "fused": joined @ state["fused.weight"].T + state["fused.bias"]}


class ScoredRows:
    """A coordinator over holders of some rows, which a scorer measures shard by shard.

    Args:
        dealt: shards (first row, rows) of each holder.
        columns: of all rows.
        forward: settings of the scorer's passes.
        settings: of the coordinator.
    """

    def __init__(
        self,
        dealt: list[list[tuple[int, int]]],
        columns: dict[str, np.ndarray],
        *,
        measurer: Measurer | None = None,
        forward: Forward | None = None,
        accumulation: Accumulation | None = None,
    ) -> None:
        self.dealt, self.columns = dealt, columns
        self.measurer, self.forward = measurer or Measurer(), forward
        self.holders = LocalHolders([Holder(spans) for spans in dealt])
        self.coordinator = Coordinator(
            self.holders,
            rows=ROWS,
            scheduler=Learning(),
            batch_size=8,
            accumulation=accumulation or Accumulation(),
        )

    def score(self, model: nn.Module) -> int:
        """Measure all rows with a model, and publish."""
        scorer = Scorer(self.measurer, "label", forward=self.forward, model=model)
        for first, rows in itertools.chain.from_iterable(self.dealt):
            found = scorer.measure({name: v[first : first + rows] for name, v in self.columns.items()}, first)
            raise_first_problem(found.problems, ModelOutputError)
            delivery = MeasureBatch.of(found.rows, found.similarity, found.information)
            self.holders.deliver(delivery, attempt=self.coordinator.attempt)
        return self.coordinator.publish(self.coordinator.version + 1, expected=ROWS).version

    def scores(self) -> np.ndarray:
        """(N,) of all rows."""
        parts = sorted(self.coordinator.state(), key=lambda part: part.first_row)
        return np.concatenate([part.score for part in parts])


# 3 shards of unequal size over 2 holders; no batch size below divides them.
SHARDS = [[(0, 11), (40, 13)], [(11, 29)]]


class TestThroughHolders:
    @pytest.mark.parametrize("weights", [(0.1, 0.9), (1.0, 1.0)])
    @pytest.mark.parametrize(("momentum", "accumulate"), [(0.0, "ema"), (0.6, "ema"), (0.0, "sum")])
    def test_scores_of_real_models(self, weights: tuple[float, float], momentum: float, accumulate: Any) -> None:
        columns = make_columns()
        rows = ScoredRows(
            SHARDS,
            columns,
            measurer=Measurer(fused_weight=weights[0], unimodal_weight=weights[1]),
            forward=Forward(batch_size=7),
            accumulation=Accumulation(momentum=momentum, accumulate=accumulate),
        )
        measured = []
        for update in range(3):
            model = make_model(seed=update)
            assert rows.score(model) == rows.coordinator.version == update + 1
            measured.append(reference_measures(reference_forward(model, columns), columns["label"], *weights))
            for part in rows.coordinator.state():
                here = slice(part.first_row, part.stop_row)
                np.testing.assert_allclose(part.similarity, measured[-1][0][here], atol=2e-6)
                np.testing.assert_allclose(part.information, measured[-1][1][here], rtol=2e-6, atol=2e-6)
                assert set(part.last_measured.tolist()) == {update + 1}
            # Float32 forward passes, stretched by the min-max normalisation.
            np.testing.assert_allclose(rows.scores(), reference_scores(measured, momentum, accumulate)[-1], atol=5e-6)

    def test_every_row_once_and_in_eval_mode(self) -> None:
        model = make_model(seed=0)
        ScoredRows(SHARDS, make_columns(), forward=Forward(batch_size=7)).score(model)
        assert sorted(model.row_ids) == list(range(ROWS))
        assert [size for size, _ in model.batches] == [7, 4, 7, 6, 7, 7, 7, 7, 1]
        assert not any(training for _, training in model.batches)

    def test_scores_do_not_depend_on_the_cut(self) -> None:
        columns, model = make_columns(), make_model(seed=0)
        found = []
        for dealt in (SHARDS, [[(0, ROWS)]], [[(0, 1)], [(1, 1)], [(2, 51)]], [[(0, ROWS)], []]):
            rows = ScoredRows(dealt, columns, forward=Forward(batch_size=16))
            rows.score(model)
            found.append(rows.scores())
        # Batches of other sizes may round otherwise; the normalisation must not.
        np.testing.assert_allclose(found[0], found[1], atol=5e-6)
        np.testing.assert_allclose(found[0], found[2], atol=5e-6)
        assert found[1].tolist() == found[3].tolist()
        assert found[1].max() <= 1
        assert found[1].min() >= -1

    def test_reset_starts_over(self) -> None:
        columns, accumulation = make_columns(), Accumulation(momentum=0.6)
        again, fresh = (ScoredRows(SHARDS, columns, accumulation=accumulation) for _ in range(2))
        again.score(make_model(seed=0))
        again.coordinator.reset()
        assert again.coordinator.version == 0
        again.score(make_model(seed=1))
        fresh.score(make_model(seed=1))
        assert again.scores().tolist() == fresh.scores().tolist()

    def test_failed_measurement_publishes_nothing(self) -> None:
        rows = ScoredRows(SHARDS, make_columns())
        rows.score(make_model(seed=0))
        before = [(part.score.tolist(), part.similarity.tolist()) for part in rows.coordinator.state()]
        order = rows.coordinator.window(1, 0)

        rows.columns = {name: values.copy() for name, values in rows.columns.items()}
        rows.columns["audio"][45, 2] = np.nan  # in the second shard of the first holder: the first is measured
        with pytest.raises(ModelOutputError, match="1 row; first row ids 45"):
            rows.score(make_model(seed=1))
        assert rows.coordinator.version == 1
        assert [(part.score.tolist(), part.similarity.tolist()) for part in rows.coordinator.state()] == before
        assert rows.coordinator.window(1, 0).tolist() == order.tolist()


class TestSavedScores:
    """What `state` gives, `load` takes back; a checkpoint that does not fit is refused."""

    def rows(self) -> ScoredRows:
        return ScoredRows(SHARDS, make_columns(), accumulation=Accumulation(momentum=0.6))

    def test_momentum_goes_on_as_if_nothing_had_happened(self) -> None:
        straight, first, second = self.rows(), self.rows(), self.rows()
        for seed in range(3):
            straight.score(make_model(seed))
        first.score(make_model(0))
        first.score(make_model(1))
        second.coordinator.load(first.coordinator.state(), first.coordinator.version)
        assert second.coordinator.version == 2
        assert second.score(make_model(2)) == 3
        assert second.scores().tolist() == straight.scores().tolist()

    def test_a_missing_part(self) -> None:
        rows = self.rows()
        rows.score(make_model(0))
        with pytest.raises(CheckpointError, match=r"24 of the 53 rows"):
            self.rows().coordinator.load(rows.coordinator.state()[:2], 1)

    def test_a_part_given_twice_does_not_hide_a_missing_one(self) -> None:
        parts = [ScoreBlock.empty(first, n) for first, n in ((0, 30), (0, 23))]
        with pytest.raises(CheckpointError):
            self.rows().coordinator.load(parts, 1)

    def test_a_saved_state_is_not_changed_by_what_follows(self) -> None:
        rows = self.rows()
        rows.score(make_model(0))
        saved = rows.coordinator.state()
        before = [part.score.tolist() for part in saved]
        rows.coordinator.reset()
        rows.score(make_model(1))
        assert [part.score.tolist() for part in saved] == before


class TestScorer:
    def measure(
        self, model: nn.Module, columns: dict[str, np.ndarray], first_row: int = 0, **settings: Any
    ) -> tuple[Any, Any]:
        scorer = Scorer(Measurer(), "label", forward=Forward(**{"batch_size": 8, **settings}), model=model)
        found = scorer.measure(columns, first_row)
        raise_first_problem(found.problems, ModelOutputError)
        return found.similarity, found.information

    def test_batch_norm_statistics_are_left_alone(self) -> None:
        model = make_model(seed=0).train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        self.measure(model, make_columns())
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name

    def test_modes_are_restored_module_by_module(self) -> None:
        model = make_model(seed=0).train()
        model.norm.eval()  # frozen batch norm: a common setting that .train() would undo
        self.measure(model, make_columns())
        assert model.training
        assert model.dropout.training
        assert not model.norm.training

    def test_modes_are_restored_after_a_failure(self) -> None:
        model = make_model(seed=0).train()
        seen = []

        def fail() -> None:
            with evaluating(model):
                seen.append(model.norm.training)
                raise RuntimeError("on purpose")

        with pytest.raises(RuntimeError, match="on purpose"):
            fail()
        assert seen == [False]
        assert model.norm.training
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()

    def test_parameters_can_train_afterwards(self) -> None:
        model = make_model(seed=0)
        self.measure(model, make_columns())
        batch = {"audio": torch.ones(4, WIDTH), "image": torch.ones(4, WIDTH), "row_id": torch.arange(4)}
        model(batch)["fused"].sum().backward()
        assert model.fused.weight.grad is not None

    def test_rows_of_nan_are_named(self) -> None:
        columns = {name: values.copy() for name, values in make_columns().items()}
        columns["image"][[3, 9, 10, 20, 21, 22, 50]] = math.nan
        with pytest.raises(ModelOutputError, match=r"7 rows; first row ids 1003, 1009, 1010, 1020, 1021"):
            self.measure(make_model(seed=0), columns, first_row=1000)

    def test_model_sees_copies(self) -> None:
        class Vandal(nn.Module):
            def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
                batch["audio"].zero_()
                logits = batch["image"][:, :CLASSES].clone()
                return {"audio": logits, "image": logits, "fused": logits}

        columns = make_columns()
        before = columns["audio"].copy()
        self.measure(Vandal(), columns)
        assert (columns["audio"] == before).all()

    def test_bf16(self) -> None:
        model, columns = make_model(seed=0), make_columns()
        similarity, information = self.measure(model, columns, precision="bf16")
        exact = self.measure(model, columns)
        assert similarity.dtype == np.float32
        np.testing.assert_allclose(similarity, exact[0], atol=0.03)
        np.testing.assert_allclose(information, exact[1], atol=0.1)
        assert (information != exact[1]).any()  # it did run in lower precision

    def test_unknown_precision(self) -> None:
        with pytest.raises(ConfigError, match="'bfp16'; did you mean"):
            autocast(torch.device("cpu"), "bfp16")


# ---- a model as arrays --------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("kept", torch.arange(3.0))
        self.register_buffer("passing", torch.arange(6).reshape(2, 3), persistent=False)
        self.register_buffer("counter", torch.tensor(7))
        self.low = nn.Parameter(torch.randn(3, 5).to(torch.bfloat16))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.plain = torch.tensor([1.5, 2.5])  # neither parameter nor buffer
        self.turned = nn.Parameter(torch.randn(2, 3).t())  # not contiguous
        self.note = {"name": "tied"}


class TestPackModel:
    def packed(self) -> tuple[Tied, Any]:
        torch.manual_seed(0)
        model = Tied()
        return model, unpack_model(pack_model(model))

    def test_everything_travels(self) -> None:
        model, copy = self.packed()
        assert [name for name, _ in copy.named_parameters()] == [name for name, _ in model.named_parameters()]
        assert [name for name, _ in copy.named_buffers()] == [name for name, _ in model.named_buffers()]
        for own, other in (
            *zip(model.parameters(), copy.parameters(), strict=True),
            *zip(model.buffers(), copy.buffers(), strict=True),
            (model.plain, copy.plain),
        ):
            assert (own.dtype, own.shape, own.requires_grad) == (other.dtype, other.shape, other.requires_grad)
            assert torch.equal(own, other)
        assert isinstance(copy.frozen, nn.Parameter)
        assert not isinstance(copy.plain, nn.Parameter)
        assert copy.note == {"name": "tied"}

    def test_tied_weights_stay_tied(self) -> None:
        _, copy = self.packed()
        assert copy.second.weight is copy.first.weight

    def test_non_persistent_buffers(self) -> None:
        _, copy = self.packed()
        assert copy.passing.tolist() == [[0, 1, 2], [3, 4, 5]]
        assert "passing" not in copy.state_dict()
        assert "kept" in copy.state_dict()

    def test_bfloat16_bits(self) -> None:
        model, copy = self.packed()
        assert copy.low.dtype == torch.bfloat16
        assert torch.equal(model.low.view(torch.int16), copy.low.view(torch.int16))

    def test_copies_share_no_memory(self) -> None:
        model = Tied()
        snapshot = pack_model(model)
        first, second = unpack_model(snapshot), unpack_model(snapshot)
        before = model.first.weight.detach().clone()
        with torch.no_grad():
            model.first.weight.fill_(5)  # training goes on while holders still read the snapshot
            first.first.weight.fill_(9)
        assert torch.equal(second.first.weight, before)
        assert torch.equal(unpack_model(snapshot).first.weight, before)

    def test_arrays_may_be_read_only(self) -> None:
        # Ray hands them out so; a copy must still be trainable in place.
        snapshot = pack_model(Tied())
        for array in snapshot.arrays:
            array.flags.writeable = False
        with torch.no_grad():
            unpack_model(snapshot).first.weight.add_(1)

    def test_tensors_are_arrays_not_part_of_the_skeleton(self) -> None:
        snapshot = pack_model(nn.Linear(1000, 1000))
        assert all(isinstance(array, np.ndarray) for array in snapshot.arrays)
        assert sum(array.nbytes for array in snapshot.arrays) == 4 * (1000 * 1000 + 1000)
        assert len(snapshot.skeleton) < 10_000

    def test_scores_are_the_same(self) -> None:
        model, columns = make_model(seed=5), make_columns()
        own = Scorer(Measurer(), "label", model=model).measure(columns)
        other = Scorer(Measurer(), "label", model=unpack_model(pack_model(model))).measure(columns)
        assert (own.similarity == other.similarity).all()
        assert (own.information == other.information).all()

    def test_class_of_a_script_travels(self) -> None:
        class Local(nn.Module):  # not importable by another process: as in a notebook or __main__
            def forward(self, x: Tensor) -> Tensor:
                return 2 * x

        assert unpack_model(pack_model(Local()))(torch.ones(1)).item() == 2

    def test_tensors_without_elements(self) -> None:
        # Such as an adapter of rank 0 or a placeholder buffer.
        model = nn.Module()
        model.none = nn.Parameter(torch.empty(0, 3))
        assert unpack_model(pack_model(model)).none.shape == (0, 3)

    def test_compiled_models_are_unwrapped(self) -> None:
        model = Tied()
        assert unwrap_model(torch.compile(model)) is model  # type: ignore[arg-type]  # nothing compiles before a call
        assert unwrap_model(model) is model
