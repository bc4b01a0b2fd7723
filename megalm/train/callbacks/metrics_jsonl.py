"""``metrics.jsonl``: the record of a run, one JSON object per line; every other logger shows a copy of it.

Floats are written with as many digits as identify them, so two runs can be compared bit for bit. JSON has no word for
numbers that are not finite; they are the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, as in Protocol Buffers.
"""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import asdict
from io import FileIO
from pathlib import Path
from typing import Any, ClassVar

from megalm.errors import DataError
from megalm.ownership import Claim
from megalm.train.callbacks.base import (
    Attempt,
    Callback,
    CheckpointMetrics,
    Outcome,
    RunContext,
    StepMetrics,
    ValidationMetrics,
    warn,
)

FILE_NAME = "metrics.jsonl"

_FULL = (errno.ENOSPC, errno.EDQUOT)

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsJsonl(Callback):
    """Appends a row for every start of the run, step, validation and checkpoint.

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
        path = context.run_dir / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_back(path, context.start_step)
        self._file = path.open("ab", buffering=0)
        if context.attempt is not None:
            self._append(_attempt_row(context.attempt))

    def on_step(self, metrics: StepMetrics) -> None:
        """Append a row."""
        self._append(asdict(metrics))

    def on_validation(self, metrics: ValidationMetrics) -> None:
        """Append a row."""
        self._append(asdict(metrics))

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
                warn(f"{FILE_NAME}: {error.strerror}: rows wait in memory until there is room")

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


def encode_row(row: dict[str, Any]) -> str:
    """A row as one line of standard JSON, without the line break."""
    return json.dumps({key: _encode(value) for key, value in row.items()}, allow_nan=False)


def decode_row(line: str) -> dict[str, Any]:
    """The inverse of :func:`encode_row`.

    Raises:
        ValueError: the line is no JSON object.
    """
    row = json.loads(line)
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    return {key: _NOT_FINITE.get(value, value) if isinstance(value, str) else value for key, value in row.items()}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows of a ``metrics.jsonl``, in order; a last line that was not finished is left out.

    Raises:
        DataError: the file is missing, or a line other than the last is no JSON object.
    """
    return [decode_row(line) for line in _complete_lines(path)]


def step_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of training steps."""
    return [row for row in rows if "loss" in row]


def validation_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of validations."""
    return [row for row in rows if "val_loss" in row]


def attempt_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the starts of a run."""
    return [row for row in rows if "attempt" in row]


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


def cut_back(path: Path, step: int) -> None:
    """Drop the rows beyond ``step``, and an unfinished last line, by replacing the file; no file is no error."""
    if not path.exists():
        return
    kept = [line for line in _complete_lines(path) if decode_row(line)["step"] <= step]
    text = "".join(f"{line}\n" for line in kept)
    if text == path.read_text(encoding="utf-8", errors="replace"):
        return
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def checkpoint_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of checkpoints."""
    return [row for row in rows if "checkpoint" in row]


def _complete_lines(path: Path) -> list[str]:
    """Lines that hold a row each; only what follows the last line break may be damaged."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); a run folder holds {FILE_NAME}") from error
    lines = text.split("\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            decode_row(line)["step"]
        except (ValueError, KeyError):
            raise DataError(
                f"{path}:{number}: not a row of metrics; restore the line, or move the file away to start a new record"
            ) from None
    return lines


def _encode(value: Any) -> Any:
    if not isinstance(value, float) or math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"
