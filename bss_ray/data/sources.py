"""From the value of `--data` to Ray Datasets, or to the tables of AV-Digits."""

from __future__ import annotations

import importlib
import os

import pyarrow.fs
import ray.data

from bss_ray.data.av_digits import SPLITS, av_digits
from bss_ray.data.blocks import Rows
from bss_ray.data.columns import Columns
from bss_ray.data.manifest import json_digest
from bss_ray.errors import ConfigError, DataError, nearest
from bss_ray.storage import StoragePath, absolute, is_uri

AV_DIGITS = "av-digits"
AV_DIGITS_COLUMNS = Columns(modalities=("audio", "image"), label="label", extra=("mispaired",))


def load_splits(
    source: str, *, validation: str | None = None, test: str | None = None, mispaired: float = 0.0, seed: int = 0
) -> dict[str, Rows | None]:
    """Rows of the splits; None for a split that does not exist.

    Args:
        source: `av-digits`; the path or URI of a Parquet file or folder, or of a folder with the sub-folders `train`,
            `validation` and `test`; or `module:function`, which is called with each split's name and returns a Ray
            Dataset or None.
        validation: Parquet file or folder of validation rows, if `source` is a file or folder of training rows.
        test: Parquet file or folder of test rows, if `source` is a file or folder of training rows.
        mispaired: Share of AV-Digits' training rows that is paired wrongly.
        seed: Seed of that pairing.

    Raises:
        DataError: The file, module or function does not exist, or the function returns something else.
    """
    if source == AV_DIGITS:
        return {
            split: av_digits(split, mispaired=mispaired if split == "train" else 0.0, seed=seed) for split in SPLITS
        }
    if _is_function(source):
        return {split: _call(source, split) for split in SPLITS}
    paths = parquet_paths(source, validation=validation, test=test)
    return {split: None if path is None else _read_parquet(path) for split, path in paths.items()}


def parquet_paths(source: str, *, validation: str | None = None, test: str | None = None) -> dict[str, str | None]:
    """Parquet file or folder of each split (see `load_splits`); None for a split without one."""
    if source == AV_DIGITS or _is_function(source):
        return dict.fromkeys(SPLITS)
    folder = _known_place(source)
    if folder is not None and (folder / "train").is_dir():
        paths = {split: (folder / split).uri if (folder / split).is_dir() else None for split in SPLITS}
        return {**paths, **{k: v for k, v in {"validation": validation, "test": test}.items() if v is not None}}
    return {"train": source, "validation": validation, "test": test}


def files_key(path: str) -> str | None:
    """Digest of the names, sizes and modification times of the files under a path or URI; None if there are none."""
    place = _known_place(path)
    if place is None:
        return None
    if place.is_dir():
        files = place.system.get_file_info(pyarrow.fs.FileSelector(place.path, recursive=True))
    else:
        files = [place.system.get_file_info(place.path)]
    if any(file.is_file and file.mtime_ns is None for file in files):
        return None
    return json_digest(sorted([file.path, file.size, file.mtime_ns] for file in files if file.is_file))


def _known_place(path: str) -> StoragePath | None:
    """The path of a path or URI; None on a file system that Ray Data may know and Arrow does not.

    Raises:
        StorageError: The file system does not answer, or refuses access.
    """
    try:
        return StoragePath.of(path)
    except ConfigError:
        return None


def absolute_source(source: str) -> str:
    """The same data for processes with another working folder; `av-digits`, functions and URIs as they are."""
    return source if source == AV_DIGITS or _is_function(source) else absolute(source)


def _is_function(source: str) -> bool:
    module, colon, function = source.rpartition(":")
    return (
        bool(colon)
        and "/" not in source
        and function.isidentifier()
        and all(p.isidentifier() for p in module.split("."))
    )


def _read_parquet(path: str) -> ray.data.Dataset:
    if not is_uri(path):
        path = absolute(path)
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
