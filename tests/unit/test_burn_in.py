"""Shared burn-ins: what acts before the first scores, and who makes the checkpoint that all others start from."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bss_ray.sample.state import ScoreBlock
from bss_ray.schedule import Scheduler
from bss_ray.train.settings import overlay, training_config
from bss_ray.tune.trial import BurnIns, FirstScores, burn_in_key

BASE = {"scheduler": {"class_path": "Learning", "init_args": {"burn_in": 2, "temperature": 0.5, "fraction": 0.7}}}
OWNERS, KEY = [f"trial-{number}" for number in range(8)], "key"


@dataclass(frozen=True, kw_only=True)
class Own(Scheduler):
    """A user's own scheduler."""

    burn_in: int = 2


def key(**settings: Any) -> str | None:
    """Of the base with these settings; `__` stands for a dot."""
    dotted = {name.replace("__", "."): value for name, value in settings.items()}
    return burn_in_key(*training_config(overlay(BASE, dotted)))


@pytest.mark.parametrize(
    "settings",
    [
        {"scheduler__temperature": 0.1},
        {"scheduler__temperature": None},
        {"scheduler__fraction": 0.4, "scheduler__grow_epochs": 9},
        {"scheduler__uniform_mix": 0.3},
        {"scheduler__update_interval": 5},
        {"scheduler__replacement": True},
        {"scheduler__class_path": "Heuristic", "scheduler__burn_in": 2},
        {"scoring__momentum": 0.8},
        {"name": "other", "storage_path": "/elsewhere", "verbose": True, "choose_by": "val_f1_fused"},
        {"num_workers": 3, "use_gpu": False, "max_failures": 0},
    ],
    ids=str,
)
def test_what_acts_only_later_is_shared(settings: dict[str, Any]) -> None:
    assert key(**settings) == key()


def test_what_acts_before_has_a_burn_in_of_its_own() -> None:
    others: list[dict[str, Any]] = [
        {},
        {"scheduler__burn_in": 3},
        {"scheduler__burn_in": 0},  # the scores of the untrained model
        {"scheduler__class_path": "Uniform", "scheduler__burn_in": 2},  # without first scores
        {"loop__epochs": 9},  # of the learning rate's schedule
        {"loop__lr": 0.1},
        {"model__width": 7},
        {"measurer__fused_weight": 0.3},  # of the training loss
        {"measurer__information": "gradient_norm"},
        {"scoring__normalise": "rank"},
        {"scoring__unpaired": "lowest"},
        {"batch_size": 32},
        {"tail": "drop"},
        {"seed": 1},
        {"data": "rows/", "columns__modalities": ["a", "b"], "columns__label": "y"},
        {"mispaired": 0.1},
    ]
    keys = [key(**settings) for settings in others]
    assert None not in keys
    assert len(set(keys)) == len(others)


@pytest.mark.parametrize(
    "settings",
    [
        {"scheduler__class_path": "Uniform", "scheduler__burn_in": 0},  # neither epochs nor scores
        {"scheduler__burn_in": 4, "loop__epochs": 4},  # nothing comes after it
        {"initial_scores": "scores.parquet"},
        {"initial_checkpoint": "model.pt"},
        {"scheduler__class_path": "tests.unit.test_burn_in.Own"},  # nobody knows what acts when
    ],
    ids=str,
)
def test_where_there_is_none_to_share(settings: dict[str, Any]) -> None:
    assert key(**settings) is None


# ---- who makes it ---------------------------------------------------------------------------------


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(len(OWNERS)) as threads:
        yield threads
        BurnIns(tmp_path).keep(KEY, make_checkpoint(tmp_path / "end"))  # whoever still waits, after a failed test


def make_checkpoint(folder: Path, content: str = "weights") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.pt").write_text(content)
    return folder


def test_concurrent_takers_make_it_once(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    together, makers = threading.Barrier(len(OWNERS)), []

    def trial(owner: str) -> Path:
        burn_ins = BurnIns(tmp_path)  # each trial is a process of its own
        together.wait()
        found = burn_ins.take(KEY, owner)
        if found is None:
            makers.append(owner)
            time.sleep(0.05)  # the training
            burn_ins.keep(KEY, make_checkpoint(tmp_path / owner, owner))
            found = burn_ins.take(KEY, owner)
            assert found is not None
        return found

    found = set(pool.map(trial, OWNERS, timeout=20))
    assert len(makers) == len(found) == 1
    assert (found.pop() / "model.pt").read_text() == makers[0]


def test_a_released_claim_lets_another_make_it(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    burn_ins = BurnIns(tmp_path)
    assert burn_ins.take(KEY, "first") is None
    waiting = [pool.submit(BurnIns(tmp_path).take, KEY, owner) for owner in OWNERS[:2]]
    burn_ins.release("somebody else")
    time.sleep(0.3)
    assert not any(one.done() for one in waiting)

    burn_ins.release("first")  # it failed
    until = time.monotonic() + 10
    while not any(one.done() for one in waiting) and time.monotonic() < until:
        time.sleep(0.01)
    done = [one for one in waiting if one.done()]
    assert [one.result() for one in done] == [None], "one of them makes it, the other waits on"
    burn_ins.keep(KEY, make_checkpoint(tmp_path / "made"))
    assert {one.result(timeout=10) for one in waiting} == {None, burn_ins.take(KEY, "later")}


def test_burn_ins_of_other_keys_do_not_wait(tmp_path: Path) -> None:
    burn_ins = BurnIns(tmp_path)
    assert burn_ins.take("a", "first") is None
    assert burn_ins.take("b", "second") is None
    burn_ins.release("first")
    assert burn_ins.take("a", "third") is None


def test_kept_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    burn_ins = BurnIns(tmp_path)
    assert burn_ins.take(KEY, "first") is None
    checkpoint = make_checkpoint(tmp_path / "made")

    def torn(source: Path, target: Path, **_: Any) -> None:
        make_checkpoint(Path(target), "half of the weig")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("bss_ray.tune.trial.shutil.copytree", torn)
        with pytest.raises(OSError, match="No space left"):
            burn_ins.keep(KEY, checkpoint)
    burn_ins.release("first")
    assert burn_ins.take(KEY, "second") is None, "half a checkpoint is none"

    burn_ins.release()  # the next command finds what a killed one has left
    assert not list((tmp_path / "burn_in" / KEY).iterdir())
    assert burn_ins.take(KEY, "third") is None
    burn_ins.keep(KEY, checkpoint)
    kept = burn_ins.take(KEY, "fourth")
    assert kept is not None
    assert (kept / "model.pt").read_text() == "weights"


def test_the_first_to_keep_it_wins(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    together = threading.Barrier(len(OWNERS))
    for owner in OWNERS:  # several may go on from checkpoints of their own, within burn-in
        make_checkpoint(tmp_path / owner, owner)
    (tmp_path / "burn_in" / KEY).mkdir(parents=True)

    def keep(owner: str) -> None:
        together.wait()
        BurnIns(tmp_path).keep(KEY, tmp_path / owner)

    list(pool.map(keep, OWNERS, timeout=20))
    kept = BurnIns(tmp_path).take(KEY, "later")
    assert kept is not None
    assert list((tmp_path / "burn_in" / KEY).iterdir()) == [kept], "nothing else is left"
    content = (kept / "model.pt").read_text()
    BurnIns(tmp_path).keep(KEY, make_checkpoint(tmp_path / "late", "late"))
    assert (kept / "model.pt").read_text() == content in OWNERS


def test_scores_of_the_untrained_model(tmp_path: Path) -> None:
    parts = [ScoreBlock.empty(0, 6), ScoreBlock.empty(6, 4)]
    for part in parts:
        part.score[:] = np.arange(part.first_row, part.stop_row) / 10
        part.last_measured[:] = 1
    burn_ins = BurnIns(tmp_path)
    assert burn_ins.take(KEY, "first") is None
    burn_ins.keep_scores(KEY, parts)
    kept = burn_ins.take(KEY, "second")
    assert kept is not None
    found = FirstScores(kept).scores(4, 9)
    scores = {part.first_row + row: score for part in found for row, score in enumerate(part.score)}
    assert {row: scores[row] for row in range(4, 9)} == {row: np.float32(row / 10) for row in range(4, 9)}
    assert all((part.last_measured == FirstScores.VERSION).all() for part in found)


def test_nothing_to_release(tmp_path: Path) -> None:
    BurnIns(tmp_path).release()
    BurnIns(tmp_path).release("anybody")
