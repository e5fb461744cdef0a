"""The results of a search in numbers and sentences: its knobs, its best trials, and uniform sampling.

A few dozen noisy values and a handful of knobs easily suggest effects that do not exist. So the sentences
name their evidence, and claim nothing that shuffled values would show as well.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from bss_ray.report.console import is_share, show
from bss_ray.train.metric_names import is_error
from bss_ray.tune.objective import Interval

# `{"metric": name, "seeds": [...], "best": {"validation": {name: [a value per seed]}, "test": {...}}, "uniform": {the
# same}}`, as `result.json` of a search has it.
Comparison = Mapping[str, Any]

# Fewest trials for a sentence on a knob. With fewer trials only a nearly perfect order could be claimed.
FEWEST_TRIALS = 8
# Fewest trials of a category that takes part in a comparison.
_FEWEST_OF_A_CATEGORY = 3
# Share of searches without any effect in which an effect of any knob is claimed.
_LEVEL = 0.05
# Trials are compared within blocks of this number of trials made at about the same time. TPE makes better trials the
# longer it works, and meanwhile settles on values of all knobs, also of knobs without any effect: with all trials in
# one block every fourth search of 40 trials claimed an effect that did not exist, with blocks of 8 every tenth.
_BLOCK = 8
_PERMUTATIONS = 9999
_SEED = 0
# The best trials are at the edge of a range if their median is within this share of it.
_EDGE = 0.15


# ---- values and metrics ----------------------------------------------------------------------------


def metrics_of(study: Study) -> dict[str, bool]:
    """Name of each objective, and whether higher is better."""
    names = study.metric_names or [f"objective {place}" for place in range(len(study.directions))]
    higher = [direction == StudyDirection.MAXIMIZE for direction in study.directions]
    return dict(zip(names, higher, strict=True))


def show_difference(metric: str, value: float) -> str:
    """A difference of values for people: `1.20 points`, or `0.4711` if the metric is no share."""
    return f"{show(metric, value, unit=False)} points" if is_share(metric) else show(metric, value)


def _lower_is_better(metric: str) -> bool:
    return metric.count("_") > 1 and is_error(metric)


def finished(study: Study) -> list[FrozenTrial]:
    """Trials with finite objective values."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [trial for trial in trials if np.isfinite(trial.values).all()]


# ---- the best --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Configuration:
    """A trial in the table of the best trials.

    Attributes:
        number: Number of the trial.
        values: Objective values by metric.
        intervals: Means over the trial's seeds by metric; empty if the trial kept no values of its seeds.
        params: Values of the knobs.
        settings: Dotted settings of `bss-ray train`; of population-based training the last settings.
    """

    number: int
    values: dict[str, float]
    intervals: dict[str, Interval]
    params: dict[str, object]
    settings: dict[str, object]

    def cell(self, metric: str) -> str:
        """`97.31% ± 0.40 (3 seeds)`; an objective value that is no mean comes first: `96.91%: 97.31% ± ...`."""
        value, found = show(metric, self.values[metric]), self.intervals.get(metric)
        if found is None or found.half_width is None:
            return value
        mean = show(metric, found.mean)
        text = f"{mean} ± {show(metric, found.half_width, unit=False)} ({found.seeds} seeds)"
        return text if mean == value else f"{value}: {text}"


def best_configurations(study: Study, count: int = 5) -> list[Configuration]:
    """The best trials, best first.

    The best of many noisy values is too good by chance; only new seeds or test data tell its true value.

    Args:
        study: Study of one objective or several.
        count: Largest number of configurations. Several objectives have no order: then the whole Pareto front is
            returned, sorted by the first objective.
    """
    metrics = metrics_of(study)
    several = len(metrics) > 1
    trials = [trial for trial in study.best_trials if np.isfinite(trial.values).all()] if several else finished(study)
    trials.sort(key=lambda trial: trial.values[0], reverse=next(iter(metrics.values())))
    return [_configuration(trial, list(metrics)) for trial in (trials if several else trials[:count])]


def _configuration(trial: FrozenTrial, metrics: list[str]) -> Configuration:
    seeds = trial.user_attrs.get("seed_values", [])
    return Configuration(
        number=trial.number,
        values=dict(zip(metrics, trial.values, strict=True)),
        intervals={name: Interval.of([values[place] for values in seeds]) for place, name in enumerate(metrics)}
        if seeds
        else {},
        params=trial.params,
        settings=trial.user_attrs.get("settings", {}),
    )


def failures(study: Study) -> dict[str, list[int]]:
    """Numbers of the failed trials by cause, the most frequent cause first."""
    found: dict[str, list[int]] = defaultdict(list)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
        found[str(trial.user_attrs.get("cause", "no cause was recorded"))].append(trial.number)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


# ---- the best against uniform sampling -------------------------------------------------------------


def compare_seeds(best: Sequence[float], control: Sequence[float]) -> Interval:
    """Difference best - control, paired by seed, with its 95 % t-interval (n - 1 degrees of freedom)."""
    return Interval.of([a - b for a, b in zip(best, control, strict=True)])


def compared_metrics(comparison: Comparison) -> list[tuple[str, str]]:
    """(split, metric) pairs of the search's metric: on validation and, if it was measured, on test."""
    metric = comparison["metric"]
    pairs = [("validation", metric), ("test", "test_" + metric.removeprefix("val_"))]
    sides = (comparison["best"], comparison["uniform"])
    return [(split, name) for split, name in pairs if all(name in side.get(split, {}) for side in sides)]


def comparison_sentences(comparison: Comparison | None) -> list[str]:
    """Whether the best configuration beats uniform sampling, by validation and by test.

    Args:
        comparison: Comparison of a search, or None if no control was trained.
    """
    if comparison is None:
        return []
    found = compared_metrics(comparison)
    sentences = [
        f"{name}: {_verdict(name, comparison['best'][split][name], comparison['uniform'][split][name])}"
        for split, name in found
    ]
    if [split for split, _ in found] == ["validation", "test"]:
        sentences.append("The search chose by validation, which flatters the best; test had no say in it")
    return sentences


def _verdict(metric: str, best: Sequence[float], control: Sequence[float]) -> str:
    difference = compare_seeds(best, control)
    # Positive is better for every metric.
    mean = -difference.mean if _lower_is_better(metric) else difference.mean
    size = show_difference(metric, abs(mean))
    word = "better" if mean >= 0 else "worse"
    half = difference.half_width
    if half is None:
        return f"{size} {word} than uniform with one seed, too few to tell"
    # Interval of the size: worse by 2 points is in [1, 3].
    low, high = (show(metric, abs(mean) + end, unit=False) for end in (-half, half))
    if difference.excludes_zero:
        return f"{word} than uniform by {size} [{low}, {high}] (95 % interval over {difference.seeds} seeds)"
    return f"{size} {word} than uniform [{low}, {high}]: not distinguishable from uniform with {difference.seeds} seeds"


# ---- what the search says about each knob ----------------------------------------------------------


@dataclass(frozen=True)
class _Finding:
    """The finding about a knob and a metric.

    Attributes:
        p: Probability of an effect of this size if there is none; None if it was not tested.
        none: Sentence for no effect.
        count: Number of trials, in words.
        tests: Number of tests that were made.
        claim: Sentence for an effect.
        evidence: Evidence for the claim, without `p`.
        further: What may be added to the claim.
    """

    p: float | None
    none: str
    count: str = ""
    tests: int = 0
    claim: str = ""
    evidence: str = ""
    further: str = ""

    def sentence(self, tests: int) -> str:
        """The finding as one of `tests` tests, a few of which find something by chance (Bonferroni's correction)."""
        if self.p is None:
            return self.none
        p = "p < 0.001" if self.p < 0.001 else f"p = {self.p:.2g}"
        if self.p > _LEVEL:
            return f"{self.none} ({p}; {self.count})"
        if self.p * tests > _LEVEL:
            doubt = f"{p}, which one of {tests} tests shows easily by chance"
            return f"perhaps {self.claim} ({self.evidence}; {doubt}){self.further}"
        return f"{self.claim} ({self.evidence}; {p}){self.further}"


def knob_sentences(study: Study) -> dict[str, str]:
    """For each knob a sentence with the search's finding and its evidence.

    Trials are ranked, and the ranks are tested against the knob by permutation among trials made at about the
    same time: for numbers the rank correlation, and whether the middle of the tried values is better than the ends;
    for categories the mean ranks. An effect is claimed if it would appear in less than 5 % of searches without
    any effect, over all knobs together (with TPE, whose trials depend on each other, in up to 10 %). Between that
    and 5 % for this knob alone the sentence starts with "perhaps". A positive sign always means better: a rank
    correlation of +0.6 says that higher is better, also for an objective to minimise.

    Pruned trials count. Two trials are compared by their values at the last epoch that both have (two finished
    trials by their objective values), and the rank of a trial follows from the number of trials it beats. Without
    pruned trials, a knob whose bad half was pruned away would seem to have no effect; by their last values alone
    they would be compared with trials that were trained longer. Sizes of differences are those of finished trials.

    Several objectives have a clause each. A knob that only some trials have is judged among these trials.

    Returns:
        Sentences without a full stop, in the order in which trials took their knobs.
    """
    metrics = metrics_of(study)
    trials = _usable(study)
    names = dict.fromkeys(name for trial in study.get_trials(deepcopy=False) for name in trial.params)
    findings = {
        name: [
            _finding(name, [trial for trial in trials if name in trial.params], place, metric, higher)
            for place, (metric, higher) in enumerate(metrics.items())
        ]
        for name in names
    }
    tests = sum(found.tests for of_a_knob in findings.values() for found in of_a_knob)
    sentences = {}
    for name, of_a_knob in findings.items():
        clauses = [found.sentence(tests) for found in of_a_knob]
        if len(set(clauses)) > 1:
            clauses = [f"{metric}: {clause}" for metric, clause in zip(metrics, clauses, strict=True)]
        sentences[name] = "; ".join(dict.fromkeys(clauses))
    return sentences


def _usable(study: Study) -> list[FrozenTrial]:
    """Finished trials, and pruned trials that have reported a value."""
    pruned = study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
    trials = finished(study) + [trial for trial in pruned if trial.intermediate_values]
    return sorted(trials, key=lambda trial: trial.number)


def _finding(name: str, trials: list[FrozenTrial], place: int, metric: str, higher: bool) -> _Finding:
    if len(trials) < FEWEST_TRIALS:
        had = "1 trial has" if len(trials) == 1 else f"{len(trials)} trials have"
        return _Finding(None, f"only {had} it, fewer than {FEWEST_TRIALS}: too few to say anything")
    # From here on higher is better.
    order = _ranks(_wins(trials, place) * (1 if higher else -1))
    if np.ptp(order) == 0:
        return _Finding(None, f"all {len(trials)} trials that have it are equally good")
    if isinstance(trials[0].distributions[name], CategoricalDistribution):
        return _category_finding(name, trials, order, place, metric, higher)
    return _number_finding(name, trials, order)


def _wins(trials: list[FrozenTrial], place: int) -> np.ndarray:
    """(n,) number of trials with a lower value minus those with a higher one, by the last epoch that both have."""
    steps = sorted({step for trial in trials for step in trial.intermediate_values})
    columns = [[trial.intermediate_values.get(step, np.nan) for trial in trials] for step in steps]
    columns.append([trial.values[place] if trial.state == TrialState.COMPLETE else np.nan for trial in trials])
    signs: np.ndarray = np.zeros((len(trials), len(trials)))
    for column in np.array(columns):
        difference = column[:, None] - column[None, :]
        signs = np.where(np.isfinite(difference), np.sign(difference), signs)
    return np.asarray(signs.sum(1))


def _ranks(values: np.ndarray) -> np.ndarray:
    """(n,) ranks from 0; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def _blocks(count: int) -> list[np.ndarray]:
    """Rows of successive trials, with `_BLOCK` or a few more of them in each block."""
    return np.array_split(np.arange(count), max(1, count // _BLOCK))


def _centred(values: np.ndarray) -> np.ndarray:
    """(n,) values minus the mean of their block, of length 1, so that a product of two is their correlation."""
    centred = np.concatenate([values[rows] - values[rows].mean() for rows in _blocks(len(values))])
    length = float(np.linalg.norm(centred))
    return centred / length if length > 1e-9 else np.zeros_like(centred)


def _shuffled(order: np.ndarray) -> Iterable[np.ndarray]:
    """`_PERMUTATIONS` permutations within the blocks of an array (n,), in parts (b, n)."""
    random = np.random.default_rng(_SEED)
    part = 1111
    for _ in range(_PERMUTATIONS // part):
        tiled = np.tile(order, (part, 1))
        yield np.concatenate([random.permuted(tiled[:, rows], axis=1) for rows in _blocks(len(order))], axis=1)


def _p(found: float, shuffled: np.ndarray) -> float:
    """Share of permutations, the original order included, whose statistic is at least `found`."""
    # Sums in another order differ by rounding.
    return float(1 + (shuffled >= found - 1e-9).sum()) / (1 + len(shuffled))


# numbers


def _number_finding(name: str, trials: list[FrozenTrial], order: np.ndarray) -> _Finding:
    values = np.array([trial.params[name] for trial in trials], dtype=np.float64)
    if np.ptp(values) == 0:
        return _Finding(None, f"all {len(trials)} trials have {_number(values[0])}: nothing to compare")
    ranks, goal = _ranks(values), _centred(order)
    slope = _centred(ranks)
    # A best value inside the range shows no direction; the good trials are then near the middle of all trials.
    middle = _centred(-np.abs(ranks - np.median(ranks)))
    correlation, closeness = float(slope @ goal), float(middle @ goal)
    shuffled = np.concatenate([part @ np.stack([slope, middle], axis=1) for part in _shuffled(goal)])
    p, p_middle = _p(abs(correlation), np.abs(shuffled[:, 0])), _p(closeness, shuffled[:, 1])

    low, high = _searched(name, trials)
    best = values[np.argsort(-order, kind="stable")[: math.ceil(len(values) / 4)]]
    position = _position(float(np.median(best)), low, high, trials[0].distributions[name])
    further = f"; the best quarter lies in {_number(best.min())}..{_number(best.max())}"
    further += f" of {_number(low)}..{_number(high)} searched"
    none, count = "no direction to be seen", _count(trials)
    if p_middle < p and _EDGE <= position <= 1 - _EDGE:
        claim, p = "the middle is better than the ends", p_middle
        evidence = f"rank correlation with the distance from the middle {-closeness:+.2f} over {count}"
    else:
        claim = "higher is better" if correlation > 0 else "lower is better"
        evidence = f"rank correlation {correlation:+.2f} over {count}"
        if (position > 1 - _EDGE) if correlation > 0 else (position < _EDGE):
            further += ", most of it at the edge: widen the range if it can be"
    return _Finding(p, none, count, 2, claim, evidence, further)


def _searched(name: str, trials: list[FrozenTrial]) -> tuple[float, float]:
    """Lowest and highest value that the space offered."""
    found = [trial.distributions[name] for trial in trials]
    ranges = [each for each in found if isinstance(each, FloatDistribution | IntDistribution)]  # of a number: all
    return min(each.low for each in ranges), max(each.high for each in ranges)


def _position(value: float, low: float, high: float, distribution: BaseDistribution) -> float:
    """Position of a value in its range, 0..1, on the scale of the search."""
    if getattr(distribution, "log", False):
        value, low, high = math.log(value), math.log(low), math.log(high)
    return (value - low) / (high - low)


def _number(value: float) -> str:
    return f"{value:.3g}"


def _count(trials: list[FrozenTrial]) -> str:
    pruned = sum(trial.state == TrialState.PRUNED for trial in trials)
    return f"{len(trials)} trials" + (f", {pruned} of them pruned" if pruned else "")


# categories


def _category_finding(
    name: str, trials: list[FrozenTrial], order: np.ndarray, place: int, metric: str, higher: bool
) -> _Finding:
    choices = [trial.params[name] for trial in trials]
    counts = {choice: choices.count(choice) for choice in dict.fromkeys(choices)}
    enough = [choice for choice, count in counts.items() if count >= _FEWEST_OF_A_CATEGORY]
    if len(enough) < 2:
        had = ", ".join(f"{choice}: {count}" for choice, count in counts.items())
        return _Finding(None, f"too few trials per choice to compare ({had})")
    rows = [row for row, choice in enumerate(choices) if choice in enough]
    member = np.array([[choices[row] == choice for choice in enough] for row in rows], dtype=np.float64)
    sizes, goal = member.sum(0), _centred(order[rows])
    # Variance between the choices; for two choices it grows with their difference.
    shuffled = np.concatenate([((part @ member) ** 2 / sizes).sum(1) for part in _shuffled(goal)])
    p = _p(float(((goal @ member) ** 2 / sizes).sum()), shuffled)

    ranked = [enough[place] for place in np.argsort(-(goal @ member) / sizes, kind="stable")]
    best, worst = ranked[0], ranked[-1]
    means = [_mean([trial for trial in trials if trial.params[name] == choice], place) for choice in (best, worst)]
    gain = (means[0] - means[1]) * (1 if higher else -1)
    # Finished trials alone may have another order than all trials, or a choice may have no finished trial.
    size = f" by {show_difference(metric, gain)}" if gain > 0 else ""
    trials_each = f"{', '.join(str(counts[choice]) for choice in ranked[:-1])} and {counts[worst]} trials"
    if len(ranked) == 2:
        none, claim = f"no difference between {best} and {worst} to be seen", f"{best} is better than {worst}{size}"
    else:
        none = f"no difference between {', '.join(map(str, ranked[:-1]))} and {worst} to be seen"
        claim = f"{best} is the best and {worst} the worst of {len(ranked)} choices{size}"
    return _Finding(p, none, trials_each, 1, claim, trials_each)


def _mean(trials: list[FrozenTrial], place: int) -> float:
    """Mean objective value of those of some trials that are finished; NaN if there are none."""
    values = [trial.values[place] for trial in trials if trial.state == TrialState.COMPLETE]
    return float(np.mean(values)) if values else math.nan
