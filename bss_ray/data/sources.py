"""From what a user writes after `--data` to Ray Datasets."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import ray.data

from bss_ray.data.av_digits import av_digits
from bss_ray.data.columns import Columns
from bss_ray.errors import DataError, nearest

AV_DIGITS = "av-digits"
AV_DIGITS_COLUMNS = Columns(modalities=("audio", "image"), label="label", extra=("mispaired",))

SPLITS = ("train", "validation", "test")


def load_splits(
    source: str, *, validation: str | None = None, test: str | None = None, mispaired: float = 0.0, seed: int = 0
) -> dict[str, ray.data.Dataset | None]:
    """Ray Datasets of the splits; None for a split that there is none of.

    Args:
        source: `av-digits`; a Parquet file or folder; a folder with the sub-folders `train`, `validation`
            and `test`; or `module:function`, called with each split's name, returning a Ray Dataset or None.
        validation: Parquet file or folder, where `source` is one of training rows.
        test: likewise.
        mispaired: share of AV-Digits' training rows that is paired wrongly.
        seed: of that pairing.

    Raises:
        DataError: no such file, module or function, or a function that returns something else.
    """
    if source == AV_DIGITS:
        return {
            split: av_digits(split, mispaired=mispaired if split == "train" else 0.0, seed=seed) for split in SPLITS
        }
    if _is_function(source):
        return {split: _call(source, split) for split in SPLITS}
    if "://" not in source and (Path(source) / "train").is_dir():
        folder = Path(source)
        paths = {split: str(folder / split) if (folder / split).is_dir() else None for split in SPLITS}
        paths = {**paths, **{k: v for k, v in {"validation": validation, "test": test}.items() if v is not None}}
    else:
        paths = {"train": source, "validation": validation, "test": test}
    return {split: None if path is None else _read_parquet(path) for split, path in paths.items()}


def _is_function(source: str) -> bool:
    module, colon, function = source.rpartition(":")
    return (
        bool(colon)
        and "/" not in source
        and function.isidentifier()
        and all(p.isidentifier() for p in module.split("."))
    )


def _read_parquet(path: str) -> ray.data.Dataset:
    if "://" not in path:
        path = os.path.abspath(path)
        if not os.path.exists(path):
            raise DataError(
                f"no such file or folder: {path}. --data takes {AV_DIGITS!r}, a Parquet file or folder, or "
                "module:function"
            )
    try:
        return ray.data.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read Parquet from {path}: {error}") from error


def _call(source: str, split: str) -> ray.data.Dataset | None:
    module_name, _, name = source.rpartition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise DataError(f"--data {source}: cannot import module {module_name!r}: {error}") from error
    function = getattr(module, name, None)
    if function is None:
        raise DataError(f"--data {source}: module {module_name} has no function {name!r}; {nearest(name, dir(module))}")
    dataset = function(split)
    if dataset is None and split != "train":
        return None
    if not isinstance(dataset, ray.data.Dataset):
        raise DataError(
            f"--data {source}: {name}({split!r}) must return a ray.data.Dataset (or None for a split there is none "
            f"of); it returned {type(dataset).__name__}"
        )
    return dataset
