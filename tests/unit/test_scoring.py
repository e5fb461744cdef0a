"""How and where rows are scored: the settings, what `auto` stands for, and which shard is measured next."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys
from typing import Any

import pytest

from bss_ray.errors import ConfigError, Problem
from bss_ray.measure.score import Accumulation
from bss_ray.scoring.config import Scoring, ScoringPass, choose_engine
from bss_ray.scoring.pool import ScoringFailedError, ShardQueue, kept_rows_notice


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"engine": "actor"}, "unknown scoring engine 'actor'; did you mean 'actors'"),
            ({"engine": "ranks"}, r"unknown scoring engine 'ranks'; .*Choose from: actors, auto, online, workers"),
            ({"bad_rows": "skip"}, r"unknown bad_rows 'skip'; .*Choose from: error, keep"),
            ({"num_holders": 0}, "scoring.num_holders must be at least 1; received 0"),
            ({"num_scorers": 0}, "scoring.num_scorers must be at least 1; received 0"),
            ({"sweep_every": -1, "engine": "online"}, "scoring.sweep_every must be at least 0; received -1"),
            ({"max_failed_updates": -1}, "scoring.max_failed_updates must be at least 0; received -1"),
            ({"restart_timeout_s": -1.0}, "scoring.restart_timeout_s cannot be negative; received -1.0"),
            ({"cpus_per_holder": -0.5}, "scoring.cpus_per_holder cannot be negative; received -0.5"),
            ({"cpus_per_scorer": -0.5}, "scoring.cpus_per_scorer cannot be negative; received -0.5"),
            ({"gpus_per_scorer": -0.5}, "scoring.gpus_per_scorer cannot be negative; received -0.5"),
            ({"momentum": 1.0}, r"momentum must lie in \[0, 1\).*received 1.0"),
            ({"accumulate": "mean"}, r"unknown accumulate 'mean'; .*Choose from: ema, sum"),
            ({"accumulate": "sum", "momentum": 0.5}, "momentum=0.5 has no effect with accumulate='sum'"),
            ({"normalise": "min-max"}, "unknown normalise 'min-max'; did you mean 'minmax'"),
            ({"unpaired": "low"}, "unknown unpaired 'low'; did you mean 'lowest'"),
            ({"batch_size": 0}, "batch_size of the scoring passes must be at least 1; received 0"),
            ({"precision": "bfloat16"}, "unknown precision 'bfloat16'; did you mean 'bf16'"),
            ({"overlap": True, "engine": "workers"}, "scoring.overlap is for engine=actors; engine=workers has no use"),
            ({"overlap": True, "engine": "online"}, "scoring.overlap is for engine=actors; engine=online has no use"),
            ({"sweep_every": 3}, "scoring.sweep_every is for engine=online; engine=auto scores all rows anyway"),
            ({"sweep_every": 3, "engine": "actors"}, "scoring.sweep_every is for engine=online; engine=actors scores"),
            (
                {"channels_last": True, "engine": "workers"},
                "channels_last is for the replicas of engine=actors",
            ),
            (
                {"accumulate": "sum", "bad_rows": "keep"},
                "accumulate='sum' is the mean of all.*bad_rows='error'",
            ),
            (
                {"accumulate": "sum", "engine": "online"},
                "accumulate='sum' is the mean of all.*accumulate='ema'",
            ),
        ],
    )
    def test_refused(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            Scoring(**settings)

    @pytest.mark.parametrize(
        "settings",
        [
            {"overlap": True},
            {"overlap": True, "engine": "actors"},
            {"sweep_every": 3, "engine": "online"},
            {"accumulate": "sum", "engine": "workers"},
            {"restart_timeout_s": 0.0, "max_failed_updates": 0},
        ],
    )
    def test_allowed(self, settings: dict[str, Any]) -> None:
        scoring = Scoring(**settings)
        assert all(getattr(scoring, name) == value for name, value in settings.items())

    def test_parts(self) -> None:
        scoring = Scoring(
            momentum=0.4,
            normalise="rank",
            unpaired="lowest",
            batch_size=9,
            precision="bf16",
            channels_last=True,
            compile=True,
        )
        parts = (
            Accumulation(momentum=0.4, normalise="rank", unpaired="lowest"),
            ScoringPass(batch_size=9, precision="bf16", channels_last=True, compile=True),
        )
        for part in parts:
            assert isinstance(scoring, type(part))
            assert dataclasses.asdict(part).items() <= dataclasses.asdict(scoring).items()

    def test_holders_and_coordinator_read_it_without_torch(self) -> None:
        content = pickle.dumps(Scoring(momentum=0.5))
        program = (
            f"import pickle, sys; assert pickle.loads({content!r}).momentum == 0.5; assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", program], check=True)

    def test_settings_cannot_be_changed(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            Scoring().engine = "workers"  # type: ignore[misc]


class TestChooseEngine:
    @pytest.mark.parametrize(
        ("settings", "spare_cpus", "spare_gpus", "ranks_use_gpu", "engine", "why"),
        [
            ({"engine": "workers"}, 90, 9, False, "workers", "as set"),
            ({"engine": "online"}, 90, 9, True, "online", "as set"),
            ({"engine": "actors"}, 0, 0, True, "actors", "as set"),
            ({"overlap": True}, 0, 0, True, "actors", "overlap=true trains and scores at the same time"),
            ({"gpus_per_scorer": 0.2}, 0, 0, True, "actors", "scorers are given resources of their own"),
            ({"cpus_per_scorer": 1.0}, 0, 0, False, "actors", "scorers are given resources of their own"),
            (
                {},
                8,
                2,
                True,
                "workers",
                "the ranks leave 2 GPUs unused, but gpus_per_scorer is 0; set it",
            ),
            ({}, 8, 0.5, True, "workers", "the ranks leave 0.5 GPUs unused"),
            ({}, 8, 0, True, "workers", "the ranks hold all GPUs: they score their own rows, without a second copy"),
            ({"num_scorers": 3}, 3, 0, False, "actors", "the ranks leave 3 CPUs for 3 scorers"),
            (
                {"num_scorers": 3},
                2.5,
                0,
                False,
                "workers",
                "the ranks leave 2.5 CPUs, too few for 3 scorers",
            ),
            ({"num_scorers": 1}, 0, 4, False, "workers", "the ranks leave 0 CPUs, too few for 1 scorer as well"),
        ],
    )
    def test_what_auto_stands_for(
        self,
        settings: dict[str, Any],
        spare_cpus: float,
        spare_gpus: float,
        ranks_use_gpu: bool,
        engine: str,
        why: str,
    ) -> None:
        found = choose_engine(
            Scoring(**settings), spare_cpus=spare_cpus, spare_gpus=spare_gpus, ranks_use_gpu=ranks_use_gpu
        )
        assert found[0] == engine
        assert found[1].startswith(why)


class TestShardQueue:
    def drain(self, queue: ShardQueue, node: str) -> list[int]:
        taken = []
        while (shard := queue.take(node)) is not None:
            taken.append(shard)
            queue.done += 1
        return taken

    def test_shards_of_the_own_node_come_first(self) -> None:
        queue = ShardQueue(["a", "b", "a", "c", "b"])
        assert [queue.take("b"), queue.take("a"), queue.take("b"), queue.take("b")] == [1, 0, 4, 2]
        assert queue.take("a") == 3
        assert queue.take("a") is None

    def test_all_nodes_read_alike(self) -> None:
        queue = ShardQueue(["", "", ""])
        assert [queue.take("a"), queue.take("b"), queue.take("a"), queue.take("b")] == [0, 1, 2, None]

    def test_finished_when_all_are_done_not_when_all_are_taken(self) -> None:
        queue = ShardQueue(["a", "b"])
        assert not queue.finished
        queue.take("a"), queue.take("b")
        assert not queue.finished
        queue.done += 1
        assert not queue.finished
        queue.done += 1
        assert queue.finished

    def test_no_shards(self) -> None:
        assert ShardQueue([]).finished
        assert ShardQueue([]).take("a") is None

    def test_what_a_lost_scorer_had_comes_next(self) -> None:
        queue = ShardQueue(["", "", "", ""])
        first = queue.take("a")
        second = queue.take("b")
        assert (first, second) == (0, 1)
        queue.put_back(1, "node died")
        assert queue.take("a") == 1
        assert self.drain(queue, "a") == [2, 3]

    def test_but_near_shards_still_come_first(self) -> None:
        queue = ShardQueue(["a", "b", "b"])
        assert queue.take("a") == 0
        queue.put_back(0, "node died")
        assert queue.take("b") == 1
        assert queue.take("c") == 0

    def test_a_shard_that_scorers_die_of(self) -> None:
        queue = ShardQueue(["", ""])
        for _ in range(2):
            assert queue.take("a") == 0
            queue.put_back(0, "out of memory")
        assert queue.take("a") == 0
        with pytest.raises(ScoringFailedError, match="3 scorers were lost while they measured shard 0: out of memory"):
            queue.put_back(0, "out of memory")

    def test_deaths_are_counted_by_shard(self) -> None:
        queue = ShardQueue([""] * 5)
        for shard in range(5):  # five scorers lost, none of them by the same shard
            queue.take("a")
            queue.put_back(shard, "preempted")
            assert queue.take("a") == shard
        for shard in range(5):
            queue.put_back(shard, "preempted")
        assert self.drain(queue, "a") == [4, 3, 2, 1, 0]
        assert queue.finished

    def test_every_shard_once_whatever_is_lost(self) -> None:
        queue, measured, lost = ShardQueue(["a", "b", "c"] * 10), [], set()
        turn = 0
        while not queue.finished:
            turn += 1
            shard = queue.take("abc"[turn % 3])
            assert shard is not None
            if shard % 4 == 0 and shard not in lost:
                lost.add(shard)
                queue.put_back(shard, "lost")
            else:
                measured.append(shard)
                queue.done += 1
        assert sorted(measured) == list(range(30))
        assert len(lost) == 8
        assert turn == 38


def test_rows_that_keep_their_score() -> None:
    text = kept_rows_notice([Problem("rule", 4, [1, 2, 3, 9]), Problem("rule", 7, [20, 21, 22, 23, 24])])
    assert text == (
        "Warning: the model's outputs are NaN or infinite for 11 rows (first row ids 1, 2, 3, 9, 20): they keep their "
        "score, as bad_rows=keep says"
    )
