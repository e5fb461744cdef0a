"""Metrics of a run for Prometheus, by way of Ray's metrics: what the dashboard in `cluster/grafana` shows.

They are recorded where all messages of a run come together: in the coordinator's event log.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, SupportsFloat

from ray.util.metrics import Counter, Gauge

from bss_ray.runtime.messages import Message


class Figure(NamedTuple):
    """A metric of Ray.

    Attributes:
        kind: A `counter` adds up the values of messages, a `gauge` shows the last value.
        key: Name of the figure in `Message.figures()`.
        text: Description for Prometheus, with the unit.
    """

    kind: Literal["counter", "gauge"]
    key: str
    text: str


# By their names in Ray. Prometheus sees `ray_bss_ray_epoch`, and counters as `ray_bss_ray_rows_trained_total`.
FIGURES: dict[str, Figure] = {
    "bss_ray_epoch": Figure("gauge", "epoch", "Current epoch, from 0."),
    "bss_ray_score_version": Figure("gauge", "version", "Score version in force: publications so far."),
    "bss_ray_rows_trained": Figure("counter", "new_rows", "Rows that were handed to the train loops of all ranks."),
    "bss_ray_loss": Figure("gauge", "train_loss", "Mean training loss of the last epoch, over all ranks."),
    "bss_ray_scoring_rows_per_second": Figure(
        "gauge", "scoring_rows_per_second", "Rows a second of the last scoring pass, over all that measured."
    ),
    "bss_ray_score_age": Figure(
        "gauge", "score_age", "Mean age of the scores that the last epoch was drawn from, in score versions."
    ),
    "bss_ray_effective_sample_size": Figure(
        "gauge", "effective_sample_size", "Rows of equal weight that would be as diverse as the last epoch's weights."
    ),
    "bss_ray_loader_stall_share": Figure(
        "gauge",
        "loader_stall_share",
        "Share of the training time that the loops waited for batches: of the current epoch on rank 0, and of a whole "
        "epoch over all ranks.",
    ),
    "bss_ray_moved_share": Figure(
        "gauge", "moved_share", "Share of the last epoch's rows that came from another node than their rank's."
    ),
    "bss_ray_moved_rows": Figure("counter", "moved_rows", "Rows that came from another node than their rank's."),
    "bss_ray_restarts": Figure("counter", "restarts", "Number of times that training resumed from a checkpoint."),
}


class RunMetrics:
    """Records the figures of messages.

    Args:
        run: Name of the run, which tags all its metrics.
    """

    def __init__(self, run: str) -> None:
        self._metrics = {name: _metric(name, figure).set_default_tags({"run": run}) for name, figure in FIGURES.items()}

    def take(self, message: Message) -> None:
        """Record the figures of a message."""
        values = message.figures()
        for name, figure in FIGURES.items():
            value = values.get(figure.key)
            if isinstance(value, SupportsFloat):
                self._record(name, figure, float(value))

    def _record(self, name: str, figure: Figure, value: float) -> None:
        if figure.kind == "gauge":
            self._metrics[name].set(value)
        elif value > 0:  # Ray accepts no other value
            self._metrics[name].inc(value)


def _metric(name: str, figure: Figure) -> Counter | Gauge:
    return (Gauge if figure.kind == "gauge" else Counter)(name, description=figure.text, tag_keys=("run",))
