"""Names of files as reports can hold them: a file system's names are bytes, and not always UTF-8. No torch."""

from __future__ import annotations

import os
from pathlib import Path


def shown(name: str | Path) -> str:
    r"""The name with every byte that is no UTF-8 written as ``\xe9``; any other name as it is."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
