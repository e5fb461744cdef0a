"""Burn-ins: trials whose settings agree up to the end of burn-in start from one checkpoint, made by the first of them.

    burn_in/<key>/checkpoint/   model, optimiser and first scores
    burn_in/<key>/claim         who is making it

The first epochs are uniform, and the first scores have no past, so most knobs of a space act only after them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from pathlib import Path
from typing import Any

import yaml

from bss_ray.schedule.schedulers import Heuristic, Learning, Uniform
from bss_ray.train.run import TrainConfig

# Say nothing about what is computed.
_APART = (
    "name",
    "storage_path",
    "ray_address",
    "verbose",
    "choose_by",
    "max_failures",
    "num_workers",
    "use_gpu",
    "store",
)
_POLL_S = 0.1


def burn_in_key(config: TrainConfig, settings: str) -> str | None:
    """A name for everything that acts up to the end of burn-in; None where there is no burn-in to share.

    Args:
        config: of the run.
        settings: all its settings as YAML.
    """
    scheduler = config.scheduler
    begun = config.initial_scores is not None or config.initial_checkpoint is not None
    if (
        begun
        or not 1 <= scheduler.burn_in < config.loop.epochs
        or type(scheduler) not in (Uniform, Learning, Heuristic)
    ):
        return None  # of a user's own scheduler nobody knows what acts when
    tree: dict[str, Any] = yaml.safe_load(settings)
    for name in _APART:
        tree.pop(name, None)
    tree["scheduler"] = {"burn_in": scheduler.burn_in, "scores": scheduler.uses_scores}
    del tree["scoring"]["momentum"]  # the first scores have nothing to remember
    return hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=8).hexdigest()


class BurnIns:
    """The burn-ins of a search, in a folder that all trials share.

    Args:
        folder: of the search.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "burn_in"

    def take(self, key: str, owner: str) -> Path | None:
        """The checkpoint of a burn-in; waits while another trial makes it.

        Args:
            key: of the burn-in.
            owner: the trial that asks.

        Returns:
            Folder of the checkpoint; None if `owner` is the one to make it, and to `keep` it.
        """
        place = self._folder / key
        place.mkdir(parents=True, exist_ok=True)
        while not (place / "checkpoint").exists():
            try:
                with (place / "claim").open("x") as claim:
                    claim.write(owner)
                return None
            except FileExistsError:
                time.sleep(_POLL_S)  # whoever makes it holds its resources, and its claim ends with it
        return place / "checkpoint"

    def keep(self, key: str, checkpoint: Path) -> None:
        """Keep the checkpoint of a burn-in that has just ended: whole or not at all."""
        place = self._folder / key
        if (place / "checkpoint").exists():
            return
        temporary = place / f"coming-{uuid.uuid4().hex}"
        shutil.copytree(checkpoint, temporary)
        try:
            os.rename(temporary, place / "checkpoint")
        except OSError:  # another was faster
            shutil.rmtree(temporary)

    def release(self, owner: str | None = None) -> None:
        """Give up the claims of a trial that has ended; None: of all, when none runs."""
        for claim in self._folder.glob("*/claim"):
            try:
                if owner is None or claim.read_text() == owner:
                    claim.unlink()
            except FileNotFoundError:
                continue  # its owner has done so
        if owner is None:
            for rest in self._folder.glob("*/coming-*"):
                shutil.rmtree(rest)
