"""The record of a search: trials are asked for and told, and a search whose driver was killed goes on from it."""

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from bss_ray.errors import ConfigError, StorageError
from bss_ray.tune.config import Pruning, TuneConfig
from bss_ray.tune.objective import Objective
from bss_ray.tune.record import HOPELESS, JOURNAL, SearchRecord, TrialSpec, load_study, open_storage
from bss_ray.tune.space import SearchSpace

METRIC = "val_accuracy_fused"
DATA = {"train": "f00", "validation": "f01"}
NAN = float("nan")


def points(trial: optuna.Trial) -> dict[str, Any]:
    settings: dict[str, Any] = {"loop.lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True)}
    if trial.suggest_categorical("kind", ["linear", "exponential"]) == "exponential":
        settings["scheduler.temperature"] = trial.suggest_float("t", 0.05, 2.0, log=True)
    return settings


KNOWN = [{"lr": 0.001, "kind": "linear"}, {"lr": 0.002, "kind": "exponential", "t": 0.25}]


def objective(*metrics: str) -> Objective:
    return Objective(metrics or (METRIC,), METRIC, ("audio", "image"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither waits for the disk nor checks all settings, which takes a tenth of a second for each trial."""

    def checked(tree: dict[str, Any]) -> None:
        if (epochs := tree.get("loop", {}).get("epochs", 1)) < 1:
            raise ConfigError(f"loop.epochs must be at least 1; received {epochs}")

    monkeypatch.setattr("bss_ray.tune.space.training_config", checked)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """The search's own journal; for tests of `both`, a database as well."""
    return f"sqlite:///{tmp_path}/study.db" if getattr(request, "param", "") == "sqlite" else None


both = pytest.mark.parametrize("storage", ["journal", "sqlite"], indirect=True)


Opened = Callable[..., SearchRecord]


@pytest.fixture
def opened(storage: str | None, tmp_path: Path) -> Opened:
    """Opens the record, as each command does."""

    def open_record(
        *,
        known: list[dict[str, Any]] = KNOWN,
        function: Callable[[optuna.Trial], dict[str, Any]] = points,
        metrics: tuple[str, ...] = (METRIC,),
        data: dict[str, str | None] = DATA,
        **settings: Any,
    ) -> SearchRecord:
        config = TuneConfig(storage=storage, **{"pruning": Pruning(enabled=False), **settings})
        space = SearchSpace(config.space, function, known, {})
        return SearchRecord(open_storage(storage, tmp_path), config, space, objective(*metrics), data)

    return open_record


def outcome(*values: float, finished: bool = True) -> dict[str, Any]:
    return {"values": list(values), "seed_values": [list(values)], "epoch": 3, "seconds": 1.5, "finished": finished}


def asked(record: SearchRecord) -> TrialSpec:
    spec = record.next_trial()
    assert spec is not None
    return spec


def run(record: SearchRecord, value: float = 0.5) -> TrialSpec:
    """A trial from its beginning to its end."""
    spec = asked(record)
    assert not record.report(spec.number, 1, outcome(value, finished=False))
    assert record.end(spec.number, outcome(value)) == TrialState.COMPLETE
    return spec


def states(record: SearchRecord) -> list[str]:
    return [trial.state.name for trial in record.study.trials]


# ---- asked and told -------------------------------------------------------------------------------


@both
def test_a_search_from_its_beginning_to_its_end(opened: Opened) -> None:
    record = opened(trials=5)
    specs = [run(record, value / 10) for value in range(5)]
    assert record.next_trial() is None
    assert [spec.number for spec in specs] == [0, 1, 2, 3, 4]
    assert [spec.folder for spec in specs[:2]] == ["00000", "00001"]
    assert specs[0].settings == {"loop.lr": 0.001}, "known good first"
    assert specs[1].settings == {"loop.lr": 0.002, "scheduler.temperature": 0.25}
    assert len({spec.settings["loop.lr"] for spec in specs}) == 5
    assert states(record) == ["COMPLETE"] * 5
    assert record.study.best_trial.number == 4
    kept = record.study.trials[4]
    assert kept.values == [0.4]
    assert kept.intermediate_values == {1: 0.4}
    assert kept.user_attrs == {"settings": specs[4].settings, "seed_values": [[0.4]], "epoch": 3, "seconds": 1.5}
    assert record.study.metric_names == [METRIC]
    assert (record.metrics, record.mode) == ([METRIC], "max")


def test_more_known_points_than_trials(opened: Opened) -> None:
    record = opened(trials=1)
    assert run(record).settings == {"loop.lr": 0.001}
    assert record.next_trial() is None
    assert run(opened(trials=2)).settings["loop.lr"] == 0.002, "it was kept for later"


@both
def test_several_metrics(opened: Opened) -> None:
    record = opened(metrics=(METRIC, "seconds"), trials=3)
    for values in ((0.5, 9.0), (0.6, 10.0), (0.4, 20.0)):
        spec = asked(record)
        assert record.report(spec.number, 1, outcome(*values, finished=False)) is False
        assert record.end(spec.number, outcome(*values)) == TrialState.COMPLETE
    assert [direction.name for direction in record.study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert sorted(trial.number for trial in record.study.best_trials) == [0, 1]


@both
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_a_value_that_is_no_number_is_a_failure(opened: Opened, value: float) -> None:
    record = opened()
    spec = asked(record)
    record.report(spec.number, 1, outcome(value, finished=False))
    assert record.end(spec.number, outcome(value)) == TrialState.FAIL
    assert record.first_cause == f"trial 0: {METRIC} is {value}"
    assert record.complete == []


def test_failures_have_causes_and_count(opened: Opened) -> None:
    record = opened(trials=3)
    assert record.first_cause == ""
    record.fail(asked(record).number, "its process died")
    run(record)
    record.fail(asked(record).number, "boom")
    assert record.first_cause == "trial 0: its process died"
    assert states(record) == ["FAIL", "COMPLETE", "FAIL"]
    assert len(record.finished) == 3
    assert record.next_trial() is None


def test_impossible_settings_fail_and_the_next_trial_comes(opened: Opened) -> None:
    def sometimes(trial: optuna.Trial) -> dict[str, Any]:
        return {"loop.epochs": trial.suggest_int("epochs", -3, 3)}

    record = opened(function=sometimes, known=[{"epochs": 0}, {"epochs": 2}], trials=2)
    spec = asked(record)
    assert (spec.number, spec.settings) == (1, {"loop.epochs": 2})
    assert "epochs must be at least 1; received 0; the trial's values: epochs=0" in record.first_cause
    assert record.next_trial() is None, "it counts"


def test_hopeless_after_so_many_failures_and_nothing_else(opened: Opened) -> None:
    record = opened(trials=99)
    for _ in range(HOPELESS - 1):
        record.fail(asked(record).number, "boom")
    assert not record.hopeless
    record.fail(asked(record).number, "boom")
    assert record.hopeless
    assert record.next_trial() is None
    assert len(record.finished) == HOPELESS


def test_one_good_trial_is_hope(opened: Opened) -> None:
    record = opened(trials=99)
    run(record)
    for _ in range(HOPELESS + 2):
        record.fail(asked(record).number, "boom")
    assert not record.hopeless
    assert record.next_trial() is not None


def test_a_space_that_can_only_fail_ends(opened: Opened) -> None:
    record = opened(function=lambda trial: {"loop.epochs": trial.suggest_int("epochs", -3, 0)}, known=[], trials=99)
    assert record.next_trial() is None
    assert states(record) == ["FAIL"] * HOPELESS


def test_changed_settings_are_noted(opened: Opened) -> None:
    record = opened()
    spec = asked(record)
    record.note_changes(spec.number, 2, spec.settings)
    assert "changes" not in record.study.trials[0].user_attrs
    record.note_changes(spec.number, 3, {"loop.lr": 0.5})
    record.note_changes(spec.number, 6, {"loop.lr": 0.6})
    assert record.study.trials[0].user_attrs["settings"] == {"loop.lr": 0.6}
    assert record.study.trials[0].user_attrs["changes"] == [[3, {"loop.lr": 0.5}], [6, {"loop.lr": 0.6}]]


# ---- the same seed --------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["tpe", "random"])
def test_the_same_seed_suggests_the_same_also_after_a_stop(algorithm: str, tmp_path: Path) -> None:
    def settings(name: str, *, seed: int, stops: set[int]) -> list[dict[str, Any]]:
        config = TuneConfig(algorithm=algorithm, trials=16, seed=seed, name=name)  # type: ignore[arg-type]

        def open_record() -> SearchRecord:
            space = SearchSpace("s", points, KNOWN, {})
            return SearchRecord(open_storage(None, tmp_path), config, space, objective(), DATA)

        record, found = open_record(), []
        for number in range(config.trials):
            if number in stops:
                record = open_record()
            spec = asked(record)
            assert spec.number == number
            record.end(spec.number, outcome(spec.settings["loop.lr"]))
            found.append(spec.settings)
        return found

    whole = settings("whole", seed=3, stops=set())
    assert settings("stopped", seed=3, stops={1, 2, 7, 15}) == whole
    assert len({json.dumps(one) for one in whole}) == 16, "the first trials are not drawn again"
    other = settings("other", seed=4, stops=set())
    assert other[:2] == whole[:2], "known points"
    assert not any(one in whole for one in other[2:])


@both
def test_what_known_points_leave_open_differs(opened: Opened) -> None:
    record = opened(known=[{"kind": "linear"}, {"kind": "exponential"}])
    assert len({asked(record).settings["loop.lr"] for _ in range(3)}) == 3


# ---- after the driver was killed ------------------------------------------------------------------


@both
def test_running_trials_come_first_and_finished_ones_are_kept(opened: Opened) -> None:
    record = opened(trials=6)
    first = run(record, 0.7)
    running = [asked(record), asked(record)]
    record.fail(asked(record).number, "boom")
    record.report(running[0].number, 1, outcome(0.2, finished=False))
    assert record.end(running[1].number, {}) is None, "ctrl-C before its first report"
    assert record.end(running[0].number, outcome(0.2, finished=False)) is None, "ctrl-C"

    record = opened(trials=6)
    assert states(record) == ["COMPLETE", "RUNNING", "RUNNING", "FAIL"]
    assert record.complete[0].user_attrs["settings"] == first.settings
    again = [asked(record), asked(record)]
    assert again == [replace(spec, attempt=1) for spec in running]
    assert [spec.folder for spec in again] == ["00001-again-1", "00002-again-1"]
    assert again[0].earlier_folders() == ["00001"]
    assert asked(record).number == 4

    record = opened(trials=6)  # killed again
    third = asked(record)
    assert (third.number, third.attempt) == (1, 2)
    assert third.earlier_folders() == ["00001-again-1", "00001"]
    assert not record.report(third.number, 1, outcome(0.3, finished=False)), "reported before the kill"
    assert record.study.trials[1].intermediate_values == {1: 0.2}
    assert record.end(third.number, outcome(0.9)) == TrialState.COMPLETE
    rest = [asked(record) for _ in range(3)]
    assert [(spec.number, spec.attempt) for spec in rest] == [(2, 2), (4, 1), (5, 0)]
    assert record.next_trial() is None
    for spec in rest:
        record.end(spec.number, outcome(0.5))
    assert states(record) == ["COMPLETE", "COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert opened(trials=6).next_trial() is None
    assert asked(opened(trials=7)).number == 6, "a larger search goes on"


@both
def test_changed_settings_outlive_the_driver(opened: Opened) -> None:
    record = opened()
    spec = asked(record)
    record.note_changes(spec.number, 3, {"loop.lr": 0.5})
    assert asked(opened()).settings == {"loop.lr": 0.5}


class Killed(BaseException):
    """Nothing handles it."""


@pytest.mark.parametrize("knobs", [0, 1, 2, 3])
def test_killed_while_a_trial_is_asked_for(opened: Opened, knobs: int) -> None:
    known = [{"kind": "exponential"}]
    wanted = asked(opened(name="undisturbed", known=known)).settings

    def killed(trial: optuna.Trial) -> dict[str, Any]:
        asks = [
            lambda: trial.suggest_float("lr", 1e-4, 1e-2, log=True),
            lambda: trial.suggest_categorical("kind", ["linear", "exponential"]),
            lambda: trial.suggest_float("t", 0.05, 2.0, log=True),
        ]
        for ask in asks[:knobs]:
            ask()
        raise Killed

    def goes_on(name: str) -> dict[str, Any]:
        with pytest.raises(Killed):
            opened(name=name, known=known, function=killed).next_trial()
        record = opened(name=name, known=known)
        spec = asked(record)
        assert (spec.number, spec.attempt) == (0, 1)
        assert asked(record).number == 1
        return spec.settings

    settings = goes_on("once")
    assert settings == goes_on("the same again")
    assert settings.keys() == wanted.keys(), "the known point that it was begun with"
    assert settings["loop.lr"] == wanted["loop.lr"]
    if knobs in (0, 3):
        assert settings == wanted


@pytest.mark.parametrize("writes", range(9))
def test_killed_at_the_very_beginning(opened: Opened, writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left = writes

    def dying(write: Callable[..., Any]) -> Callable[..., Any]:
        def write_or_die(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return write(*args, **kwargs)

        return write_or_die

    with monkeypatch.context() as patched:
        for name in ("set_user_attr", "enqueue_trial"):
            patched.setattr(optuna.Study, name, dying(getattr(optuna.Study, name)))
        with pytest.raises(Killed):
            opened()
    record = opened()
    assert [trial.system_attrs["fixed_params"] for trial in record.study.trials] == KNOWN
    assert record.study.metric_names == [METRIC]
    assert run(record).settings == {"loop.lr": 0.001}
    assert states(opened()) == ["COMPLETE", "WAITING"]


# ---- pruning --------------------------------------------------------------------------------------

ASHA = {"pruning": Pruning(grace_epochs=2, reduction=2)}


@both
def test_the_worse_ones_are_pruned_at_the_rungs(opened: Opened) -> None:
    record = opened(**ASHA)
    good, bad = asked(record), asked(record)
    for step in (1, 2, 3):
        assert not record.report(good.number, step, outcome(0.8, finished=False))
    assert not record.report(bad.number, 1, outcome(0.1, finished=False)), "no rung"
    assert record.report(bad.number, 2, outcome(0.2, finished=False))
    assert record.end(bad.number, outcome(0.2, finished=False)) == TrialState.PRUNED
    assert record.end(good.number, outcome(0.9)) == TrialState.COMPLETE
    assert states(record) == ["COMPLETE", "PRUNED"]
    pruned = record.study.trials[1]
    assert pruned.user_attrs["seed_values"] == [[0.2]]
    assert pruned.user_attrs["seconds"] == 1.5
    assert [trial.number for trial in record.complete] == [0]
    assert len(record.finished) == 2


def test_an_error_is_pruned_where_it_is_high(opened: Opened) -> None:
    record = opened(metrics=("seconds",), **ASHA)
    good, bad = asked(record), asked(record)
    assert not record.report(good.number, 2, outcome(1.0, finished=False))
    assert record.report(bad.number, 2, outcome(3.0, finished=False))


def test_one_that_has_come_to_its_end_is_complete(opened: Opened) -> None:
    record = opened(**ASHA)
    record.report(asked(record).number, 2, outcome(0.8, finished=False))
    short = asked(record)
    assert not record.report(short.number, 2, outcome(0.1))
    assert record.end(short.number, outcome(0.1)) == TrialState.COMPLETE


def test_nan_does_not_pass_a_rung(opened: Opened) -> None:
    record = opened(**ASHA)
    spec = asked(record)
    assert record.report(spec.number, 2, outcome(NAN, finished=False))
    assert record.end(spec.number, outcome(NAN, finished=False)) == TrialState.PRUNED


@pytest.mark.parametrize("settings", [{}, {"metrics": (METRIC, "seconds"), "pruning": Pruning()}], ids=str)
def test_nothing_is_pruned_where_trials_are_not_compared(opened: Opened, settings: dict[str, Any]) -> None:
    record = opened(**settings)
    values = [(0.8, 0.1), (0.1, 0.2)] if settings else [(0.8,), (0.1,)]
    for one in values:
        number = asked(record).number
        assert not any(record.report(number, step, outcome(*one, finished=False)) for step in range(1, 30))


@both
def test_rungs_outlive_the_driver(opened: Opened) -> None:
    record = opened(**ASHA)
    passed, other = asked(record), asked(record)
    assert not record.report(passed.number, 2, outcome(0.5, finished=False))

    record = opened(**ASHA)
    assert asked(record).number == passed.number
    assert asked(record).number == other.number
    better, worse = asked(record), asked(record)
    assert not record.report(better.number, 2, outcome(0.9, finished=False))
    assert record.report(worse.number, 2, outcome(0.4, finished=False)), "compared with those before the kill"
    assert not record.report(passed.number, 2, outcome(0.5, finished=False)), "it has passed this rung"
    assert not record.report(passed.number, 3, outcome(0.5, finished=False))
    assert not record.report(better.number, 4, outcome(0.9, finished=False))
    assert record.report(passed.number, 4, outcome(0.6, finished=False)), "the next rung, four epochs"


# ---- whose study it is ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"space": "full"}, "space: 'learning' there, 'full' now"),
        ({"metrics": ("seconds",)}, "metrics: ['val_accuracy_fused'] there, ['seconds'] now"),
        ({"metrics": ("seconds",)}, "directions: ['maximize'] there, ['minimize'] now"),
        ({"seeds": 3}, "seeds: 1 there, 3 now"),
        ({"algorithm": "random"}, "algorithm: 'tpe' there, 'random' now"),
        (
            {"data": {"train": "f00", "validation": "f99"}},
            "'validation': 'f01'} there, {'train': 'f00', 'validation': 'f99'} now",
        ),
    ],
    ids=str,
)
def test_a_study_of_another_search_is_refused(opened: Opened, other: dict[str, Any], said: str) -> None:
    run(opened())
    with pytest.raises(ConfigError) as raised:
        opened(**other)
    message = str(raised.value)
    assert said in message
    assert message.startswith("the study 'tune' in ")
    assert message.endswith("Choose another --name or --storage")
    assert states(opened()) == ["COMPLETE", "WAITING"], "it is left as it was"


@both
def test_a_study_of_something_else_is_refused(opened: Opened, storage: str | None, tmp_path: Path) -> None:
    place = open_storage(storage, tmp_path)
    optuna.create_study(study_name="empty", storage=place, direction="minimize")
    used = optuna.create_study(study_name="used", storage=place, direction="maximize")
    used.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(ConfigError, match=r"directions: \['minimize'\] there, \['maximize'\] now"):
        opened(name="empty")
    with pytest.raises(ConfigError, match="space: None there, 'learning' now"):
        opened(name="used")


@both
def test_searches_share_a_storage(opened: Opened) -> None:
    first, second = opened(name="first"), opened(name="second")
    run(first, 0.1)
    run(second, 0.2)
    run(first, 0.3)
    assert [trial.value for trial in opened(name="first").complete] == [0.1, 0.3]
    assert [trial.value for trial in opened(name="second").complete] == [0.2]


# ---- storages -------------------------------------------------------------------------------------


@both
def test_a_study_is_loaded_for_its_report(opened: Opened, storage: str | None, tmp_path: Path) -> None:
    run(opened(), 0.25)
    assert load_study(storage, "tune", tmp_path).best_value == 0.25
    with pytest.raises(StorageError, match="there is no study 'tuna' in "):
        load_study(storage, "tuna", tmp_path)


def test_a_journal_may_be_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").mkdir()
    open_storage("studies/mine.journal", tmp_path / "nowhere")
    assert (tmp_path / "studies" / "mine.journal").exists()
    assert not (tmp_path / JOURNAL).exists()


def test_the_lock_of_a_killed_owner_is_seen_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Optuna gives up on a lock that is not renewed, and asks the file that the lock names for that.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "studies").mkdir()
    storage = open_storage("studies/mine.journal", tmp_path)
    links = []
    monkeypatch.setattr(os, "symlink", lambda target, link: links.append(target))
    monkeypatch.setattr(os, "rename", lambda *_: None)
    monkeypatch.setattr(os, "unlink", lambda *_: None)
    optuna.create_study(study_name="s", storage=storage)
    assert set(links) == {str(tmp_path / "studies" / "mine.journal")}


@pytest.mark.parametrize(
    ("place", "content", "said"),
    [
        ("no/such/folder.journal", None, "No such file or directory"),
        ("", None, "Is a directory"),
        ("file/study.journal", None, "Not a directory"),
        ("notes", b"buy milk\n", "it is no journal of Optuna, or it is damaged"),
        ("numbers", b"[1]\n2\n", "it is no journal of Optuna, or it is damaged"),
        ("binary", bytes(range(256)), "it is no journal of Optuna, or it is damaged"),
        ("sqlite:///{folder}/no/such/study.db", None, "unable to open database file"),
        ("sqlite:///{folder}/file", None, "file is not a database"),
        ("sqlite://", None, "ends with this command, and the search could not resume"),
        ("sqlite:///:memory:", None, "ends with this command, and the search could not resume"),
        ("nosuch://host/db", None, "nosuch"),
        ("://", None, "Could not parse"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_storages_that_cannot_be_opened(place: str, content: bytes | None, said: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"no data base" * 99)
    if content is not None:
        (tmp_path / place).write_bytes(content)
    place = place.format(folder=tmp_path) if "://" in place else str(tmp_path / place)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(StorageError) as raised:
        open_storage(place, tmp_path)
    message = str(raised.value)
    assert message.startswith(f"the storage {place} ")
    assert said in message
    assert message.endswith("a URL such as sqlite:///study.db, or the path of a journal file, or leave --storage away")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
@pytest.mark.parametrize("url", ["{folder}/study.journal", "sqlite:///{folder}/study.db"])
def test_a_folder_that_cannot_be_written(url: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match=r"cannot be opened: .*leave --storage away"):
        open_storage(url.format(folder=tmp_path), tmp_path)


def test_a_damaged_journal_of_the_search_itself(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_bytes(b"\0" * 64)
    with pytest.raises(StorageError, match=r"it is damaged .*begins with.* Move it away, and the search starts"):
        open_storage(None, tmp_path)


class TestTornJournal:
    """A line that was not written to its end: the disk was full, or the machine went down."""

    def test_any_torn_last_line_is_survived(self, opened: Opened, tmp_path: Path) -> None:
        run(opened(trials=3), 0.5)
        lines = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
        assert len(lines) > 15
        for count, line in enumerate(lines):
            before = b"".join(lines[:count])
            cut = (1, len(line) // 2, len(line) - 1)[count % 3]
            (tmp_path / JOURNAL).write_bytes(before + line[:cut])
            record = opened(trials=3)
            assert (tmp_path / JOURNAL).read_bytes().startswith(before)
            while (spec := record.next_trial()) is not None:
                record.end(spec.number, outcome(0.1))
            assert states(opened(trials=3)) == ["COMPLETE"] * 3

    @pytest.mark.parametrize("rest", [b"{", b"\0" * 40, b'{"op_code":8,"worker_id":"a"{"op_code":8}\n'], ids=str)
    def test_any_kind_of_tear(self, opened: Opened, tmp_path: Path, rest: bytes) -> None:
        run(opened())
        whole = (tmp_path / JOURNAL).read_bytes()
        (tmp_path / JOURNAL).write_bytes(whole + rest)
        open_storage(None, tmp_path)
        assert (tmp_path / JOURNAL).read_bytes() == whole

    def test_only_the_torn_line_is_lost(self, opened: Opened, tmp_path: Path) -> None:
        record = opened()
        run(record, 0.5)
        second = asked(record)
        record.end(second.number, outcome(0.7))
        journal = tmp_path / JOURNAL
        journal.write_bytes(journal.read_bytes()[:-9])  # of that it is complete
        record = opened()
        assert states(record)[:2] == ["COMPLETE", "RUNNING"]
        assert asked(record) == replace(second, attempt=1)

    def test_a_reader_leaves_a_whole_journal_alone(self, opened: Opened, tmp_path: Path) -> None:
        run(opened())
        copy = tmp_path / "copy"
        copy.mkdir()
        shutil.copy(tmp_path / JOURNAL, copy / JOURNAL)
        load_study(None, "tune", copy)
        assert (copy / JOURNAL).read_bytes() == (tmp_path / JOURNAL).read_bytes()
        assert os.listdir(copy) == [JOURNAL]
