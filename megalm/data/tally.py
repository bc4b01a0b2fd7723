"""Which of a user's files were not read, and why: what the console and the data card say of them. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

EXAMPLES = 5
"""How many files (or documents) a report names for each reason."""


@dataclass(frozen=True)
class RejectedFile:
    """A file that holds no text which can be read.

    Attributes:
        name: where it is.
        reason: in a few words that reports count by: ``PNG image``.
        bytes: its size on disk.
        advice: what would have it read; may be empty.
    """

    name: str
    reason: str
    bytes: int
    advice: str = ""

    @property
    def example(self) -> str:
        """How a report names it."""
        return f"{self.name} ({self.advice})" if self.advice else self.name


@dataclass
class Unread:
    """The files that were left out for one reason.

    Attributes:
        files: how many.
        bytes: their size on disk, where it is known.
        examples: the first few.
    """

    files: int = 0
    bytes: int = 0
    examples: list[str] = field(default_factory=list)


class FileTally:
    """Files that were left out, by reason."""

    def __init__(self, contents: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._reasons = {reason: Unread(**values) for reason, values in (contents or {}).items()}

    def add(self, file: RejectedFile) -> None:
        """Count one."""
        self._count(file.reason, 1, file.bytes, [file.example])

    def update(self, other: FileTally) -> None:
        """Count what another tally counted."""
        for reason, left_out in other.items():
            self._count(reason, left_out.files, left_out.bytes, left_out.examples)

    def items(self) -> list[tuple[str, Unread]]:
        """Reasons, the commonest first."""
        return sorted(self._reasons.items(), key=lambda item: (-item[1].files, item[0]))

    def total(self) -> int:
        """How many files were left out."""
        return sum(left_out.files for left_out in self._reasons.values())

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """For JSON; the constructor reads it."""
        return {
            reason: {"files": one.files, "bytes": one.bytes, "examples": list(one.examples)}
            for reason, one in self.items()
        }

    def line(self, reasons: int = 6) -> str:
        """Reasons with their counts, and an example of each, in one line."""
        parts = [
            f"{one.files:,} {reason} (such as {one.examples[0]})" if one.examples else f"{one.files:,} {reason}"
            for reason, one in self.items()
        ]
        more = [f"{len(parts) - reasons} more reasons"] if len(parts) > reasons else []
        return "; ".join([*parts[:reasons], *more])

    def _count(self, reason: str, files: int, size: int, examples: Iterable[str]) -> None:
        one = self._reasons.setdefault(reason, Unread())
        one.files += files
        one.bytes += size
        one.examples.extend(list(examples)[: EXAMPLES - len(one.examples)])
