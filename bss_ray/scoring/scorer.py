"""A scorer: a replica of the model that measures rows. It has no state but the weights.

`Scorer` is a plain class. Scorer actors have one each, ranks use one around the model that they train, and so
do the actors of a job that scores a corpus.
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

# Batches that are on their way to a GPU while one is being measured, and threads that fill their buffers: one thread
# copies about 10 GB/s, which is less than a fast GPU takes.
_AHEAD = 2
_THREADS = 2

_BAD_OUTPUTS = (
    "logits must be finite: NaN or infinite measures. Look at these rows' inputs, or lower the learning rate if the "
    "model has diverged"
)


@dataclass(frozen=True)
class RowMeasures:
    """Measures of rows.

    Attributes:
        rows: (n,) int64 row ids.
        similarity: (n,) float32; NaN for rows with fewer than two modalities.
        information: (n,) float32; NaN for rows whose outputs are not finite.
        losses: (n,) float32 loss of each modality's own head, by `loss_column`, where it was asked for.
        problems: rows whose outputs are not finite.
        notices: what the user should read.
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
        measurer: how to measure a row.
        label: name of the label column.
        forward: batch size, precision and the like.
        device: where the model runs.
        model: the model; or let `load` unpack one.
        losses: measure the loss of each modality's head, too.

    Attributes:
        model: the module, as it is at the moment.
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
        """Take the model of a snapshot; only its weights, where it is the same model as before."""
        if self._skeleton is None or not update_model(self.model, snapshot, self._skeleton):
            model = unpack_model(snapshot).to(self._device)
            if self._forward.channels_last:
                model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            self._take(model)
        self._skeleton = snapshot.skeleton

    def _take(self, model: nn.Module) -> None:
        self.model = unwrap_model(model)
        # The last batch is shorter: torch compiles once more then, with a variable number of rows. New weights are
        # copied into the same tensors and compile nothing.
        self._run: Any = torch.compile(self.model) if self._forward.compile else self.model

    def measure(self, columns: Columns, first_row: int = 0) -> RowMeasures:
        """Measure consecutive rows.

        Args:
            columns: `{column: (n, ...)}`; read-only views are fine, the model sees copies.
            first_row: row id of the first.

        Raises:
            ModelOutputError: the outputs break the contract.
            torch.OutOfMemoryError: a single row does not fit.
        """
        notices: list[str] = []
        with closing(self._batches(columns, first_row, notices)) as batches:
            return self._measure_all(batches, notices)

    def measure_batches(self, batches: Iterable[Tensors]) -> RowMeasures:
        """Measure the rows of batches on the device, `{column: (b, ...), "row_id": (b,)}`; errors as of `measure`."""
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
            # One transfer at the end: none of the batches waits for the device.
            measured = measured or [_nothing()]
            columns = {name: _to_numpy([batch[name] for batch in measured]) for name in measured[0]}
        return _report(columns, notices)

    def _measure_if_it_fits(self, batch: Tensors) -> dict[str, Tensor] | None:
        """Measures of a batch; None if it does not fit into memory."""
        try:
            return self._measure_batch(batch)
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error) or self._batch_size == 1:
                raise
        return None  # out of `except`: its traceback holds what did not fit

    def _measure_batch(self, batch: Tensors) -> dict[str, Tensor]:
        """(b,) measures, which rows have none by rights, and losses by modality where they are asked for."""
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
        """Copies of the rows on the device; on their way there while others are measured."""
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
                        del batch  # or it would stay alive until the next one is there
            except (RuntimeError, MemoryError) as error:
                # The batches ahead need memory, too, and it is here that they find none.
                if not _out_of_memory(error) or size == 1:
                    raise
            if begin < rows:
                notices.append(self._halve())

    def _send(self, transfer: Transfer, columns: Columns, first_row: int, size: int, begin: int) -> Receive:
        """Bring at most `size` rows from `begin` on to the device."""
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
        """A smaller batch for this and all later passes."""
        self._transfers.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        too_large, self._batch_size = self._batch_size, self._batch_size // 2
        return (
            f"scoring ran out of memory with batches of {too_large} rows and goes on with {self._batch_size}. Lower "
            "scoring.batch_size to begin there"
        )


def _report(columns: dict[str, np.ndarray], notices: list[str]) -> RowMeasures:
    rows, similarity, information = (columns.pop(name) for name in ("row_id", "similarity", "information"))
    bad = not_finite(similarity, information, columns.pop("unpaired", None))
    information[bad] = np.nan
    return RowMeasures(rows, similarity, information, columns, bad_row_problems(rows, bad), notices)


def bad_row_problems(rows: np.ndarray, bad: np.ndarray) -> list[Problem]:
    """The problem with rows (n,) where `bad` (n,) says that outputs are not finite, if there are any."""
    return [Problem(_BAD_OUTPUTS, int(bad.sum()), np.sort(rows[bad])[:NAMED_IDS].tolist())] if bad.any() else []


def not_finite(similarity: np.ndarray, information: np.ndarray, unpaired: np.ndarray | None) -> np.ndarray:
    """(n,) rows whose measures say that the model's outputs are NaN or infinite.

    Args:
        similarity: (n,) measures.
        information: (n,) measures.
        unpaired: (n,) rows with fewer than two modalities: they have no similarity, and nothing wrong. None: none.
    """
    sound = np.isfinite(similarity) if unpaired is None else np.isfinite(similarity) | unpaired
    return np.asarray(~(sound & np.isfinite(information)))


def _nothing() -> dict[str, Tensor]:
    """Measures of no rows."""
    return {"row_id": torch.empty(0, dtype=torch.int64), "similarity": torch.empty(0), "information": torch.empty(0)}


def _to_numpy(parts: list[Tensor]) -> np.ndarray:
    """(n,) of the batches' parts; floats as float32."""
    joined = torch.cat(parts)
    array: np.ndarray = (joined.float() if joined.is_floating_point() else joined).cpu().numpy()
    return array


# What else says that there is no memory left, in plain RuntimeErrors: the allocator of the CPU, the CUDA runtime where
# other processes use the GPU too, libraries that allocate for themselves, and compilers, which wrap what they meet.
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
