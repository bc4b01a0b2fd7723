"""What a person sees of a run: a banner, a progress bar (or lines, in a log file), and how it ended."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from megalm.training.callbacks.base import (
    Callback,
    CheckpointMetrics,
    Outcome,
    RunContext,
    StepMetrics,
    TaskMetrics,
    ValidationMetrics,
)
from megalm.training.callbacks.words import (
    banner,
    checkpoint_line,
    end_line,
    failed_checkpoint_line,
    format_remaining,
    short_step_summary,
    step_line,
    step_summary,
    task_lines,
    validation_line,
)

_WIDE_COLUMNS = 100
"""Narrower terminals get the short summary."""

_RECENT_WEIGHT = 0.05
"""Weight of the newest step in the estimate of the time left."""


class ConsoleLog(Callback):
    """Progress on standard output: a bar on a terminal, one line per ``every`` steps anywhere else.

    Args:
        every: steps between lines where there is no terminal; the first and the last step always have one.
        stream: where to write; standard output by default.
        interactive: whether to draw a bar; by default, whether ``stream`` is a terminal that can move its cursor.
    """

    def __init__(self, every: int, *, stream: TextIO | None = None, interactive: bool | None = None) -> None:
        self._every = max(every, 1)
        self._stream = stream if stream is not None else sys.stdout
        self._console = Console(file=self._stream, highlight=False, soft_wrap=True)
        if interactive is None:
            interactive = self._stream.isatty() and not self._console.is_dumb_terminal
        self._interactive = interactive
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._pace = Pace()
        self._total_steps = 0
        self._start_step = 0
        self._last: StepMetrics | None = None

    def on_start(self, context: RunContext) -> None:
        """Show the banner; draw the bar."""
        self._start_step, self._total_steps = context.start_step, context.total_steps
        for line in banner(context):
            self._print(line)
        if self._interactive:
            self._bar = _make_bar(self._console, self._pace)
            self._task = self._bar.add_task("step", total=context.total_steps, completed=context.start_step, state="")
            self._bar.start()

    def on_step(self, metrics: StepMetrics) -> None:
        """Advance the bar, or print a line when one is due."""
        self._last = metrics
        self._pace.step(self._total_steps - metrics.step, metrics.step_seconds)
        if self._interactive and getattr(self._stream, "lost", None):  # nobody sees a bar; the log gets lines
            self._stop_bar()
            self._interactive = False
        if self._bar is not None:
            summary = step_summary if self._console.width >= _WIDE_COLUMNS else short_step_summary
            self._bar.update(self._task, completed=metrics.step, state=summary(metrics))
        elif self._is_due(metrics.step):
            self._print(step_line(metrics, self._total_steps, self._pace.remaining_seconds))

    def on_validation(self, metrics: ValidationMetrics) -> None:
        """Print a line, above the bar."""
        self._print(validation_line(metrics, self._total_steps), style="bold")

    def on_tasks(self, metrics: TaskMetrics) -> None:
        """Print lines, above the bar."""
        for line in task_lines(metrics, self._total_steps):
            self._print(line, style="bold")

    def on_checkpoint(self, metrics: CheckpointMetrics) -> None:
        """Print a line, above the bar."""
        self._print(checkpoint_line(metrics, self._total_steps), style="dim")

    def on_checkpoint_failed(self, step: int, reason: str) -> None:
        """Print a line, above the bar."""
        self._print(failed_checkpoint_line(step, self._total_steps, reason), style="bold red")

    def on_end(self, outcome: Outcome) -> None:
        """Leave the bar as it is and say how the run ended."""
        self._stop_bar()
        self._print(end_line(outcome, self._last, self._start_step, self._total_steps, self._pace.elapsed_seconds))

    def close(self) -> None:
        """Give the terminal back, whatever happened."""
        self._stop_bar()

    def _is_due(self, step: int) -> bool:
        return step % self._every == 0 or step in (self._start_step + 1, self._total_steps)

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, line: str, style: str | None = None) -> None:
        if self._interactive:
            self._console.print(line, style=style, markup=False)
        else:
            print(line, file=self._stream, flush=True)


class Pace:
    """How long the rest of a run takes, going by its recent steps, with what comes between them included.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._start = self._last = clock()
        self._steps = 0
        self._steps_left = 0
        self._seconds_per_step = math.nan

    def step(self, steps_left: int, step_seconds: float) -> None:
        """Count a step that has just ended; what came before the first one is not part of it."""
        now = self._clock()
        seconds = now - self._last if self._steps else step_seconds
        if self._steps <= 1:  # the first step is slow: let the second replace it
            self._seconds_per_step = seconds
        else:
            weight = max(1 / self._steps, _RECENT_WEIGHT)
            self._seconds_per_step += weight * (seconds - self._seconds_per_step)
        self._last = now
        self._steps += 1
        self._steps_left = steps_left

    @property
    def elapsed_seconds(self) -> float:
        """Time since the run began."""
        return self._clock() - self._start

    @property
    def remaining_seconds(self) -> float:
        """Time until the last step ends; not a number before the first."""
        return self._seconds_per_step * self._steps_left


class _RemainingColumn(ProgressColumn):
    """Estimated time left; rich's own column forgets slow steps after 30 seconds and then shows nothing."""

    def __init__(self, pace: Pace) -> None:
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> Text:  # noqa: ARG002 - a hook of rich
        """The time left, in words."""
        return Text(f"ETA {format_remaining(self._pace.remaining_seconds)}")


def _make_bar(console: Console, pace: Pace) -> Progress:
    return Progress(
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}", markup=False),
        _RemainingColumn(pace),
        console=console,
        refresh_per_second=5,
        expand=True,
    )
