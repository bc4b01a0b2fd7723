"""The record of a run: the rows of its ``metrics.jsonl``, written and read. No torch.

One JSON object per line. Floats are written with as many digits as identify them, so two runs can be compared bit for
bit. JSON has no word for numbers that are not finite; they are the strings ``"NaN"``, ``"Infinity"`` and
``"-Infinity"``, as in Protocol Buffers.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from megalm.checkpoint.durable import replace_text
from megalm.errors import DataError
from megalm.runs.folder import METRICS_FILE

_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


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


def checkpoint_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of checkpoints."""
    return [row for row in rows if "checkpoint" in row]


def cut_back(path: Path, step: int) -> None:
    """Drop the rows beyond ``step``, and an unfinished last line, by replacing the file; no file is no error."""
    if not path.exists():
        return
    kept = [line for line in _complete_lines(path) if decode_row(line)["step"] <= step]
    text = "".join(f"{line}\n" for line in kept)
    if text == path.read_text(encoding="utf-8", errors="replace"):
        return
    replace_text(path, text)


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a record that nobody else writes, in the place of an unfinished last line.

    Raises:
        DataError: a line other than the last is no row.
    """
    lines = [*_complete_lines(path), encode_row(row)]
    replace_text(path, "".join(f"{line}\n" for line in lines))


def _complete_lines(path: Path) -> list[str]:
    """Lines that hold a row each; only what follows the last line break may be damaged."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); a run folder holds {METRICS_FILE}") from error
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
