"""When a run saves: after so many steps, or so many minutes. The last step and a stop are always saved. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable

from megalm.config.schema import Checkpoint


class SaveSchedule:
    """Says after a step whether a checkpoint is due.

    Clocks of ranks differ, so each asks its own (:meth:`minutes_are_up`), all agree, and then ask :meth:`is_due`.

    Args:
        checkpoint: the run's settings.
        clock: seconds that never go back.
    """

    def __init__(self, checkpoint: Checkpoint, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = checkpoint.every
        self._seconds = 60.0 * checkpoint.every_minutes
        self._clock = clock
        self._began = clock()

    def restart(self) -> None:
        """A save begins here: minutes are counted from now."""
        self._began = self._clock()

    def minutes_are_up(self) -> bool:
        """Whether ``checkpoint.every_minutes`` have passed since the last save, by this rank's clock."""
        return self._seconds > 0 and self._clock() - self._began >= self._seconds

    def is_due(self, step: int, *, minutes_are_up: bool) -> bool:
        """Whether to save after this step.

        Args:
            step: the step that has just ended.
            minutes_are_up: what all ranks agree on, the same on each.
        """
        return minutes_are_up or (self._every > 0 and step % self._every == 0)
