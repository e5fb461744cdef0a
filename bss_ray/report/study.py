"""Output after a search: a table on the terminal, and `report.html`."""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from bss_ray.errors import optional_import
from bss_ray.report.console import show
from bss_ray.report.html import label_axes, write_page
from bss_ray.report.insight import (
    FEWEST_TRIALS,
    Comparison,
    best_configurations,
    compare_seeds,
    compared_metrics,
    comparison_sentences,
    failures,
    finished,
    knob_sentences,
    metrics_of,
    show_difference,
)
from bss_ray.storage import StoragePath
from bss_ray.tune.objective import Interval

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial
    from plotly.graph_objects import Figure

# Importances compare this share of the best finished trials with the others: 8 of 30 trials; Optuna's tenth is 3.
_BEST_SHARE = 0.25

_IMPORTANCES = (
    f"By PED-ANOVA: how far a knob's values in the best {_BEST_SHARE:.0%} of the finished trials differ from those in "
    "all of them. The importances add up to 1 and say nothing of chance: a knob without any effect has one too."
)

# With more knobs there is no room for their axes.
_KNOBS_IN_A_ROW = 3

_FILES = ("best.yaml", "report.html", "result.json", "config.yaml", "study.journal")

_STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "waiting"}

# Figures, and text that is HTML already.
Parts = list["Figure | str"]


# ---- terminal --------------------------------------------------------------------------------------


def study_table(study: Study, comparison: Comparison | None, folder: Path) -> Table:
    """The end of a search: its best configurations, the findings on the knobs, and the paths of all files."""
    metrics = list(metrics_of(study))
    table = Table(title=_trials(study), title_justify="left")
    for name in ("trial", *metrics):
        table.add_column(Text(name), justify="right")
    table.add_column("knobs")
    for found in best_configurations(study):
        knobs = ", ".join(f"{name} {_value(value)}" for name, value in found.params.items())
        table.add_row(str(found.number), *(found.cell(metric) for metric in metrics), Text(knobs))
    lines = [f"{sentence}." for sentence in comparison_sentences(comparison)]
    lines += [f"{name}: {sentence}." for name, sentence in knob_sentences(study).items()]
    lines += [f"{_numbers(numbers)} failed: {_first_line(cause)}" for cause, numbers in failures(study).items()]
    lines += [f"  {folder / name}" for name in _FILES if (folder / name).exists()]
    table.caption = Text("\n".join(lines))
    table.caption_justify = "left"
    return table


def _trials(study: Study) -> str:
    """`24 trials finished, 5 pruned, 1 failed`."""
    states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
    counts = {name: states.count(state) for state, name in _STATES.items()}
    done = counts.pop("finished")
    return ", ".join([f"{_plural(done, 'trial')} finished", *(f"{n} {name}" for name, n in counts.items() if n)])


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def _numbers(numbers: Sequence[int]) -> str:
    """`trials 3, 7`."""
    return f"trial{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]


def _value(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- HTML ------------------------------------------------------------------------------------------


def write_study_report(study: Study, folder: Path, comparison: Comparison | None = None) -> Path:
    """Draw a search in one file that needs no network.

    A figure for which the study has too few trials is left out, and a line says why.

    Args:
        study: Study of one objective or several, at any stage.
        folder: Folder of the search, which gets `report.html`.
        comparison: Comparison of the best configuration with uniform sampling (see `comparison_sentences`).

    Returns:
        Path of `report.html`.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    go = optional_import("plotly.graph_objects", extra="report", needed_for="report.html")
    parts = [
        *_summary(study, folder),
        *_against_uniform(go, comparison),
        *_best(study),
        *_knobs(study),
        *_changes(go, study),
        *_course(study),
        *_failed(study),
    ]
    write_page(StoragePath.of(folder), "Search", parts)
    return folder / "report.html"


def _text(value: object) -> str:
    return html.escape(_value(value))


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _heading(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def _list(items: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(item)}</li>' for item in items)}</ul>"


def _table(head: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{top}</tr>{body}</table></div>"


# ---- what came out


def _summary(study: Study, folder: Path) -> Parts:
    metrics = metrics_of(study)
    aims = [f"{name} ({'the higher' if higher else 'the lower'}, the better)" for name, higher in metrics.items()]
    seconds = sum(trial.user_attrs.get("seconds", 0) for trial in study.get_trials(deepcopy=False))
    facts = [
        f"Space: {study.user_attrs.get('space', '-')}; algorithm: {study.user_attrs.get('algorithm', '-')}.",
        f"Objective: {' and '.join(aims)}.",
        f"{_trials(study)}; {seconds / 3600:.3g} hours of training in all.",
        f"Best: {_best_value(study)}",
    ]
    parts = [_list(facts)]
    if (folder / "best.yaml").exists():
        parts.append("<p>The best settings are in <a href='best.yaml'>best.yaml</a>, next to this file.</p>")
    return parts


def _best_value(study: Study) -> str:
    found = best_configurations(study, 1)
    if not found:
        return "no trial finished."
    if len(metrics_of(study)) > 1:
        return f"the Pareto front has {_plural(len(found), 'trial')}."
    metric, value = next(iter(found[0].values.items()))
    return f"{metric} {show(metric, value)}, of trial {found[0].number}."


def _against_uniform(go: ModuleType, comparison: Comparison | None) -> Parts:
    parts: Parts = [_heading("The best against uniform sampling")]
    if comparison is None:
        return [*parts, _paragraph("No control was trained: whether the best beats uniform sampling is not known.")]
    parts.append(_list(f"{sentence}." for sentence in comparison_sentences(comparison)))
    for split, metric in compared_metrics(comparison):
        sides = (comparison["uniform"][split][metric], comparison["best"][split][metric])
        figure = go.Figure()
        for seed, *pair in zip(comparison["seeds"], *sides, strict=True):
            figure.add_scatter(x=["uniform", "best"], y=pair, name=f"seed {seed}", mode="lines+markers")
        figure.update_xaxes(range=[-0.5, 1.5])
        parts.append(label_axes(figure, f"{metric}: a line per seed", "sampling", metric))
    return [*parts, _metrics_table(comparison)]


def _metrics_table(comparison: Comparison) -> str:
    """All metrics that were measured for both."""
    rows = []
    for split in ("validation", "test"):
        best, uniform = (comparison[side].get(split, {}) for side in ("best", "uniform"))
        for metric in (name for name in best if name in uniform):
            difference = compare_seeds(best[metric], uniform[metric])
            sides = [_interval(metric, Interval.of(values[metric]), show) for values in (best, uniform)]
            rows.append([metric, *sides, _interval(metric, difference, show_difference)])
    heading = f"mean over {_plural(len(comparison['seeds']), 'seed')} ± half of the 95 % interval"
    return _table([heading, "best", "uniform", "best - uniform"], rows)


def _interval(metric: str, found: Interval, shown: Callable[[str, float], str]) -> str:
    """`97.31% ± 0.40`."""
    half = "" if found.half_width is None else f" ± {show(metric, found.half_width, unit=False)}"
    return shown(metric, found.mean) + half


def _best(study: Study) -> Parts:
    metrics = list(metrics_of(study))
    several = len(metrics) > 1
    parts = [_heading("Pareto front" if several else "Best configurations")]
    found = best_configurations(study)
    if not found:
        return [*parts, _paragraph("No trial finished.")]
    knobs = list(dict.fromkeys(name for each in found for name in each.params))
    rows = [
        [each.number, *(each.cell(metric) for metric in metrics), *(each.params.get(name, "-") for name in knobs)]
        for each in found
    ]
    note = "± is half of the 95 % interval over seeds." if any("±" in str(row) for row in rows) else ""
    note += " The best of many noisy values is too good by chance; new seeds or test data tell what it is worth."
    return [*parts, _table(["trial", *metrics, *knobs], rows), _paragraph(note.strip())]


def _knobs(study: Study) -> Parts:
    sentences = knob_sentences(study)
    if not sentences:
        return []
    note = (
        "By permutation tests of ranks among trials made at about the same time; pruned trials are compared with "
        "others at the last epoch that both have. Of all that is said without a “perhaps”, anything is wrong in about "
        "one search of twenty; with TPE, whose trials depend on each other, in up to one of ten."
    )
    if study.user_attrs.get("algorithm") == "pbt":
        note += " The knobs are those that a trial started with; they changed while it was trained."
    items = [f"{name}: {sentence}." for name, sentence in sentences.items()]
    return [_heading("What the search says about each knob"), _list(items), _paragraph(note)]


def _failed(study: Study) -> Parts:
    found = failures(study)
    if not found:
        return []
    return [_heading("Failures"), _list(f"{_numbers(numbers)}: {cause}" for cause, numbers in found.items())]


# ---- how the search went


def _changes(go: ModuleType, study: Study) -> Parts:
    """How population-based training changed the settings, with a figure for each."""
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.user_attrs.get("changes")]
    settings = list(dict.fromkeys(name for t in trials for _, changed in t.user_attrs["changes"] for name in changed))
    best = {found.number for found in best_configurations(study, 1)}
    parts: Parts = [_heading("Settings while training")] if settings else []
    for name in settings:
        figure = go.Figure()
        for trial in trials:
            epochs, values = _steps(trial, name)
            line = {"shape": "hv", "width": 3 if trial.number in best else 1}
            label = f"trial {trial.number}{' (best)' if trial.number in best else ''}"
            figure.add_scatter(x=epochs, y=values, name=label, mode="lines+markers", line=line)
        short = name.rpartition(".")[2]
        parts.append(label_axes(figure, f"{short} over epochs", "epoch", short))
    return parts


def _steps(trial: FrozenTrial, name: str) -> tuple[list[int], list[object]]:
    """Epochs and the values of a setting from each of them on, up to the last known epoch."""
    # The settings of a trial are the last ones now; the knob of the same name has the first value.
    knob = name.rpartition(".")[2]
    points = {0: trial.params[knob]} if knob in trial.params else {}
    points |= {epoch: changed[name] for epoch, changed in trial.user_attrs["changes"] if name in changed}
    epochs = sorted(points)
    if epochs and trial.intermediate_values and trial.last_step is not None and trial.last_step > epochs[-1]:
        points[trial.last_step] = points[epochs[-1]]
        epochs.append(trial.last_step)
    return epochs, [points[epoch] for epoch in epochs]


def _course(study: Study) -> Parts:
    """Optuna's own figures."""
    from optuna import visualization as draw

    metrics = list(metrics_of(study))
    done = finished(study)
    knobs = sorted({name for trial in done for name in trial.params})
    lacking = "no trial finished" if not done else "" if knobs else "the trials have no knobs"
    few = f"fewer than {FEWEST_TRIALS} trials finished" if done and len(done) < FEWEST_TRIALS else lacking
    parts: Parts = [_heading("How the search went")]
    if len(metrics) > 1:
        parts += _drawn("Pareto front", partial(draw.plot_pareto_front, study, target_names=metrics), lacking)
    for place, metric in enumerate(metrics):
        # Optuna knows by itself which values are best, but only for a single objective.
        target = None if len(metrics) == 1 else _objective(place)
        title = f"Optimization history: {metric}"
        history = partial(draw.plot_optimization_history, study, target=target, target_name=metric)
        parts += _drawn(title, history, lacking)
        title = f"Importance of the knobs: {metric}"
        parts += _drawn(title, partial(_importances, study, knobs, place), few, _IMPORTANCES)
        for row in (knobs[start : start + _KNOBS_IN_A_ROW] for start in range(0, len(knobs), _KNOBS_IN_A_ROW)):
            slices = partial(draw.plot_slice, study, params=row, target=target, target_name=metric)
            parts += _drawn(f"{metric} by {', '.join(row)}", slices)
    name = metrics[0] if len(metrics) == 1 else "Objective Value"
    parts += _drawn("Parallel coordinates", partial(draw.plot_parallel_coordinate, study, target_name=name), lacking)
    if len(metrics) == 1:
        parts += _drawn("Values while training", partial(_values, study, metrics[0]))
    return parts


def _values(study: Study, metric: str) -> Figure:
    from optuna.visualization import plot_intermediate_values

    figure = plot_intermediate_values(study)
    return figure.update_layout(xaxis_title="epochs done", yaxis_title=html.escape(metric))


def _objective(place: int, sign: int = 1) -> Callable[[FrozenTrial], float]:
    return lambda trial: sign * trial.values[place]


def _importances(study: Study, knobs: list[str], place: int) -> Figure:
    """Importances by PED-ANOVA, which needs no scikit-learn and accepts knobs that only some trials have."""
    from optuna.importance import PedAnovaImportanceEvaluator
    from optuna.visualization import plot_param_importances

    # It takes the lowest targets as the best ones for any direction of the study.
    higher = list(metrics_of(study).values())[place]
    return plot_param_importances(
        study,
        evaluator=PedAnovaImportanceEvaluator(target_quantile=_BEST_SHARE),
        params=knobs,
        target=_objective(place, -1 if higher else 1),
        target_name=list(metrics_of(study))[place],
    )


def _drawn(title: str, draw: Callable[[], Figure], lacking: str = "", caption: str = "") -> Parts:
    """A figure of Optuna's and its caption; if there is no figure, a line that says why."""
    if lacking:
        return [_paragraph(f"{title}: left out, {lacking}.")]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figure = draw()
    except Exception as error:  # a figure that Optuna cannot draw must not prevent the rest of the page
        return [_paragraph(f"{title}: left out, {error}")]
    if not figure.data:
        return [_paragraph(f"{title}: left out, no trial has any.")]
    figure.update_layout(title=html.escape(title), template="plotly_white")
    return [figure, _paragraph(caption)] if caption else [figure]
