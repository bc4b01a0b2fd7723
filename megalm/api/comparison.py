"""``megalm.compare``: runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megalm.runs.compare import Comparison


def compare(runs: Sequence[str | Path]) -> Comparison:
    """Read two or more runs, for their tables and a picture of their loss curves.

    Args:
        runs: their folders.

    Raises:
        ConfigError, DataError: one is no run, or has taken no step.
    """
    return Comparison.of([Path(run) for run in runs])
