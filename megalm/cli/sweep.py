"""``megalm train -m``: the runs of a sweep, one after another on this machine. No torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megalm.config.compose import compose
from megalm.config.job import world_size_of
from megalm.config.schema import Config
from megalm.config.sweep import SweepRun, sweep_runs
from megalm.errors import DataError, ExitCode
from megalm.launch.guard import guarded
from megalm.plan.preflight import check_config
from megalm.runs.folder import METRICS_FILE
from megalm.runs.record import read_metrics, step_rows, validation_rows
from megalm.runs.source_model import source_model
from megalm.runs.start import run_folder

_ENDS_THE_SWEEP = (ExitCode.INTERRUPTED, ExitCode.REQUEUE)
"""Whoever stops a run so means all of them; the same command goes on where it was."""

_OUTCOMES = {
    ExitCode.DONE: "done",
    ExitCode.BAD_CONFIG: "bad config",
    ExitCode.BAD_DATA: "bad data or checkpoint",
    ExitCode.DIVERGED: "diverged",
    ExitCode.BUG: "failed",
    ExitCode.REQUEUE: "to be requeued",
    ExitCode.INTERRUPTED: "interrupted",
}


@dataclass(frozen=True)
class _Ended:
    """A run and its exit code; None: it was not started."""

    run: SweepRun
    code: int | None


def run_sweep(arguments: Sequence[str], train: Callable[[list[str]], int]) -> int:
    """Train every combination of the values that the arguments list, whatever becomes of the others.

    Args:
        arguments: as for ``compose``, with several values for some of the settings.
        train: trains one run, given its arguments; returns its exit code.

    Returns:
        Done, if all are; else the code of the first that is not.

    Raises:
        ConfigError: something is wrong with one of the runs; none has been started.
    """
    runs = sweep_runs(arguments, source_model, check=_check)
    ended: list[_Ended] = []
    for number, run in enumerate(runs, start=1):
        if ended and ended[-1].code in (None, *_ENDS_THE_SWEEP):
            ended.append(_Ended(run, None))
            continue
        print(f"run {number} of {len(runs)}: {run.name}", file=sys.stderr, flush=True)
        ended.append(_Ended(run, guarded(partial(train, list(run.arguments)))))
    print(*_table(ended), sep="\n")
    stopped = next((item.code for item in ended if item.code in _ENDS_THE_SWEEP), None)
    failed = next((item.code for item in ended if item.code), ExitCode.DONE)
    return stopped or failed or ExitCode.DONE


def _check(config: Config) -> None:
    check_config(config, world_size_of(config))


def _table(ended: Sequence[_Ended]) -> list[str]:
    """A line for each run: its name, how it ended, its last step and losses."""
    rows = [["run", "outcome", "step", "loss", "val_loss"]]
    for item in ended:
        words = "not started" if item.code is None else _OUTCOMES.get(ExitCode(item.code), f"exit code {item.code}")
        rows.append([item.run.name, words, *_results(item)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        left = [f"{cell:{width}}" for cell, width in zip(row[:2], widths[:2], strict=True)]
        right = [f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    return lines


def _results(item: _Ended) -> list[str]:
    """Last step, its loss and the last validation loss, as the run's record has them."""
    if item.code is None:
        return ["", "", ""]
    try:
        rows = read_metrics(run_folder(compose(item.run.arguments, source_model)) / METRICS_FILE)
    except DataError:  # it did not come so far
        return ["", "", ""]
    steps, validations = step_rows(rows), validation_rows(rows)
    last: dict[str, Any] = steps[-1] if steps else {}
    val_loss = validations[-1]["val_loss"] if validations else None
    return [str(last.get("step", "")), _number(last.get("loss")), _number(val_loss)]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
