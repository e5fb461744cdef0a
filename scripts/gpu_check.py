"""Does bss_ray work on this GPU, and how fast? One command, one table.

    python scripts/gpu_check.py [--device cuda|cpu] [--quick] [--out FILE] [--only NAME ...] [--limit-s 480]

It needs torch, NumPy and PyArrow, and no Ray and no installation: copy the repository to the machine and run it there.
Each step is a check (it fails where a result is wrong) or a benchmark (it adds rows to the table at the end):

    transfer     batches from pinned memory and a side stream hold the right rows, also while the GPU is busy
    random       random numbers of rows have the same bits as on a CPU
    measures     scores in fp32, in channels last and in bf16 agree with those of a CPU
    compiled     likewise through torch.compile, with a shorter last batch and with new weights
    snapshot     a model that travels to a scorer arrives as it is
    memory       scoring halves its batches when memory runs out (on a GPU for real, on a CPU by an injected error)
    waits        the default train loop trains in each precision, and none of its steps makes the host wait for the GPU
    checkpoint   a run that is stopped resumes with the bits that were saved; seconds to save and to restore
    copies       GB/s from pageable and from pinned memory
    scorer       rows/s against a bare forward pass; fp32 and bf16, channels last, compiled, rows sent ahead or not
    loader       rows/s of the loader alone
    epochs       seconds of an epoch with the engines `online` and `workers` against uniform sampling; loader stalls

The model has two encoders of the size of ResNet-18 for images of 224 x 224 pixels; with --quick, small ones.
All figures are medians, and come from one process on one GPU. Steps that do not run are in the table, with the reason.

Exit status: 0, all that could be run here is right; 1, a check failed; 2, there is no such device; 3, the time is up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bss_ray.data.arrays import shards_of_arrays
from bss_ray.data.columns import Columns
from bss_ray.data.shards import Shards
from bss_ray.load.loader import Loader
from bss_ray.load.randomness import RowRandom
from bss_ray.load.transfer import CudaTransfer, HostTransfer
from bss_ray.measure.forward import Forward, autocast, evaluating
from bss_ray.measure.measurer import Measurer
from bss_ray.measure.snapshot import pack_model
from bss_ray.models import LateFusion
from bss_ray.sample.plan import Order, Plan
from bss_ray.schedule import Learning, Scheduler, Uniform
from bss_ray.scoring import scorer as scorer_module
from bss_ray.scoring.config import Scoring
from bss_ray.scoring.scorer import RowMeasures, Scorer
from bss_ray.testing.cluster import LocalCluster
from bss_ray.train.loop import LoopArgs, LoopConfig, ModelSpec, default_loop
from bss_ray.train.sampler import get_sampler

# Seconds that a step which is under way has to end when the time is up.
GRACE_S = 30.0

CLASSES = 10
MODALITIES = ("audio", "image")


# ---- the model and its rows ---------------------------------------------------------------------


class Block(nn.Module):
    """A basic residual block (He et al. 2016)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
        )
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.skip = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.skip(x), inplace=True)


def resnet18(channels: int, width: int) -> nn.Sequential:
    """ResNet-18 up to its features (B, 8 * width); its own width is 64."""
    stem = [nn.Conv2d(channels, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    blocks: list[nn.Module] = [Block(width, width, 1), Block(width, width, 1)]
    for stage in (1, 2, 3):
        out = width << stage
        blocks += [Block(out // 2, out, 2), Block(out, out, 1)]
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ResNets(nn.Module):
    """A ResNet-18 encoder for each modality, and late fusion, in the memory layout that tensor cores like."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({name: resnet18(shape[0], width) for name, shape in shapes.items()})
        self.heads = nn.ModuleDict({name: nn.Linear(8 * width, num_classes) for name in shapes})
        self.fused = nn.Linear(8 * width * len(shapes), num_classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        features = {name: encode(batch[name]) for name, encode in self.encoders.items()}
        logits = {name: self.heads[name](feature) for name, feature in features.items()}
        return {**logits, "fused": self.fused(torch.cat(list(features.values()), dim=-1))}


def make_arrays(rows: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Noise with a class in it; a few hundred rows of noise are repeated, for more would take minutes to draw."""
    rng = np.random.default_rng(0)
    label = rng.integers(0, CLASSES, rows)
    arrays = {"label": label}
    for name in MODALITIES:
        noise = rng.standard_normal((min(rows, 256), *shape), dtype=np.float32)
        arrays[name] = noise[np.arange(rows) % len(noise)]
        arrays[name][:, 0, :2] += label[:, None, None] / CLASSES
    return arrays


# ---- what steps are given -----------------------------------------------------------------------


class NotRunError(Exception):
    """A step that cannot be run on this machine, and why."""


@dataclass(frozen=True)
class Figure:
    """A row of the table.

    Attributes:
        step: Name of the step.
        name: What was measured.
        value: How much; None if it was not run.
        unit: Of what.
        ratio: How that compares, in words; empty for nothing to compare with.
    """

    step: str
    name: str
    value: float | None
    unit: str
    ratio: str = ""


@dataclass
class Bench:
    """The device, the sizes, and the figures so far.

    Attributes:
        device: Where all is run.
        quick: Small model and few rows.
        figures: Rows of the table.
        step: Name of the step at hand.
    """

    device: torch.device
    quick: bool
    figures: list[Figure] = field(default_factory=list)
    step: str = ""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def width(self) -> int:
        return 4 if self.quick else 64

    @property
    def shape(self) -> tuple[int, int, int]:
        # Maps of a single pixel, as of 16 x 16, have NaN in the bf16 gradients of CPUs (torch 2.13).
        return (3, 32, 32) if self.quick else (3, 224, 224)

    @property
    def rows(self) -> int:
        return 64 if self.quick else 2048

    @property
    def batch_size(self) -> int:
        return 32 if self.quick else 256

    @property
    def repeats(self) -> int:
        return 1 if self.quick else 5

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        return make_arrays(self.rows, self.shape)

    @cached_property
    def shards(self) -> Shards:
        return shards_of_arrays(self.arrays, Columns(modalities=MODALITIES), nodes=("",) * 4, num_classes=CLASSES)

    @cached_property
    def spec(self) -> ModelSpec:
        return ModelSpec(class_path=f"{__name__}.ResNets", init_args={"width": self.width})

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.spec.build(dict.fromkeys(MODALITIES, self.shape), CLASSES).to(self.device)

    def loader(self, shards: Shards) -> Loader:
        return Loader(shards, rank=0, rank_nodes=["node"], device=self.device)

    def add(self, name: str, value: float | None, unit: str, ratio: str = "") -> None:
        self.figures.append(Figure(self.step, name, value, unit, ratio))

    def wait(self) -> None:
        """Wait for all that is queued on the device."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], object]) -> float:
        """Median seconds of some work, after once for warming up."""
        spent = []
        for _ in range(self.repeats + 1):
            self.wait()
            started = time.perf_counter()
            work()
            self.wait()
            spent.append(time.perf_counter() - started)
        return statistics.median(spent[1:])

    def cluster(self, folder: Path, engine: str = "workers", scheduler: Scheduler | None = None) -> LocalCluster:
        scoring = {"engine": engine, "batch_size": self.batch_size, "precision": self.low_precision}
        return LocalCluster(
            self.shards,
            folder,
            scheduler=scheduler or Learning(temperature=0.3),
            scoring=Scoring(**scoring),  # type: ignore[arg-type]
            batch_size=self.batch_size // 2,
            device=self.device,
        )

    @property
    def low_precision(self) -> str:
        """The precision of tensor cores that this GPU has; bf16 on a CPU."""
        return "fp16" if self.on_gpu and torch.cuda.get_device_capability(self.device) < (8, 0) else "bf16"

    def loop(self, epochs: int, precision: str = "auto") -> LoopArgs:
        return LoopArgs(loop=LoopConfig(epochs=epochs, precision=precision, lr=1e-3), model=self.spec, seed=0)


@contextmanager
def exact(bench: Bench) -> Iterator[None]:
    """Single precision without TF32, to compare with a CPU."""
    if not bench.on_gpu:
        yield
        return
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def check(is_right: bool, text: str) -> None:
    """Fail the step, also under `python -O`."""
    if not is_right:
        raise AssertionError(text)


# ---- checks -------------------------------------------------------------------------------------


def transfer(bench: Bench) -> None:
    """The rows that a busy GPU finds in its batches are those that were asked for, transformed once."""
    # On a GPU 131 kB a row: four batches fill one of the pinned buffers, which are used again many times.
    (rows, length), rng = ((4096, 16384) if bench.on_gpu else (256, 64)), np.random.default_rng(1)
    arrays = {name: rng.standard_normal((rows, length), dtype=np.float32) for name in MODALITIES}
    shards = shards_of_arrays({**arrays, "label": np.arange(rows) % 3}, Columns(modalities=MODALITIES), nodes=("",) * 3)
    there = {name: torch.from_numpy(values).to(bench.device) for name, values in arrays.items()}
    loader, plan = bench.loader(shards), Plan(0, 1, rows, 32, "keep", (rows,))
    size = 2048 if bench.on_gpu else 64
    busy = torch.randn(size, size, device=bench.device)
    wrong = torch.zeros((), dtype=torch.int64, device=bench.device)  # looked at once, so that nothing waits before
    for epoch in range(3):
        for _ in range(20):
            busy = busy @ busy / size
        shift = busy[0, 0].nan_to_num() * 0 + epoch + 1  # on its way while the first batches are transformed
        order = np.random.default_rng(epoch).permutation(rows)
        windows, seen = Order(plan, {0: order}.__getitem__), []
        for part in loader.batches(plan, windows, 0, partial(shifted, shift)):
            batch, ids = part.tensors, part.tensors["row_id"]
            for _ in range(3):
                busy = busy @ busy / size
            wrong += (batch["audio"] != there["audio"][ids]).sum() + (batch["label"] != ids % 3).sum()
            wrong += (batch["image"] != there["image"][ids] + (epoch + 1)).sum()
            seen.append(ids)
        found = torch.cat(seen).cpu().numpy()
        check(np.array_equal(found, order), f"epoch {epoch} has other rows than its order")
    check(int(wrong) == 0, f"{int(wrong)} values of the batches are not those of their rows")


def shifted(by: Tensor, batch: dict[str, Tensor], _random: RowRandom) -> dict[str, Tensor]:
    return {**batch, "image": batch["image"] + by}


def random(bench: Bench) -> None:
    """Rows' random numbers are the same bits on every device."""
    ids = torch.tensor([0, 1, 17, 2**31, 2**40 + 3, -1])
    here, there = (RowRandom(2**63 + 11, 5, ids.to(device)) for device in (bench.device, "cpu"))
    for draw in (lambda r: r.uniform(3, 5), lambda r: r.integers(-7, 10**6, 9), lambda r: r.uniform()):
        check(torch.equal(draw(here).cpu(), draw(there)), "other bits than on a CPU")
    torch.testing.assert_close(here.normal(101).cpu(), there.normal(101), rtol=1e-5, atol=1e-6)


def small_rows(rows: int = 70) -> dict[str, np.ndarray]:
    """A vector and an image; some rows lack one of them."""
    rng = np.random.default_rng(3)
    arrays = {"audio": rng.standard_normal((rows, 24)), "image": rng.standard_normal((rows, 3, 16, 16))}
    columns = {name: values.astype(np.float32) for name, values in arrays.items()}
    present = {"has_audio": np.arange(rows) % 7 != 2, "has_image": np.arange(rows) % 5 != 3}
    return {**columns, **present, "label": rng.integers(0, CLASSES, rows)}


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return LateFusion({"audio": (24,), "image": (3, 16, 16)}, CLASSES)


def scored(device: torch.device | str, measurer: Measurer | None = None, **settings: Any) -> RowMeasures:
    scorer = Scorer(measurer or Measurer(), "label", forward=Forward(batch_size=32, **settings), device=device)
    scorer.load(pack_model(small_model()))
    return scorer.measure(small_rows(), first_row=5)


def agree(found: RowMeasures, expected: RowMeasures, tolerance: float, what: str) -> None:
    check(np.array_equal(found.rows, expected.rows), f"{what}: other rows")
    for name in ("similarity", "information"):
        left, right = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance, err_msg=f"{what}: {name}")


def measures(bench: Bench) -> None:
    """All criteria, layouts and precisions against a CPU in single precision."""
    with exact(bench):
        for similarity, information in (
            ("prediction", "loss"),
            ("feature", "gradient_norm"),
            ("prediction", "full_gradient_norm"),
        ):
            measurer = Measurer(similarity=similarity, information=information)
            expected = scored("cpu", measurer)
            for channels_last in (False, True):
                what = f"{similarity}, {information}, channels_last={channels_last}"
                agree(scored(bench.device, measurer, channels_last=channels_last), expected, 1e-3, what)
    expected = scored("cpu")
    agree(scored(bench.device, precision=bench.low_precision), expected, 0.05, bench.low_precision)


def compiled(bench: Bench) -> None:
    """A compiled model measures alike, for full batches, the last one, and with the next weights."""
    with compiler(bench):
        scorer = Scorer(Measurer(), "label", forward=Forward(batch_size=32, compile=True), device=bench.device)
        for seed in (0, 1):
            plain = Scorer(Measurer(), "label", forward=Forward(batch_size=32), device=bench.device)
            for one in (scorer, plain):
                one.load(pack_model(small_model(seed)))
            with exact(bench):
                agree(scorer.measure(small_rows()), plain.measure(small_rows()), 1e-3, f"compiled, weights {seed}")


@contextmanager
def compiler(bench: Bench) -> Iterator[None]:
    """torch.compile; on a CPU it only traces, for a C++ compiler would take half a minute.

    Raises:
        NotRunError: There is no C compiler, which Triton needs.
    """
    real = torch.compile
    if bench.on_gpu:
        if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
            raise NotRunError("torch.compile needs a C compiler, and there is none")
        yield
        return
    torch.compile = lambda model: real(model, backend="eager")  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = real


def snapshot(bench: Bench) -> None:
    """A model of the device as arrays, and back: to a new scorer, and into a scorer that has older weights."""
    model = bench.model()
    packed = pack_model(model)
    bench.add("pack a model", 1e3 * bench.seconds(lambda: pack_model(model)), "ms")
    scorer = Scorer(Measurer(), "label", device=bench.device)
    scorer.load(packed)
    first = scorer.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    packed = pack_model(model)
    bench.add("update a scorer", 1e3 * bench.seconds(lambda: scorer.load(packed)), "ms")
    check(scorer.model is first, "the same module with other weights is updated in place")
    for (name, there), here in zip(scorer.model.state_dict().items(), model.state_dict().values(), strict=True):
        check(torch.equal(there, here), f"{name} has changed on the way")
        check(there.stride() == here.stride(), f"{name} has another memory layout")


class Greedy(nn.Module):
    """Runs out of memory with more rows than `fits`."""

    fits = 6

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if len(batch["row_id"]) > self.fits:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Injected")
        outputs: dict[str, Tensor] = self.model(batch)
        return outputs


def memory(bench: Bench) -> None:
    """A batch that does not fit is halved until it does, nothing is measured twice, and the notice says so."""
    if not bench.on_gpu:
        model = Greedy(small_model())
        found = Scorer(Measurer(), "label", forward=Forward(batch_size=40), model=model).measure(small_rows(), 5)
        agree(found, scored("cpu"), 1e-5, "halved")
        check(len(found.notices) == 3, f"notices: {found.notices}")
        return
    # Never the small model: torch takes memory in pieces of 2 MB and more, and the limit must be well above a piece.
    large = Bench(bench.device, quick=False)
    model, arrays = large.model(), make_arrays(2 * large.batch_size, large.shape)
    roomy, crowded = (
        Scorer(Measurer(), "label", forward=Forward(batch_size=size), device=bench.device, model=model)
        for size in (large.batch_size // 8, large.batch_size)
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(bench.device)
    before = torch.cuda.memory_allocated(bench.device)
    with exact(bench):
        expected = roomy.measure(arrays)
        # An eighth of the batch needs this much. Half of a whole batch's need is left, and so it must be cut.
        need = torch.cuda.max_memory_allocated(bench.device) - before
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(bench.device).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(bench.device) + 4 * need) / total)
        try:
            found = crowded.measure(arrays)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    check(bool(found.notices), "the memory was enough: nothing was tried")
    agree(found, expected, 1e-3, "halved")
    bench.add("halvings until it fits", len(found.notices), "times")


def waits(bench: Bench) -> None:
    """Counts places where torch waits for the GPU as often as there are steps; the default loop has none."""
    epochs = 1 if bench.quick else 3
    precisions = ["fp32", bench.low_precision, *(["fp16"] if bench.on_gpu else [])]
    for precision in dict.fromkeys(precisions):
        with tempfile.TemporaryDirectory() as folder, synchronisations(bench) as places:
            run = bench.cluster(Path(folder), "online").run(default_loop, bench.loop(epochs, precision))
        check(np.isfinite(run.metrics["train_loss"]), f"{precision}: the loss is {run.metrics['train_loss']}")
        if not bench.on_gpu:
            continue  # it has trained
        steps = epochs * -(-bench.rows // (bench.batch_size // 2))
        often = {place: count for place, count in places.items() if count >= steps}
        check(not often, f"{precision}: the host waits for the GPU in each of {steps} steps at {often}")
        bench.add(f"waits for the device, {precision}", sum(places.values()) / epochs, "an epoch")


@contextmanager
def synchronisations(bench: Bench) -> Iterator[Counter[str]]:
    """Where, and how often, a call waits for the GPU (torch's sync debug mode; it knows most of them)."""
    places: Counter[str] = Counter()
    if not bench.on_gpu:
        yield places
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield places
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places.update(f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))


def checkpoint(bench: Bench) -> None:
    """A run of two epochs, and one that resumes for a third: its weights are those that were saved."""
    saved: dict[str, Tensor] = {}
    seconds: dict[str, list[float]] = {"save": [], "restore": []}

    def loop(epochs: int) -> None:
        sampler = get_sampler()
        model = sampler.prepare(bench.model())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=bench.on_gpu or None)
        bench.wait()
        started = time.perf_counter()
        resumed = sampler.restore(model=model, optimizer=optimizer)
        bench.wait()
        if resumed:
            seconds["restore"].append(time.perf_counter() - started)
            check(same(saved, model, optimizer), "what was restored is not what was saved")
        for _ in sampler.epochs(epochs):
            model.train()
            for batch in sampler.batches():
                outputs = model(batch)
                sampler.observe(batch, outputs)
                optimizer.zero_grad()
                (sampler.loss(batch, outputs).mean() * sampler.loss_scale).backward()
                optimizer.step()
            bench.wait()
            started = time.perf_counter()
            sampler.report({}, model=model, optimizer=optimizer)
            seconds["save"].append(time.perf_counter() - started)
            saved.clear()
            saved.update({name: tensor.clone() for name, tensor in tensors_of(model, optimizer).items()})

    with tempfile.TemporaryDirectory() as folder:
        for epochs in (2, 3):
            cluster = bench.cluster(Path(folder), scheduler=Uniform())
            run = cluster.run(loop, epochs)
        check(run.metrics["epoch"] == 2, f"the last epoch is {run.metrics['epoch']}")
        size = sum(file.stat().st_size for file in cluster.checkpoints()[-1].iterdir())
    for name, spent in seconds.items():
        bench.add(name, statistics.median(spent), "s", f"{size / 1e6 / statistics.median(spent):,.0f} MB/s")


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    states = optimizer.state_dict()["state"].items()
    moments = {f"{index}.{name}": value for index, state in states for name, value in state.items()}
    return {**model.state_dict(), **moments}


def same(saved: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    now = tensors_of(model, optimizer)
    return now.keys() == saved.keys() and all(torch.equal(now[name], saved[name]) for name in now)


# ---- benchmarks ---------------------------------------------------------------------------------


def copies(bench: Bench) -> None:
    """Bandwidth of a batch on its way to the device."""
    if not bench.on_gpu:
        raise NotRunError("there is no way to another memory here")
    pageable = torch.from_numpy(bench.arrays["image"][: bench.batch_size])
    pinned = pageable.pin_memory()
    size = pageable.numel() * pageable.element_size() / 1e9
    slow = bench.seconds(lambda: pageable.to(bench.device))
    fast = bench.seconds(lambda: pinned.to(bench.device, non_blocking=True))
    fill = bench.seconds(lambda: np.copyto(pinned.numpy(), pageable.numpy()))
    bench.add("from pageable memory", size / slow, "GB/s")
    bench.add("from pinned memory", size / fast, "GB/s", f"{slow / fast:.2f} x pageable")
    bench.add("filling pinned memory, one thread", size / fill, "GB/s")


def scorer(bench: Bench) -> None:
    """Rows/s of a scorer that gets rows from host arrays, against forward passes of a batch that is there."""
    model, low, size = bench.model(), bench.low_precision, bench.batch_size
    rates: dict[str, float] = {}

    def bare(precision: str) -> float:
        batch = {name: torch.from_numpy(bench.arrays[name][:size]).to(bench.device) for name in MODALITIES}
        batch = {name: values.to(memory_format=torch.channels_last) for name, values in batch.items()}

        def work() -> None:
            with evaluating(model), autocast(bench.device, precision):
                for _ in range(bench.rows // size):
                    model(batch)

        return bench.rows // size * size / bench.seconds(work)

    def measured(
        rows: int = bench.rows, *, precision: str = low, channels_last: bool = True, compile: bool = False
    ) -> float:
        """So many rows a call."""
        forward = Forward(batch_size=size, precision=precision, channels_last=channels_last, compile=compile)
        one = Scorer(Measurer(), "label", forward=forward, device=bench.device, model=model)
        parts = [
            {name: values[start : start + rows] for name, values in bench.arrays.items()}
            for start in range(0, bench.rows, rows)
        ]
        return bench.rows / bench.seconds(lambda: [one.measure(part) for part in parts])

    def add(name: str, measure: Callable[[], float], of: str = "") -> None:
        try:
            rates[name] = measure()
            bench.add(name, rates[name], "rows/s", f"{rates[name] / rates[of]:.2f} of {of}" if of else "")
        except NotRunError as reason:
            bench.add(name, None, "rows/s", f"not run: {reason}")

    def compile_it() -> float:
        with compiler(bench):
            return measured(compile=True)

    def other_way(owner: Any, name: str, value: object) -> float:
        if not bench.on_gpu:
            raise NotRunError("rows are copied to no other memory")
        with replaced(owner, name, value):
            return measured()

    best = f"scorer, {low}"
    add("bare, fp32", lambda: bare("fp32"))
    add(f"bare, {low}", lambda: bare(low), "bare, fp32")
    add("scorer, fp32", lambda: measured(precision="fp32"), "bare, fp32")
    add(best, measured, f"bare, {low}")
    add(f"{best}, compiled", compile_it, best)
    add(f"{best}, layout as it comes", lambda: measured(channels_last=False), best)
    add(f"{best}, a batch a call", lambda: measured(size), best)
    add(f"{best}, none sent ahead", lambda: other_way(CudaTransfer, "overlaps", False), best)
    add(f"{best}, pageable memory", lambda: other_way(scorer_module, "make_transfer", HostTransfer), best)


@contextmanager
def replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def loader(bench: Bench) -> None:
    """Rows/s of an order that jumps about, with nothing else to do."""
    plan = Plan(0, 1, bench.rows, bench.batch_size // 2, "keep", (bench.rows,))
    order = np.random.default_rng(0).permutation(bench.rows)
    one = bench.loader(bench.shards)

    def work() -> None:
        for _ in one.batches(plan, Order(plan, lambda _: order)):
            pass

    rate = bench.rows / bench.seconds(work)
    row_bytes = sum(feature.row_bytes for feature in bench.shards.features.values())
    bench.add("loader alone", rate, "rows/s", f"{rate * row_bytes / 1e9:.2f} GB/s")


def epochs(bench: Bench) -> None:
    """The default loop on an in-process cluster; epochs after the first two, which compile and warm up."""
    count, uniform = 3 if bench.quick else 5, 0.0
    for name, engine, scheduler in (
        ("uniform", "workers", Uniform()),
        ("online", "online", Learning(temperature=0.3)),
        ("workers", "workers", Learning(temperature=0.3)),
    ):
        with tempfile.TemporaryDirectory() as folder:
            run = bench.cluster(Path(folder), engine, scheduler).run(default_loop, bench.loop(count))
        last = [row for row in run.reports if row["epoch"] >= 2]
        parts = ("seconds_training", "seconds_planning", "seconds_scoring")
        spent = statistics.median(sum(row[part] for part in parts) for row in last)
        uniform = uniform or spent
        bench.add(f"epoch, {name}", spent, "s", f"{spent / uniform:.2f} of uniform")
        stalls = statistics.median(row["loader_stall_share"] for row in last)
        bench.add(f"loader stall share, {name}", 100 * stalls, "%")


# ---- running them -------------------------------------------------------------------------------

STEPS: dict[str, Callable[[Bench], None]] = {
    step.__name__: step
    for step in (
        transfer, random, measures, compiled, snapshot, memory, waits, checkpoint, copies, scorer, loader, epochs,
    )
}  # fmt: skip


@dataclass
class Outcome:
    """What became of a step: `ok`, `failed`, or `not run`, and why."""

    step: str
    state: str = "not run"
    why: str = "the time was up"
    seconds: float = 0.0


def run_step(bench: Bench, outcome: Outcome) -> None:
    """Run a step; its error is its outcome."""
    bench.step = outcome.step
    started = time.perf_counter()
    try:
        STEPS[outcome.step](bench)
        outcome.state, outcome.why = "ok", ""
    except NotRunError as reason:
        outcome.why = str(reason)
    except Exception as error:
        traceback.print_exc()
        text = str(error).strip()
        outcome.state, outcome.why = "failed", f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"
    outcome.seconds = time.perf_counter() - started


def describe(bench: Bench) -> str:
    name = torch.cuda.get_device_name(bench.device) if bench.on_gpu else platform.processor() or platform.machine()
    cuda = f", CUDA {torch.version.cuda}" if bench.on_gpu else ""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}{cuda}"
    sizes = f"{bench.rows:,} rows of 2 x {bench.shape}, batches of {bench.batch_size}, encoders of width {bench.width}"
    return f"{name}, {os.cpu_count()} cores; {versions}; {sizes}"


def table(bench: Bench, outcomes: list[Outcome]) -> str:
    """Everything that was measured, and what became of each step."""
    lines = [describe(bench), ""]
    for figure in bench.figures:
        known = figure.value or 0.0
        text = f"{known:,.0f}" if known >= 100 else f"{known:.3g}"
        value = "-" if figure.value is None else text
        lines.append(f"{figure.step:<11} {figure.name:<36} {value:>10} {figure.unit:<9} {figure.ratio}".rstrip())
    lines.append("")
    for outcome in outcomes:
        lines.append(f"{outcome.step:<11} {outcome.state:<8} {outcome.seconds:>6.1f} s  {outcome.why}".rstrip())
    return "\n".join(lines)


def finish(bench: Bench, outcomes: list[Outcome], out: Path | None) -> None:
    """Print the table, and write it as JSON."""
    print("\n" + table(bench, outcomes), flush=True)
    if out is not None:
        content = {
            "machine": describe(bench),
            "device": bench.device.type,
            "quick": bench.quick,
            "steps": [asdict(outcome) for outcome in outcomes],
            "figures": [asdict(figure) for figure in bench.figures],
        }
        out.write_text(json.dumps(content, indent=1))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--quick", action="store_true", help="small model, few rows: is it right? Not: how fast is it?")
    parser.add_argument("--out", type=Path, help="also write everything to this JSON file")
    parser.add_argument("--only", nargs="+", choices=list(STEPS), metavar="NAME", help="only these steps")
    parser.add_argument("--limit-s", type=float, default=480.0, help="end after so many seconds; default: 480")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no GPU here. Choose --device cpu to try the script itself", file=sys.stderr)
        return 2

    bench = Bench(torch.device(options.device), options.quick or options.device == "cpu")
    outcomes = [Outcome(step) for step in options.only or STEPS]
    deadline = time.monotonic() + options.limit_s

    def give_up() -> None:
        """The step at hand hangs, or takes too long: what is known so far is shown, and the process ends."""
        finish(bench, outcomes, options.out)
        os._exit(3)

    watchdog = threading.Timer(options.limit_s + GRACE_S, give_up)
    watchdog.daemon = True
    watchdog.start()
    print(describe(bench), flush=True)
    for number, outcome in enumerate(outcomes, 1):
        if time.monotonic() >= deadline:
            continue
        print(f"[{number}/{len(outcomes)}] {outcome.step} ...", end=" ", flush=True)
        run_step(bench, outcome)
        print(f"{outcome.state} {outcome.why} ({outcome.seconds:.1f} s)", flush=True)
        if bench.on_gpu:
            torch.cuda.empty_cache()
    watchdog.cancel()
    finish(bench, outcomes, options.out)
    if any(outcome.state == "failed" for outcome in outcomes):
        return 1
    return 3 if any(outcome.why == "the time was up" for outcome in outcomes) else 0


if __name__ == "__main__":
    import gpu_check  # by its name, so that its classes are those of a module that can be imported

    sys.exit(gpu_check.main())
