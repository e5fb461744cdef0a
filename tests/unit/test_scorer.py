"""A scorer: replicas of a model that measure rows, each once, whatever fits into memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bss_ray.errors import ModelOutputError
from bss_ray.load.transfer import Fill, Finish, HostTransfer, Receive
from bss_ray.measure.forward import Forward
from bss_ray.measure.measurer import Measurer
from bss_ray.measure.snapshot import pack_model
from bss_ray.scoring import scorer as scorer_module
from bss_ray.scoring.scorer import RowMeasures, Scorer, bad_row_problems, not_finite

ROWS, CLASSES, WIDTH = 53, 4, 6

Columns = dict[str, np.ndarray]


class Model(nn.Module):
    """A vector and an image, with batch norm, dropout and features.

    Args:
        width: of the features.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        image = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.encoders = nn.ModuleDict(
            {"audio": nn.Linear(5, width), "image": nn.Sequential(image, nn.Linear(4 * 4 * 4, width))}
        )
        self.dropout = nn.Dropout(0.5)
        self.heads = nn.ModuleDict({name: nn.Linear(width, CLASSES) for name in ("audio", "image")})
        self.fused = nn.Linear(2 * width, CLASSES)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        features = {name: self.dropout(encode(batch[name])) for name, encode in self.encoders.items()}
        features["fused"] = torch.cat(list(features.values()), dim=-1)
        outputs = {name: head(features[name]) for name, head in self.heads.items()}
        return {**outputs, "fused": self.fused(features["fused"]), "features": features}


def make_model(seed: int, width: int = WIDTH) -> Model:
    torch.manual_seed(seed)
    model = Model(width)
    norm = model.encoders["image"][0][1]
    norm.running_mean.normal_(0, 0.3)
    norm.running_var.uniform_(0.5, 2)
    return model.train()


def make_columns(rows: int = ROWS, seed: int = 0, *, presence: bool = False) -> Columns:
    rng = np.random.default_rng(seed)
    columns: Columns = {
        "audio": rng.normal(size=(rows, 5)).astype(np.float32),
        "image": rng.normal(size=(rows, 3, 4, 4)).astype(np.float32),
        "label": rng.integers(0, CLASSES, rows),
    }
    if presence:
        columns["has_audio"] = np.arange(rows) % 5 != 2
        columns["has_image"] = np.arange(rows) % 7 != 3
    for values in columns.values():
        values.flags.writeable = False  # as stores hand them out
    return columns


def direct(model: nn.Module, columns: Columns, measurer: Measurer) -> tuple[np.ndarray, np.ndarray]:
    """Measures of all rows in one forward pass."""
    batch = {name: torch.from_numpy(values.copy()) for name, values in columns.items()}
    training = model.training
    model.eval()
    with torch.no_grad():
        outputs = model(batch)
    found = measurer.measure(outputs, batch["label"], batch=batch, model=model)
    model.train(training)
    return found.similarity.numpy(), found.information.numpy()


def scorer(model: nn.Module | None = None, measurer: Measurer | None = None, **settings: Any) -> Scorer:
    losses = settings.pop("losses", False)
    return Scorer(measurer or Measurer(), "label", forward=Forward(**settings), model=model, losses=losses)


def check(found: RowMeasures, expected: tuple[np.ndarray, np.ndarray], first_row: int = 0, **tolerance: float) -> None:
    tolerance = tolerance or {"rtol": 2e-5, "atol": 1e-6}
    assert found.rows.tolist() == list(range(first_row, first_row + len(expected[0])))
    assert found.rows.dtype == np.int64
    for values, wanted in ((found.similarity, expected[0]), (found.information, expected[1])):
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, wanted, **tolerance)


class TestMeasures:
    @pytest.mark.parametrize("batch_size", [1, 7, 52, 53, 54, 500])
    def test_batches_that_divide_the_rows_or_not(self, batch_size: int) -> None:
        model, columns = make_model(1), make_columns()
        found = scorer(model, batch_size=batch_size).measure(columns, first_row=900)
        check(found, direct(model, columns, Measurer()), first_row=900)
        assert (found.problems, found.notices, found.losses) == ([], [], {})

    @pytest.mark.parametrize("similarity", ["prediction", "feature"])
    @pytest.mark.parametrize("information", ["loss", "gradient_norm", "full_gradient_norm"])
    @pytest.mark.parametrize("presence", [False, True])
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_all_criteria(self, similarity: str, information: str, presence: bool, channels_last: bool) -> None:
        model, columns = make_model(2), make_columns(presence=presence)
        measurer = Measurer(similarity=similarity, information=information)
        found = scorer(model, measurer, batch_size=20, channels_last=channels_last).measure(columns)
        check(found, direct(model, columns, measurer), rtol=1e-4, atol=1e-5)
        assert found.problems == []

    def test_several_shards_one_after_the_other(self) -> None:
        model, columns = make_model(1), make_columns()
        one = scorer(model, batch_size=8)
        expected = direct(model, columns, Measurer())
        for start, stop in ((0, 20), (20, 21), (21, 53), (5, 9)):
            part = {name: values[start:stop] for name, values in columns.items()}
            found = one.measure(part, first_row=start)
            check(found, (expected[0][start:stop], expected[1][start:stop]), first_row=start)

    def test_batches_of_a_loader(self) -> None:
        model, columns = make_model(1), make_columns()
        rows = np.random.default_rng(2).permutation(ROWS)
        batches = [
            {
                **{name: torch.from_numpy(values[part]) for name, values in columns.items()},
                "row_id": torch.from_numpy(part),
            }
            for part in np.array_split(rows, 4)
        ]
        found = scorer(model, batch_size=5).measure_batches(batches)
        expected = direct(model, columns, Measurer())
        assert found.rows.tolist() == rows.tolist()
        np.testing.assert_allclose(found.similarity, expected[0][rows], rtol=2e-5)
        np.testing.assert_allclose(found.information, expected[1][rows], rtol=2e-5)

    @pytest.mark.parametrize("batches", [False, True])
    def test_no_rows(self, batches: bool) -> None:
        one = scorer(make_model(1), batch_size=8)
        found = one.measure_batches([]) if batches else one.measure(make_columns(0), first_row=7)
        check(found, (np.empty(0), np.empty(0)))
        assert (found.problems, found.notices) == ([], [])

    def test_losses_of_each_head(self) -> None:
        model, columns = make_model(3), make_columns()
        measurer = Measurer(fused_weight=0.3, unimodal_weight=0.8)
        found = scorer(model, measurer, batch_size=20, losses=True).measure(columns)
        assert sorted(found.losses) == ["loss_audio", "loss_image"]
        check(found, direct(model, columns, measurer))
        for name in ("audio", "image"):
            alone = Measurer(fused_weight=0, unimodal_weight=1)
            others = {f"has_{other}": np.full(ROWS, other == name) for other in ("audio", "image")}
            twice = direct(model, {**columns, **others}, alone)[1]  # M times the mean over the one that is there
            np.testing.assert_allclose(found.losses[f"loss_{name}"], twice / 2, rtol=2e-5)

    def test_the_model_is_left_as_it_was(self) -> None:
        model = make_model(4)
        model.dropout.eval()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        scorer(model, Measurer(information="full_gradient_norm"), batch_size=20).measure(make_columns())
        assert model.training
        assert not model.dropout.training
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_broken_outputs(self) -> None:
        class NoFused(Model):
            def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
                return {name: torch.zeros(len(batch["label"]), 2) for name in ("audio", "image")}

        with pytest.raises(ModelOutputError, match="must return the fused logits under 'fused'"):
            scorer(NoFused()).measure(make_columns())


# ---- memory ---------------------------------------------------------------------------------------


class Hungry(Model):
    """Runs out of memory with batches of more than `fits` rows, from call `after` on."""

    def __init__(self, error: Exception, fits: int, after: int = 0) -> None:
        super().__init__()
        self.error, self.fits, self.after = error, fits, after
        self.asked: list[int] = []
        self.seen: list[int] = []

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        rows = batch["row_id"].tolist()
        self.asked.append(len(rows))
        if len(rows) > self.fits and len(self.asked) > self.after:
            raise self.error
        self.seen += rows
        return super().forward(batch)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allo"),
    MemoryError(),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB"),
]


def notice(large: int) -> str:
    return (
        f"scoring ran out of memory with batches of {large} rows and continues with {large // 2}. Lower "
        "scoring.batch_size to begin there"
    )


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
class TestOutOfMemory:
    def hungry(self, error: Exception, fits: int, after: int = 0) -> Hungry:
        torch.manual_seed(5)
        return Hungry(error, fits, after)

    def test_halves_until_it_fits(self, error: Exception) -> None:
        model, columns = self.hungry(error, fits=6), make_columns()
        one = scorer(model, batch_size=40)
        found = one.measure(columns)
        # 40 rows and 13, cut by five.
        assert model.asked == [40, 20, 10, *[5] * 8, 5, 5, 3]
        assert found.notices == [notice(40), notice(20), notice(10)]
        assert model.seen == list(range(ROWS))
        model.fits = 100
        check(found, direct(model, {**columns, "row_id": np.arange(ROWS)}, Measurer()))

    def test_later_passes_begin_there(self, error: Exception) -> None:
        model, columns = self.hungry(error, fits=6), make_columns()
        one = scorer(model, batch_size=40)
        one.measure(columns)
        model.asked.clear()
        model.seen.clear()
        again = one.measure(columns)
        assert again.notices == []
        assert model.asked == [5] * 10 + [3]
        assert model.seen == list(range(ROWS))
        one.load(pack_model(make_model(6)))  # also with the next model
        assert one.measure(columns).notices == []

    def test_in_the_middle_of_a_batch(self, error: Exception) -> None:
        model, columns = self.hungry(error, fits=3, after=1), make_columns(20)
        found = scorer(model, batch_size=8).measure(columns)
        assert model.asked == [8, 8, 4, 2, 2, 2, 2, 2, 2]
        assert found.notices == [notice(8), notice(4)]
        assert model.seen == list(range(20))
        assert found.rows.tolist() == list(range(20))

    def test_an_odd_size(self, error: Exception) -> None:
        model = self.hungry(error, fits=1)
        found = scorer(model, batch_size=7).measure(make_columns(9))
        assert found.notices == [notice(7), notice(3)]
        assert model.seen == list(range(9))

    def test_a_single_row_that_does_not_fit(self, error: Exception) -> None:
        model = self.hungry(error, fits=0)
        with pytest.raises(type(error)) as raised:
            scorer(model, batch_size=4).measure(make_columns())
        assert raised.value is error
        assert model.asked == [4, 2, 1]
        assert model.training

    def test_a_larger_batch_of_a_loader(self, error: Exception) -> None:
        model, columns = self.hungry(error, fits=9), make_columns()
        batch = {name: torch.from_numpy(values.copy()) for name, values in columns.items()}
        found = scorer(model, batch_size=32).measure_batches([{**batch, "row_id": torch.arange(ROWS)}])
        assert found.notices == [notice(32), notice(16)]
        assert model.seen == list(range(ROWS))


class Crowded(HostTransfer):
    """Sends batches ahead, as to a GPU, which has room for no more than so many rows at a time."""

    overlaps = True
    fits = ROWS

    def send(self, sizes: Sequence[int], fill: Fill, finish: Finish) -> list[Receive]:
        if sum(sizes) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return super().send(sizes, fill, finish)


class TestBatchesSentAhead:
    @pytest.fixture(autouse=True)
    def _crowded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scorer_module, "make_transfer", Crowded)
        monkeypatch.setattr(Crowded, "fits", ROWS)

    @pytest.mark.parametrize("batch_size", [1, 7, 52, 53, 54, 500])
    def test_all_rows_in_their_order(self, batch_size: int) -> None:
        model, columns = make_model(1), make_columns()
        found = scorer(model, batch_size=batch_size).measure(columns, first_row=900)
        check(found, direct(model, columns, Measurer()), first_row=900)

    def test_no_memory_for_the_batches_ahead(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, columns = make_model(1), make_columns()
        expected = direct(model, columns, Measurer())
        one = scorer(model, batch_size=13)  # 4 batches and a row
        monkeypatch.setattr(Crowded, "fits", 6)
        found = one.measure(columns)
        check(found, expected)
        assert found.notices == [notice(13)]
        assert one.measure(columns).notices == []

    def test_no_memory_in_the_middle(self, monkeypatch: pytest.MonkeyPatch) -> None:
        columns = make_columns()
        model = make_model(1)
        expected = direct(model, columns, Measurer())
        model.register_forward_pre_hook(lambda *_: monkeypatch.setattr(Crowded, "fits", 5))
        found = scorer(model, batch_size=6).measure(columns)
        check(found, expected)
        assert found.notices == [notice(6)]

    def test_a_single_row_that_does_not_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Crowded, "fits", 0)
        with pytest.raises(torch.OutOfMemoryError):
            scorer(make_model(1), batch_size=4).measure(make_columns())

    def test_model_and_copies_both_run_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        torch.manual_seed(5)
        model, columns = Hungry(OUT_OF_MEMORY[0], fits=2), make_columns()
        monkeypatch.setattr(Crowded, "fits", 5)
        found = scorer(model, batch_size=8).measure(columns)
        assert found.notices == [notice(8), notice(4)]
        assert model.seen == list(range(ROWS))


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("no"), KeyError("x")]
)
def test_other_errors_come_through(error: Exception) -> None:
    model = Hungry(error, fits=0)
    with pytest.raises(type(error)) as raised:
        scorer(model, batch_size=8).measure(make_columns())
    assert raised.value is error
    assert model.asked == [8]
    assert model.training


# ---- rows that cannot be measured -----------------------------------------------------------------


class TestBadRows:
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("column", ["audio", "image"])
    def test_count_and_first_ids(self, bad: float, column: str) -> None:
        model, columns = make_model(7), {name: values.copy() for name, values in make_columns().items()}
        rows = [3, 9, 10, 20, 21, 22, 50]
        columns[column][rows] = bad
        found = scorer(model, batch_size=8).measure(columns, first_row=1000)
        (problem,) = found.problems
        assert (problem.count, problem.first_ids) == (7, [1003, 1009, 1010, 1020, 1021])
        assert problem.rule.startswith("logits must be finite: NaN or infinite measures. Check these rows' inputs")
        assert np.flatnonzero(np.isnan(found.information)).tolist() == rows
        sound = ~np.isin(np.arange(ROWS), rows)
        expected = direct(model, make_columns(), Measurer())
        np.testing.assert_allclose(found.information[sound], expected[1][sound], rtol=2e-5)
        np.testing.assert_allclose(found.similarity[sound], expected[0][sound], rtol=2e-5)

    def test_in_any_order_the_lowest_ids_are_named(self) -> None:
        columns = {name: values.copy() for name, values in make_columns().items()}
        columns["audio"][[4, 30]] = math.nan
        order = np.arange(ROWS)[::-1].copy()
        batch = {name: torch.from_numpy(values[order]) for name, values in columns.items()}
        found = scorer(make_model(7)).measure_batches([{**batch, "row_id": torch.from_numpy(order)}])
        assert found.problems[0].first_ids == [4, 30]

    def test_rows_with_one_modality_are_no_problem(self) -> None:
        model, columns = make_model(8), make_columns(presence=True)
        found = scorer(model, batch_size=20).measure(columns)
        lacking = ~(columns["has_audio"] & columns["has_image"])
        assert found.problems == []
        assert np.isnan(found.similarity).tolist() == lacking.tolist()
        assert np.isfinite(found.information).all()
        assert 10 < lacking.sum() < 30

    def test_but_they_are_if_what_they_have_is_nan(self) -> None:
        columns = {name: values.copy() for name, values in make_columns(presence=True).items()}
        columns["image"][[2, 7]] = math.nan  # they lack audio
        found = scorer(make_model(8), batch_size=20).measure(columns)
        assert (found.problems[0].count, found.problems[0].first_ids) == (2, [2, 7])
        assert np.flatnonzero(np.isnan(found.information)).tolist() == [2, 7]

    def test_not_finite(self) -> None:
        nan, inf = math.nan, math.inf
        similarity, information = np.array([0.1, nan, inf, 0.1, nan, 0.1]), np.array([1, 1, 1, nan, nan, -inf])
        assert not_finite(similarity, information, None).tolist() == [False, True, True, True, True, True]
        unpaired = np.array([False, True, False, False, True, True])
        assert not_finite(similarity, information, unpaired).tolist() == [False, False, True, True, True, True]
        assert bad_row_problems(np.arange(6), np.zeros(6, bool)) == []


# ---- weights that change --------------------------------------------------------------------------


def tensors_of(one: Scorer) -> list[Tensor]:
    return [*one.model.parameters(), *one.model.buffers()]


class TestLoad:
    def test_the_next_weights_in_place(self) -> None:
        columns, model = make_columns(), make_model(9)
        one = scorer(batch_size=20)
        one.load(pack_model(model))
        check(one.measure(columns), direct(model, columns, Measurer()))
        loaded, before = one.model, tensors_of(one)

        with torch.no_grad():  # as training does: weights and statistics change, the module stays
            for tensor in [*model.parameters(), *model.buffers()]:
                tensor.add_(1) if tensor.dtype == torch.int64 else tensor.mul_(1.5).add_(0.01)
        one.load(pack_model(model))
        assert one.model is loaded
        assert all(a is b for a, b in zip(tensors_of(one), before, strict=True))
        assert all(
            torch.equal(a, b) for a, b in zip(tensors_of(one), [*model.parameters(), *model.buffers()], strict=True)
        )
        found, fresh = one.measure(columns), scorer(batch_size=20)
        fresh.load(pack_model(model))
        again = fresh.measure(columns)
        assert found.similarity.tolist() == again.similarity.tolist()
        assert found.information.tolist() == again.information.tolist()
        check(found, direct(model, columns, Measurer()))

    def test_another_architecture(self) -> None:
        columns, other = make_columns(), make_model(10, width=9)
        one = scorer(batch_size=20)
        one.load(pack_model(make_model(9)))
        first = one.model
        one.load(pack_model(other))
        assert one.model is not first
        check(one.measure(columns), direct(other, columns, Measurer()))
        small = make_model(11)
        one.load(pack_model(small))
        check(one.measure(columns), direct(small, columns, Measurer()))

    def test_settings_of_a_module_are_no_weights(self) -> None:
        columns, model = make_columns(), make_model(12)
        one = scorer(batch_size=20)
        one.load(pack_model(model))
        model.encoders["image"][0][1].eps = 0.5
        one.load(pack_model(model))
        check(one.measure(columns), direct(model, columns, Measurer()))

    def test_a_frozen_part_stays_out_of_the_gradients(self) -> None:
        columns, model = make_columns(9), make_model(12)
        measurer = Measurer(information="full_gradient_norm")
        one = scorer(measurer=measurer)
        one.load(pack_model(model))
        whole = one.measure(columns).information
        model.encoders["audio"].requires_grad_(False)
        one.load(pack_model(model))
        assert (one.measure(columns).information < whole).all()
        check(one.measure(columns), direct(model, columns, measurer), rtol=1e-4)

    def test_the_snapshot_may_be_read_only_and_is_left_alone(self) -> None:
        snapshot = pack_model(make_model(13))
        for array in snapshot.arrays:
            array.flags.writeable = False
        one = scorer(batch_size=20)
        one.load(pack_model(make_model(14)))
        one.load(snapshot)
        before = [array.copy() for array in snapshot.arrays]
        one.load(pack_model(make_model(15)))
        assert all((a == b).all() for a, b in zip(before, snapshot.arrays, strict=True))

    @pytest.mark.parametrize("channels_last", [False, True])
    def test_layouts(self, channels_last: bool) -> None:
        """Weights in one layout may follow weights in another."""
        columns, model = make_columns(), make_model(16)
        one = scorer(batch_size=20, channels_last=channels_last)
        for turn in range(4):
            layout = torch.channels_last if turn % 2 else torch.contiguous_format
            model = model.to(memory_format=layout)  # type: ignore[call-overload]
            with torch.no_grad():
                model.encoders["image"][0][0].weight.mul_(1.2)
            one.load(pack_model(model))
            check(one.measure(columns), direct(model, columns, Measurer()), rtol=1e-4, atol=1e-5)


# ---- other ways to run the model ------------------------------------------------------------------


class TestForward:
    @pytest.fixture
    def layouts(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
        """Whether images, and what the convolution makes of them, are in channels last."""
        seen: list[tuple[bool, bool]] = []
        real = nn.Conv2d.forward

        def forward(self: nn.Conv2d, images: Tensor) -> Tensor:
            maps = real(self, images)
            seen.append(tuple(t.is_contiguous(memory_format=torch.channels_last) for t in (images, maps)))  # type: ignore[arg-type]
            return maps

        monkeypatch.setattr(nn.Conv2d, "forward", forward)
        return seen

    def test_channels_last(self, layouts: list[tuple[bool, bool]]) -> None:
        model, columns = make_model(17), make_columns()
        expected = direct(model, columns, Measurer())
        layouts.clear()
        one = scorer(batch_size=20, channels_last=True)
        one.load(pack_model(model))
        check(one.measure(columns), expected, rtol=1e-4, atol=1e-5)
        assert layouts == [(True, True)] * 3
        layouts.clear()
        scorer(model, batch_size=20).measure(columns)
        assert layouts == [(False, False)] * 3

    @pytest.mark.parametrize("precision", ["bf16", "fp16"])
    def test_half_precision(self, precision: str) -> None:
        model, columns = make_model(18), make_columns()
        expected = direct(model, columns, Measurer())
        found = scorer(model, batch_size=20, precision=precision).measure(columns)
        check(found, expected, atol=0.05, rtol=0.02)
        assert (found.information != expected[1]).any()  # it did run in lower precision

    def test_compiled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # Traced as always; what a C++ compiler would make of it is torch's affair, and takes half a minute.
        compiled: list[nn.Module] = []
        real = torch.compile

        def trace(model: nn.Module) -> Any:
            compiled.append(model)
            return real(model, backend="eager")

        monkeypatch.setattr(torch, "compile", trace)
        model, columns = make_model(19), make_columns(40)
        one = scorer(batch_size=20, compile=True)
        one.load(pack_model(model))
        check(one.measure(columns), direct(model, columns, Measurer()))
        with torch.no_grad():
            model.fused.weight.mul_(2)
        one.load(pack_model(model))
        check(one.measure(columns), direct(model, columns, Measurer()))
        assert len(compiled) == 1  # new weights are no reason to compile again
        assert compiled[0] is one.model
