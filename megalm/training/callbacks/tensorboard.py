"""TensorBoard event files in ``tensorboard/`` of the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megalm.runs.folder import TENSORBOARD_FOLDER
from megalm.training.callbacks.base import (
    Callback,
    CheckpointMetrics,
    RunContext,
    StepMetrics,
    TaskMetrics,
    ValidationMetrics,
)

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_FLUSH_SECONDS = 30


class TensorBoardLog(Callback):
    """Writes every row, under ``train/``, ``validation/`` or ``tasks/``, against the step.

    Its writer has a thread of its own.
    """

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def on_start(self, context: RunContext) -> None:
        """Open an event file; on resume TensorBoard hides what the run is about to do again."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            str(context.run_dir / TENSORBOARD_FOLDER),
            purge_step=context.start_step + 1 if context.start_step else None,
            flush_secs=_FLUSH_SECONDS,
        )

    def on_step(self, metrics: StepMetrics) -> None:
        """Write the row."""
        self._write("train", metrics.row())

    def on_validation(self, metrics: ValidationMetrics) -> None:
        """Write the row."""
        self._write("validation", metrics.row())

    def on_tasks(self, metrics: TaskMetrics) -> None:
        """Write the row's numbers."""
        self._write("tasks", {"step": metrics.step, **metrics.scores})

    def on_checkpoint(self, metrics: CheckpointMetrics) -> None:
        """Write the row's numbers."""
        row = asdict(metrics)
        del row["checkpoint"]
        self._write("checkpoint", row)

    def close(self) -> None:
        """Write what is buffered."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write(self, group: str, row: dict[str, float | None]) -> None:
        assert self._writer is not None, "on_start comes before the first row"
        step = row.pop("step")
        for name, value in row.items():
            if value is not None:
                self._writer.add_scalar(f"{group}/{name.removeprefix('val_')}", value, step)


def write_scalars(run_dir: Path, scalars: Mapping[str, float], step: int) -> None:
    """Add numbers to the event files of a run that is not training.

    Args:
        run_dir: folder of the run.
        scalars: by their names.
        step: that they are of.
    """
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run_dir / TENSORBOARD_FOLDER)) as writer:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
