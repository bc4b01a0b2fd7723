"""When a run saves, and what a save that failed means for it.

Writing itself is in ``saving.py``. A save that fails for what may pass (a full disk) is told of, and training goes on,
unless ``checkpoint.on_failure=stop``; any other failure ends the run. Every rank decides alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from megalm.config.schema import Checkpoint
from megalm.core.parameters import StatePiece
from megalm.errors import CheckpointError
from megalm.training.callbacks.base import Callback, CheckpointMetrics, Outcome
from megalm.training.save_schedule import SaveSchedule
from megalm.training.saving import RunState, Saver, is_fault_of_disk


class SavePolicy:
    """The saves of one run, as its training loop asks for them.

    Args:
        settings: how often to save, and what a failure means.
        saver: writes checkpoints.
        callbacks: told of every checkpoint that is complete, and of every one that failed.
        snapshot: this rank's pieces and the run's state at the moment it is called.
    """

    def __init__(
        self,
        settings: Checkpoint,
        saver: Saver,
        callbacks: Callback,
        snapshot: Callable[[], tuple[Sequence[StatePiece], RunState]],
    ) -> None:
        self._settings = settings
        self._saver = saver
        self._callbacks = callbacks
        self._snapshot = snapshot
        self._schedule = SaveSchedule(settings)

    def is_due(self, step: int, *, minutes_are_up: bool) -> bool:
        """Whether the run saves after this step; ``minutes_are_up`` is what all ranks agree on."""
        return self._schedule.is_due(step, minutes_are_up=minutes_are_up)

    @property
    def minutes_are_up(self) -> bool:
        """Whether a save is due by this rank's clock; ranks agree on it at the end of a step."""
        return self._schedule.minutes_are_up()

    @property
    def has_failed(self) -> bool:
        """Whether this rank could not write its part of the pending save; ranks agree on it at the end of a step."""
        return self._saver.has_failed

    @property
    def has_checkpoints(self) -> bool:
        """Whether the run has a complete checkpoint."""
        return self._saver.has_checkpoints

    def save(self) -> None:
        """Begin a checkpoint, and wait for it only if saving is not asynchronous."""
        self._begin()
        if not self._settings.asynchronous:
            self.finish(training_waits=True)

    def save_last(self) -> None:
        """Save, and wait for it: the run ends after this, so nothing later could make up for a failure.

        Raises:
            CheckpointError: it failed.
        """
        self._begin()
        self._report(self._saver.finish(training_waits=True))
        self._saver.close()

    def save_and_stop(self, stop: Outcome, step: int) -> None:
        """Save for the last time before the run stops after ``step``.

        A job that is queued again continues from the newest checkpoint there is, so it may do without this one.
        """
        try:
            self.save_last()
        except CheckpointError as error:
            if stop is not Outcome.REQUEUE or not self._saver.has_checkpoints:
                raise
            self._callbacks.on_checkpoint_failed(step, str(error))

    def after_step(self, *, failed: bool, tolerant: bool) -> bool:
        """Report a checkpoint that is complete by now, and deal with one that failed on any rank.

        Args:
            failed: whether it failed on any rank.
            tolerant: see :meth:`finish`.

        Returns:
            Whether training waited.
        """
        if not failed:
            self._report(self._saver.newly_complete())
            return False
        self._saver.cancel()
        self.finish(tolerant=tolerant)
        return True

    def finish(self, *, training_waits: bool = False, tolerant: bool = False) -> None:
        """Wait for the save that is being written, if there is one.

        Args:
            training_waits: whether the wait is part of the save's stall.
            tolerant: report a failure and go on, whatever the config says: something worse is about to be raised.

        Raises:
            CheckpointError: it failed, and the run is to stop for that.
        """
        step = self._saver.pending_step
        try:
            self._report(self._saver.finish(training_waits=training_waits))
        except CheckpointError as error:
            if not tolerant and (self._settings.on_failure == "stop" or not is_fault_of_disk(str(error))):
                raise
            assert step is not None, "a save that fails was pending"
            self._callbacks.on_checkpoint_failed(step, str(error))

    def linger(self) -> None:
        """Another error ends this rank: a checkpoint that is being written gets its chance to become complete."""
        self._saver.linger()

    def _begin(self) -> None:
        """Start a save; the one before is finished first."""
        self._schedule.restart()
        began = time.perf_counter()
        self.finish()
        waited_seconds = time.perf_counter() - began
        pieces, state = self._snapshot()
        self._saver.start(pieces, state, stall_began=began, waited_seconds=waited_seconds)

    def _report(self, metrics: CheckpointMetrics | None) -> None:
        if metrics is not None:
            self._callbacks.on_checkpoint(metrics)
