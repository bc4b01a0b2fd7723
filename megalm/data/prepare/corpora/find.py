"""Which files a user means: those named, and those below folders; any other is counted with the reason. No torch."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from megalm.data.names import shown
from megalm.data.prepare.corpora.compression import SUFFIXES as COMPRESSED
from megalm.data.tally import FileTally, RejectedFile
from megalm.errors import DataError

_ARCHIVES = (".7z", ".zip", ".rar", ".tar")
"""Endings behind a wanted one: such files are opened, and refused by what they are."""


@dataclass(frozen=True)
class Found:
    """The files of a corpus.

    Attributes:
        files: to be read, in order.
        left_out: what lies beside them.
    """

    files: tuple[Path, ...]
    left_out: FileTally = field(default_factory=FileTally, compare=False)


def find_files(inputs: Sequence[str], suffixes: Sequence[str] = ()) -> Found:
    """Files, and all files below folders, in the order given and then by name.

    Links are followed, into folders too; a file is read once, under the first of its names (one that is no link, where
    there is one). Hidden files and folders, empty files and what is no file are left out.

    Args:
        inputs: what the user named.
        suffixes: of folders take only files with these endings, compressed or not, in any case; empty: all.

    Raises:
        DataError: an input does not exist, cannot be read, or is a folder without such files.
    """
    search = _Search(tuple(suffixes))
    for name in inputs:
        search.add(name)
    search.check()
    return Found(tuple(search.files), search.left_out)


class _Entry(NamedTuple):
    """A file below a folder; ``linked``: it is a link, or lies below one."""

    path: Path
    status: os.stat_result
    linked: bool


class _Search:
    """What was found so far."""

    def __init__(self, suffixes: tuple[str, ...]) -> None:
        self._suffixes = suffixes
        self._names: dict[tuple[int, int], Path] = {}
        self._taken: set[tuple[int, int]] = set()
        self._unreadable: list[str] = []
        self.files: list[Path] = []
        self.left_out = FileTally()

    def add(self, name: str) -> None:
        """Find what one input names."""
        path = Path(name)
        try:
            status = path.stat()
        except FileNotFoundError:
            hint = ": the link leads nowhere" if path.is_symlink() else ""
            raise DataError(f"--input {shown(name)}: no such file or folder{hint}") from None
        except OSError as error:
            raise DataError(f"--input {shown(name)}: cannot be read: {error.strerror}") from None
        if stat.S_ISREG(status.st_mode):
            self._take(path, status, named=True)
        elif stat.S_ISDIR(status.st_mode):
            self._add_folder(name, path)
        else:
            raise DataError(
                f"--input {shown(name)}: is {_kind(status.st_mode)}, and files are read more than once; "
                "write it to a file first"
            )

    def check(self) -> None:
        """Raise DataError if anything cannot be read: hours later would be too late."""
        if self._unreadable:
            more = f" and {len(self._unreadable) - 5:,} more" if len(self._unreadable) > 5 else ""
            raise DataError(
                f"{', '.join(self._unreadable[:5])}{more}: cannot be read: permission denied; "
                "make them readable (chmod +r), or take them out of --input"
            )

    def _add_folder(self, name: str, folder: Path) -> None:
        below = [entry for entry in self._below(folder) if self._is_wanted(entry)]
        for entry in sorted(
            below, key=lambda entry: (entry.linked, entry.path)
        ):  # a file's own name before links to it
            self._names.setdefault(_identity(entry.status), entry.path)
        for entry in sorted(below, key=lambda entry: entry.path):
            self._take(entry.path, entry.status)
        if not below:
            ending = f" ending in {', '.join(self._suffixes)}" if self._suffixes else ""
            hint = f" ({self.left_out.line()})" if self.left_out.total() else ""
            raise DataError(f"--input {shown(name)}: the folder holds no files{ending}{hint}")

    def _is_wanted(self, entry: _Entry) -> bool:
        if not self._suffixes or _plain_suffix(entry.path) in self._suffixes:
            return True
        self._leave(entry.path, f"not named {' or '.join(self._suffixes)}", entry.status.st_size)
        return False

    def _take(self, path: Path, status: os.stat_result, *, named: bool = False) -> None:
        """A file that is wanted, unless it is empty, or is taken under another name or already."""
        identity = _identity(status)
        first = self._names.setdefault(identity, path)
        if status.st_ino and (first != path or identity in self._taken):
            self._leave(path, "the same file again", status.st_size, f"read as {shown(first)}")
            return
        self._taken.add(identity)
        if status.st_size == 0 and not named:  # of one that is named, the corpus says what it misses
            self._leave(path, "empty")
        elif not os.access(path, os.R_OK):
            self._unreadable.append(shown(path))
        else:
            self.files.append(path)

    def _leave(self, path: Path, reason: str, size: int = 0, advice: str = "") -> None:
        self.left_out.add(RejectedFile(shown(path), reason, size, advice))

    def _below(self, root: Path) -> Iterator[_Entry]:
        """Files below a folder, each folder looked into once, linked ones after the others."""
        visited: dict[tuple[int, int], Path] = {}
        waiting, linked = [root], False
        while waiting:
            links: list[Path] = []
            while waiting:
                folder = waiting.pop()
                identity = _identity(folder.stat())
                if identity in visited:
                    self._leave(folder, "linked folder read already", advice=f"read as {shown(visited[identity])}")
                    continue
                visited[identity] = folder
                for entry, path in self._entries(folder):
                    if entry.name.startswith("."):
                        self._leave_hidden(entry, path)
                    elif path.is_dir():
                        (links if entry.is_symlink() else waiting).append(path)
                    elif (status := self._status(path)) is not None:
                        yield _Entry(path, status, linked or entry.is_symlink())
            waiting, linked = sorted(links, reverse=True), True

    def _entries(self, folder: Path) -> Iterator[tuple[os.DirEntry[str], Path]]:
        try:
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except PermissionError:
            self._unreadable.append(shown(folder))
            return
        except OSError as error:
            raise DataError(f"{shown(folder)}: cannot be read: {error.strerror}") from None
        for entry in listed:
            yield entry, folder / entry.name

    def _status(self, path: Path) -> os.stat_result | None:
        """The status of a file; None for what is no file, which is counted."""
        try:
            status = path.stat()
        except OSError as error:
            self._leave(path, "link that leads nowhere", advice=error.strerror or "")
            return None
        if not stat.S_ISREG(status.st_mode):
            self._leave(path, f"{_kind(status.st_mode).partition(' ')[2]}, no file")
            return None
        return status

    def _leave_hidden(self, entry: os.DirEntry[str], path: Path) -> None:
        if path.is_dir():
            self._leave(path, "hidden folder (not looked into)")
        else:
            self._leave(path, "hidden", entry.stat(follow_symlinks=False).st_size)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _kind(mode: int) -> str:
    names = (
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((name for test, name in names if test(mode)), "an object")


def _plain_suffix(path: Path) -> str:
    """The ending in small letters, without that of a compressing program."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if len(suffixes) == 2 and suffixes[1] in (*COMPRESSED, *_ARCHIVES):
        return suffixes[0]
    return suffixes[-1] if suffixes else ""
