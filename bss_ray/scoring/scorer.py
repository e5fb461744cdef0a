"""A scorer: a copy of the model that measures rows. Its only state is the weights.

`Scorer` is a plain class. Each scorer actor has a `Scorer`, ranks use one around the model that they train, and the
actors of a scoring job use one too.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bss_ray.data.shards import Feature
from bss_ray.errors import NAMED_IDS, Problem
from bss_ray.load.transfer import Receive, Tensors, Transfer, make_transfer
from bss_ray.measure.forward import Forward, autocast, evaluating
from bss_ray.measure.measurer import Measurer
from bss_ray.measure.snapshot import ModelSnapshot, unpack_model, unwrap_model, update_model
from bss_ray.names import loss_column
from bss_ray.runtime.threads import work_ahead

Columns = Mapping[str, np.ndarray]

_ROW_ID = Feature((), "int64")

# Number of batches in transfer to a GPU while one is measured, and of threads that fill their buffers: one thread
# copies about 10 GB/s, which is less than a fast GPU needs.
_AHEAD = 2
_THREADS = 2

_BAD_OUTPUTS = (
    "logits must be finite: NaN or infinite measures. Check these rows' inputs, or lower the learning rate if the "
    "model has diverged"
)


@dataclass(frozen=True)
class RowMeasures:
    """Measures of rows.

    Attributes:
        rows: (n,) int64 row ids.
        similarity: (n,) float32; NaN for rows with fewer than two modalities.
        information: (n,) float32; NaN for rows whose outputs are not finite.
        losses: (n,) float32 loss of each modality's head, by `loss_column`, if losses were requested.
        problems: Problem of the rows whose outputs are not finite.
        notices: Messages to the user.
    """

    rows: np.ndarray
    similarity: np.ndarray
    information: np.ndarray
    losses: dict[str, np.ndarray] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


class Scorer:
    """Measures rows with one model, unaugmented, in eval mode.

    Args:
        measurer: How rows are measured.
        label: Name of the label column.
        forward: Settings of the forward pass, such as batch size and precision.
        device: Device of the model.
        model: The model; without it `load` unpacks one.
        losses: Whether to measure the loss of each modality's head, too.

    Attributes:
        model: The current module.
    """

    model: nn.Module

    def __init__(
        self,
        measurer: Measurer,
        label: str,
        *,
        forward: Forward | None = None,
        device: torch.device | str = "cpu",
        model: nn.Module | None = None,
        losses: bool = False,
    ) -> None:
        self._measurer = measurer
        self._label = label
        self._forward = forward or Forward()
        self._device = torch.device(device)
        self._losses = losses
        self._batch_size = self._forward.batch_size
        self._skeleton: bytes | None = None
        self._transfers: dict[tuple[Any, ...], Transfer] = {}
        if model is not None:
            self._take(model)

    def load(self, snapshot: ModelSnapshot) -> None:
        """Load the model of a snapshot, or only its weights if it is the same model as before."""
        if self._skeleton is None or not update_model(self.model, snapshot, self._skeleton):
            model = unpack_model(snapshot).to(self._device)
            if self._forward.channels_last:
                model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._take(model)
        self._skeleton = snapshot.skeleton

    def _take(self, model: nn.Module) -> None:
        self.model = unwrap_model(model)
        # For the shorter last batch torch compiles once more with a variable number of rows. New weights are copied
        # into the same tensors, so nothing is compiled for them.
        self._run: Any = torch.compile(self.model) if self._forward.compile else self.model

    def measure(self, columns: Columns, first_row: int = 0) -> RowMeasures:
        """Measure consecutive rows.

        Args:
            columns: Columns of the rows, `{column: (n, ...)}`; read-only views are fine, because the model gets copies.
            first_row: Row id of the first row.

        Raises:
            ModelOutputError: The outputs break the contract.
            torch.OutOfMemoryError: A single row does not fit.
        """
        notices: list[str] = []
        with closing(self._batches(columns, first_row, notices)) as batches:
            return self._measure_all(batches, notices)

    def measure_batches(self, batches: Iterable[Tensors]) -> RowMeasures:
        """Measure the rows of batches on the device, `{column: (b, ...), "row_id": (b,)}`; see `measure` for errors."""
        return self._measure_all(batches, [])

    def _measure_all(self, batches: Iterable[Tensors], notices: list[str]) -> RowMeasures:
        measured: list[dict[str, Tensor]] = []
        with evaluating(self.model):
            for batch in batches:
                start, rows = 0, len(batch["row_id"])
                while start < rows:
                    part = {name: values[start : start + self._batch_size] for name, values in batch.items()}
                    found = self._measure_if_it_fits(part)
                    if found is None:
                        notices.append(self._halve())
                    else:
                        measured.append(found)
                        start += len(part["row_id"])
            # One transfer at the end, so that no batch waits for the device.
            measured = measured or [_nothing()]
            columns = {name: _to_numpy([batch[name] for batch in measured]) for name in measured[0]}
        return _report(columns, notices)

    def _measure_if_it_fits(self, batch: Tensors) -> dict[str, Tensor] | None:
        """Measures of a batch; None if the batch does not fit into memory."""
        try:
            return self._measure_batch(batch)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error) or self._batch_size == 1:
                raise
        return None  # outside of `except`, whose traceback keeps what did not fit

    def _measure_batch(self, batch: Tensors) -> dict[str, Tensor]:
        """(b,) measures, a mask of rows that rightly have no similarity, and losses by modality if requested."""
        with autocast(self._device, self._forward.precision):
            outputs = self._run(batch)
        rows = self._measurer.observe(outputs, batch[self._label], batch=batch, model=self.model)
        found = {"row_id": batch["row_id"], **self._measurer.measures_of(rows)._asdict()}
        if rows.unpaired is not None:
            found["unpaired"] = rows.unpaired
        if self._losses:
            found |= {loss_column(name): rows.head_losses[name] for name in rows.modalities}
        return found

    def _batches(self, columns: Columns, first_row: int, notices: list[str]) -> Generator[Tensors, None, None]:
        """Copies of the rows on the device, which are transferred while other rows are measured."""
        rows, begin = len(columns[self._label]), 0
        while begin < rows:
            size = self._batch_size
            transfer = self._transfer(columns, size)
            send = partial(self._send, transfer, columns, first_row, size)
            starts = iter(range(begin, rows, size))
            if not transfer.overlaps:  # a copy in memory
                for start in starts:
                    yield send(start)()
                return
            try:
                with closing(work_ahead(starts, send, ahead=_AHEAD, threads=_THREADS)) as sent:
                    for receive in sent:
                        batch = receive()
                        begin += size
                        yield batch
                        del batch  # or it would stay alive until the next one exists
            except (RuntimeError, MemoryError) as error:
                # The batches ahead need memory, too, and may run out of it here.
                if not _out_of_memory(error) or size == 1:
                    raise
            if begin < rows:
                notices.append(self._halve())

    def _send(self, transfer: Transfer, columns: Columns, first_row: int, size: int, begin: int) -> Receive:
        """Transfer at most `size` rows from `begin` on to the device."""
        here = slice(begin, min(begin + size, len(columns[self._label])))

        def fill(arrays: dict[str, np.ndarray]) -> None:
            for name, values in columns.items():
                arrays[name][:] = values[here]
            arrays["row_id"][:] = np.arange(first_row + here.start, first_row + here.stop)

        return transfer.send([here.stop - here.start], fill, self._lay_out)[0]

    def _transfer(self, columns: Columns, size: int) -> Transfer:
        features = {name: Feature(values.shape[1:], str(values.dtype)) for name, values in columns.items()}
        key = (size, *features.items())
        if key not in self._transfers:
            self._transfers = {key: make_transfer({**features, "row_id": _ROW_ID}, size, self._device, spare=_AHEAD)}
        return self._transfers[key]

    def _lay_out(self, _number: int, batch: Tensors) -> Tensors:
        if not self._forward.channels_last:
            return batch
        images = {name: values for name, values in batch.items() if values.ndim == 4}
        return {**batch, **{name: images[name].to(memory_format=torch.channels_last) for name in images}}

    def _halve(self) -> str:
        """Halve the batch for this and all later passes."""
        self._transfers.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        too_large, self._batch_size = self._batch_size, self._batch_size // 2
        return (
            f"scoring ran out of memory with batches of {too_large} rows and continues with {self._batch_size}. Lower "
            "scoring.batch_size to begin there"
        )


def _report(columns: dict[str, np.ndarray], notices: list[str]) -> RowMeasures:
    rows, similarity, information = (columns.pop(name) for name in ("row_id", "similarity", "information"))
    bad = not_finite(similarity, information, columns.pop("unpaired", None))
    information[bad] = np.nan
    return RowMeasures(rows, similarity, information, columns, bad_row_problems(rows, bad), notices)


def bad_row_problems(rows: np.ndarray, bad: np.ndarray) -> list[Problem]:
    """The problem of the rows (n,) whose outputs are not finite, as `bad` (n,) says, if there are any."""
    return [Problem(_BAD_OUTPUTS, int(bad.sum()), np.sort(rows[bad])[:NAMED_IDS].tolist())] if bad.any() else []


def not_finite(similarity: np.ndarray, information: np.ndarray, unpaired: np.ndarray | None) -> np.ndarray:
    """(n,) true for rows whose measures show that the model's outputs are NaN or infinite.

    Args:
        similarity: (n,) similarities.
        information: (n,) informations.
        unpaired: (n,) true for rows with fewer than two modalities, which rightly have no similarity. None: no such
            row.
    """
    sound = np.isfinite(similarity) if unpaired is None else np.isfinite(similarity) | unpaired
    return np.asarray(~(sound & np.isfinite(information)))


def _nothing() -> dict[str, Tensor]:
    """Measures of no rows."""
    return {"row_id": torch.empty(0, dtype=torch.int64), "similarity": torch.empty(0), "information": torch.empty(0)}


def _to_numpy(parts: list[Tensor]) -> np.ndarray:
    """The parts of the batches joined to (n,); floats as float32."""
    joined = torch.cat(parts)
    array: np.ndarray = (joined.float() if joined.is_floating_point() else joined).cpu().numpy()
    return array


# Texts of plain RuntimeErrors that mean out of memory: from the CPU's allocator, the CUDA runtime if other processes
# use the GPU too, libraries with their own allocation, and compilers, which wrap other errors.
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def _out_of_memory(error: BaseException) -> bool:
    # `torch.OutOfMemoryError`, under the name that torch 2.4 knows, too.
    known = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError))
    return known or any(text in str(error) for text in _OUT_OF_MEMORY)
