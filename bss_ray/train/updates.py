"""New scores between epochs, and what becomes of a run that gets none."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from bss_ray.errors import ScoringError
from bss_ray.sample.coordinator import Publication
from bss_ray.sample.pool import ScoringFailedError
from bss_ray.sample.state import LostStateError
from bss_ray.train.engines import Engine


class ScoreUpdates:
    """Asks the engine for new scores; a run can do without them for a while.

    Args:
        engine: makes them.
        allowed_failures: in a row.
        notice: tells the user.

    Attributes:
        rows_per_second: of the scoring pass that the last update came from; None where there was none.
    """

    def __init__(self, engine: Engine, allowed_failures: int, notice: Callable[[str], None]) -> None:
        self._engine = engine
        self._allowed = allowed_failures
        self._notice = notice
        self._failures = 0
        self.rows_per_second: float | None = None

    def after(self, epoch: int, version: int, model: nn.Module) -> int:
        """The score version in force after `epoch`, where `version` was.

        Raises:
            ScoringError: updates have failed too often in a row.
            ScoringFailedError: this one has failed, and there are no scores to go on with.
            LostStateError: the coordinator was restarted.
        """
        self.rows_per_second = None
        publication = self._engine.update(epoch, version, model)
        if publication is None:
            return version
        for text in publication.notices:
            self._notice(text)
        if publication.failure:
            self._go_on_without(epoch, version, publication)
            return version
        if publication.version != version + 1:
            raise LostStateError(
                f"the coordinator stands at score version {publication.version}, not {version + 1}: it was restarted"
            )
        self._failures = 0
        if publication.seconds > 0:
            self.rows_per_second = publication.measured / publication.seconds
        return publication.version

    def _go_on_without(self, epoch: int, version: int, publication: Publication) -> None:
        self._failures += 1
        if version == 0:
            raise ScoringFailedError(f"there are no first scores: {publication.failure}")
        if self._failures > self._allowed:
            raise ScoringError(
                f"scores could not be updated {self._failures} times in a row, and scoring.max_failed_updates="
                f"{self._allowed}: {publication.failure}. Look at the scorers' resources and logs; the same command "
                "goes on from the last checkpoint"
            )
        self._notice(
            f"Warning: no new scores after epoch {epoch}: {publication.failure}. The run goes on with score version "
            f"{version} (failure {self._failures} of {self._allowed} in a row)"
        )
