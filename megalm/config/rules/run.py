"""Rules about the identity of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator

from megalm.config.job import Job, Rule
from megalm.config.violation import Fix, Violation

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def run_has_a_folder_name(job: Job) -> Iterator[Violation]:
    """``run.name`` is one plain folder name, the same on every file system."""
    name = job.config.run.name
    if _FOLDER_NAME.fullmatch(name) and len(name) <= 200:
        return
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:200] or "run1"
    wrong = "a run needs a name" if not name else "not a plain folder name (letters, digits, '.', '_', '-')"
    yield Violation("run.name", name, wrong, fixes=(Fix("run.name", (plain,)),))


RULES: tuple[Rule, ...] = (run_has_a_folder_name,)
