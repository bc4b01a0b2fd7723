"""Corpora whose documents are files: the running Python's standard library, and any text files."""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.errors import DataError

_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"})
"""Folders below the standard library that are not written to be read: third parties, generated data, tests."""


@dataclass(frozen=True)
class Corpus:
    """A sequence of documents, one per file.

    Attributes:
        source: where it comes from, in words.
        files: one document each, in order.
    """

    source: str
    files: tuple[Path, ...]

    @property
    def total_bytes(self) -> int:
        """Size of all documents, for progress."""
        return sum(path.stat().st_size for path in self.files)

    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed, resized or touched; reads no contents."""
        hasher = hashlib.sha256(self.source.encode())
        for path in self.files:
            status = path.stat()
            hasher.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return hasher.hexdigest()

    def documents(self) -> Iterator[bytes]:
        """The documents' bytes, in order."""
        for path in self.files:
            try:
                yield path.read_bytes()
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def stdlib_corpus(inputs: Sequence[str]) -> Corpus:
    """The ``.py`` files of the running Python's standard library: real text that every machine has.

    Raises:
        DataError: an input was given, or this Python ships without its library's sources.
    """
    if inputs:
        raise DataError(f"--input {inputs[0]}: the stdlib corpus takes no input; --corpus text reads files")
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if not _NOT_LIBRARY & set(path.relative_to(root).parts)]
    if not files:
        raise DataError(f"no .py files below {root}: this Python was installed without its library's sources")
    return Corpus(f"standard library of Python {platform.python_version()}", tuple(sorted(files)))


def text_corpus(inputs: Sequence[str]) -> Corpus:
    """Files, and all files below folders, in the order given and then by name; hidden files and folders are left out.

    Raises:
        DataError: no input, or one that does not exist or holds no file.
    """
    if not inputs:
        raise DataError("--corpus text needs --input with files or folders")
    files: list[Path] = []
    for name in inputs:
        path = Path(name)
        if path.is_file():
            files.append(path)
            continue
        if not path.is_dir():
            raise DataError(f"--input {name}: no such file or folder")
        found = sorted(p for p in path.rglob("*") if p.is_file() and not _is_hidden(p.relative_to(path)))
        if not found:
            raise DataError(f"--input {name}: the folder holds no files")
        files += found
    return Corpus(", ".join(inputs), tuple(files))
