"""``metrics.jsonl``: the record of a run, one JSON object per line; every other logger shows a copy of it."""

from __future__ import annotations

import errno
import os
from dataclasses import asdict
from io import FileIO
from typing import Any, ClassVar

from megalm.ownership import Claim
from megalm.runs.folder import METRICS_FILE
from megalm.runs.record import cut_back, encode_row
from megalm.training.callbacks.base import (
    Attempt,
    Callback,
    CheckpointMetrics,
    Outcome,
    RunContext,
    StepMetrics,
    TaskMetrics,
    ValidationMetrics,
    warn,
)

_FULL = (errno.ENOSPC, errno.EDQUOT)


class MetricsJsonl(Callback):
    """Appends a row for every start of the run, step, validation, evaluation on tasks and checkpoint.

    A resumed run first drops the rows beyond the restored step: those steps are about to be taken again. A row is
    handed to the operating system at once, and forced to disk before each checkpoint is reported and at the end. Rows
    that a full disk does not take wait in memory for the next one: training is worth more than its record in time.

    Args:
        claim: asked before each write whether the run's folder is this run's still; the answer no ends the run.
    """

    essential: ClassVar[bool] = True

    def __init__(self, claim: Claim | None = None) -> None:
        self._claim = claim
        self._file: FileIO | None = None
        self._waiting = b""
        self._has_warned = False

    def on_start(self, context: RunContext) -> None:
        """Cut the file back to ``start_step`` and open it for appending."""
        self._check()
        path = context.run_dir / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_back(path, context.start_step)
        self._file = path.open("ab", buffering=0)
        if context.attempt is not None:
            self._append(_attempt_row(context.attempt))

    def on_step(self, metrics: StepMetrics) -> None:
        """Append a row."""
        self._append(metrics.row())

    def on_validation(self, metrics: ValidationMetrics) -> None:
        """Append a row."""
        self._append(metrics.row())

    def on_tasks(self, metrics: TaskMetrics) -> None:
        """Append a row."""
        self._append(metrics.row())

    def on_checkpoint(self, metrics: CheckpointMetrics) -> None:
        """Append a row; make the rows that lead to the checkpoint as durable as it is."""
        self._append(asdict(metrics))
        if not self._waiting:
            self._sync()

    def on_checkpoint_failed(self, step: int, reason: str) -> None:
        """Append a row."""
        self._append({"step": step, "checkpoint_error": reason})

    def on_end(self, outcome: Outcome) -> None:  # noqa: ARG002 - a hook
        """Make every row durable.

        Raises:
            OSError: there are rows that the disk does not take.
        """
        self._sync()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _append(self, row: dict[str, Any]) -> None:
        assert self._file is not None, "on_start comes before the first row"
        self._check()
        self._waiting += encode_row(row).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if error.errno not in _FULL:
                raise
            if not self._has_warned:
                self._has_warned = True
                warn(f"{METRICS_FILE}: {error.strerror}: rows wait in memory until there is room")

    def _write(self) -> None:
        assert self._file is not None
        while self._waiting:
            self._waiting = self._waiting[self._file.write(self._waiting) :]

    def _check(self) -> None:
        if self._claim is not None:
            self._claim.check()

    def _sync(self) -> None:
        if self._file is not None:
            if self._waiting:
                self._check()
                self._write()
            os.fsync(self._file.fileno())


def _attempt_row(attempt: Attempt) -> dict[str, Any]:
    return {
        "step": attempt.step,
        "samples": attempt.samples,
        "tokens": attempt.tokens,
        "attempt": attempt.number,
        "config": attempt.config,
        "began_with": attempt.began_with,
        "changes": {name: list(values) for name, values in attempt.changes.items()},
    }
