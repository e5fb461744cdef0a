"""Burn-ins: trials whose settings agree up to the end of burn-in start from what the first of them has left.

    burn_in/<key>/done/   a checkpoint: model, optimiser and first scores;
                          without burn-in the scores of the untrained model alone
    burn_in/<key>/claim   who is making it

The first epochs are uniform, and the first scores have no past, so most knobs of a space act only after them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from bss_ray.sample.score_files import ScoreFile, read_scores, write_scores
from bss_ray.sample.state import PartState
from bss_ray.schedule.schedulers import Heuristic, Learning, Uniform
from bss_ray.train.run import TrainConfig

# Say nothing about what is computed.
_PLACED = (
    *("name", "storage_path", "ray_address", "log_format", "profile", "verbose", "store", "placement"),
    *("num_workers", "use_gpu", "max_failures", "max_preemptions", "wait_limit_s"),
)
# Of a user's own scheduler nobody knows what acts when.
_KNOWN = (Uniform, Learning, Heuristic)
_FILES = "files.json"
_POLL_S = 0.1


def burn_in_key(config: TrainConfig, settings: str) -> str | None:
    """A name for everything that acts up to the end of burn-in; None where there is no burn-in to share.

    Args:
        config: of the run.
        settings: all its settings as YAML.
    """
    scheduler = config.scheduler
    if config.initial_scores is not None or config.initial_checkpoint is not None or type(scheduler) not in _KNOWN:
        return None
    if scheduler.burn_in >= config.loop.epochs or (scheduler.burn_in == 0 and not scheduler.uses_scores):
        return None
    tree: dict[str, Any] = yaml.safe_load(settings)
    for name in (*_PLACED, "choose_by"):
        tree.pop(name, None)
    tree["scheduler"] = {"burn_in": scheduler.burn_in, "scores": scheduler.uses_scores}
    del tree["scoring"]["momentum"]  # the first scores have nothing to remember
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=8).hexdigest()


class FirstScores:
    """Scores of the untrained model, to begin with.

    Args:
        folder: where `BurnIns.keep_scores` has left them.
    """

    VERSION = 1  # the first that there is

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def scores(self, start: int, stop: int) -> list[PartState]:
        """Scores that overlap rows [start, stop)."""
        files = [ScoreFile(**file) for file in json.loads((self._folder / _FILES).read_text())]
        read = lambda name: (self._folder / name).read_bytes()  # noqa: E731
        return read_scores(files, read, version=self.VERSION, start=start, stop=stop)


class BurnIns:
    """The burn-ins of a search, in a folder that all trials share.

    Args:
        folder: of the search.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "burn_in"

    def take(self, key: str, owner: str) -> Path | None:
        """What a burn-in has left; waits while another trial makes it.

        Args:
            key: of the burn-in.
            owner: the trial that asks.

        Returns:
            Its folder; None if `owner` is the one to make it, and to `keep` it.
        """
        place = self._folder / key
        place.mkdir(parents=True, exist_ok=True)
        while not (place / "done").exists():
            try:
                (place / "claim").symlink_to(owner)  # a link is made with its content or not at all
                return None
            except FileExistsError:
                time.sleep(_POLL_S)  # whoever makes it holds its resources, and its claim ends with it
        return place / "done"

    def keep(self, key: str, checkpoint: Path) -> None:
        """Keep the checkpoint of a burn-in that has just ended."""
        self._keep(key, lambda folder: shutil.copytree(checkpoint, folder, dirs_exist_ok=True))

    def keep_scores(self, key: str, scores: list[PartState]) -> None:
        """Keep the scores of the untrained model."""

        def write(folder: Path) -> None:
            files = write_scores(folder, 0, FirstScores.VERSION, scores)
            (folder / _FILES).write_text(json.dumps([asdict(file) for file in files]))

        self._keep(key, write)

    def _keep(self, key: str, write: Callable[[Path], object]) -> None:
        """Whole or not at all."""
        place = self._folder / key
        if (place / "done").exists():
            return
        temporary = place / f"coming-{uuid.uuid4().hex}"
        temporary.mkdir(parents=True)
        write(temporary)
        try:
            os.rename(temporary, place / "done")
        except OSError:  # another was faster
            shutil.rmtree(temporary)

    def release(self, owner: str | None = None) -> None:
        """Give up the claims of a trial that has ended; None: of all, when none runs."""
        for claim in (place / "claim" for place in self._folder.glob("*")):
            try:
                if owner is None or os.readlink(claim) == owner:
                    claim.unlink()
            except FileNotFoundError:
                continue  # none, or its owner has done so
        if owner is None:
            for rest in self._folder.glob("*/coming-*"):
                shutil.rmtree(rest)
