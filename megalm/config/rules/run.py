"""Rules about the identity of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megalm.config.job import Job, Rule
from megalm.config.violation import Fix, Violation

_SEPARATORS = '/\\:*?"<>|'
"""Characters that some file system or shell gives a meaning of their own in a name."""

_JOINERS = "\u200c\u200d"
"""Invisible characters that letters of some languages are joined or kept apart with."""

_MOST_BYTES = 200
"""Of a name in UTF-8: file systems take 255, and megalm appends to it."""

_SHORT = 40
"""Characters of the name that is offered instead of one that is too long."""


def run_has_a_folder_name(job: Job) -> Iterator[Violation]:
    """``run.name`` is one folder name, the same on every file system: any letters, digits, spaces and most signs."""
    name = job.config.run.name
    wrong = _wrong_with(name)
    if wrong:
        yield Violation("run.name", name, wrong, fixes=(Fix("run.name", (_plain(name),)),))


def _wrong_with(name: str) -> str:
    """Why a text is no folder name; empty: it is one."""
    if not name.strip():
        return "a run needs a name"
    if forbidden := [sign for sign in _SEPARATORS if sign in name]:
        return f"a folder name holds no {' '.join(forbidden)}"
    if any(not sign.isprintable() and sign not in _JOINERS for sign in name):
        return "holds control characters or invisible ones"
    if name[0] in ".-~ " or name[-1] in ". ":
        return "a folder name begins with no dot, dash, ~ or space and ends with no dot or space"
    if len(name.encode(errors="replace")) > _MOST_BYTES:
        return f"longer than {_MOST_BYTES} bytes"
    return ""


def _plain(name: str) -> str:
    """A name like it that can be a folder's."""
    plain = re.sub(r"[^\w.-]+", "-", name).strip("-._")
    if len(plain.encode(errors="replace")) > _MOST_BYTES:
        plain = plain[:_SHORT].strip("-._")
    return plain if plain and not _wrong_with(plain) else "run1"


RULES: tuple[Rule, ...] = (run_has_a_folder_name,)
