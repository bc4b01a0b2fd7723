"""``megalm.compare``: runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megalm.runs.compare import Comparison
from megalm.runs.folder import run_folder_of


def compare(runs: Sequence[str | Path]) -> Comparison:
    """Read two or more runs, for their tables and a picture of their loss curves.

    Args:
        runs: their folders, or their names in ``runs/``.

    Raises:
        ConfigError, DataError: one is no run, or has taken no step.
    """
    return Comparison.of([run_folder_of(run) for run in runs])
