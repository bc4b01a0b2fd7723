"""What a part of the bench reports: rows of figures, and whether each target is met."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One figure.

    Attributes:
        name: what was measured.
        value: the figure.
        unit: its unit.
        target: the least (or, with ``at_most``, the largest) value that is good enough; None: for information.
        at_most: whether ``target`` is an upper bound.
        note: how to read it.
    """

    name: str
    value: float
    unit: str = ""
    target: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        if self.target is None:
            return None
        return self.value <= self.target if self.at_most else self.value >= self.target


@dataclass(frozen=True)
class Report:
    """Figures of one part.

    Attributes:
        part: its name on the command line.
        rows: the figures; none where the part was skipped.
        skipped: why there are none.
        text: more to read, below the rows.
    """

    part: str
    rows: Sequence[Row] = field(default_factory=tuple)
    skipped: str | None = None
    text: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The same for a machine."""
        return {
            "part": self.part,
            "skipped": self.skipped,
            "rows": [{**asdict(row), "met": row.met} for row in self.rows],
        }

    def __str__(self) -> str:
        if self.skipped is not None:
            return f"{self.part}: skipped: {self.skipped}"
        width = max(len(row.name) for row in self.rows)
        lines = [f"{self.part}:", *(f"  {row.name:<{width}}  {_figures(row)}" for row in self.rows)]
        return "\n".join(lines if self.text is None else [*lines, "", self.text])


def _figures(row: Row) -> str:
    text = f"{row.value:12,.4g} {row.unit:<10}"
    if row.target is not None:
        text += f" {'≤' if row.at_most else '≥'} {row.target:g}: {'met' if row.met else 'NOT MET'}"
    return f"{text}  {row.note}".rstrip()
