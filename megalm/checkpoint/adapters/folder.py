"""A folder that comes into being whole, or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalm.checkpoint.durable import flush
from megalm.checkpoint.store import TEMPORARY_PREFIX
from megalm.data.place import cannot_be_renamed, real_path
from megalm.errors import ConfigError

_UNIQUE_BYTES = 4
_UNIQUE = rf"[0-9a-f]{{{2 * _UNIQUE_BYTES}}}"
"""What tells the temporary folders of two conversions to one place apart."""


def check_absent(folder: Path) -> None:
    """Refuse to write where something is.

    Raises:
        ConfigError: the path exists and is not an empty folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"DST {folder}: exists and is no folder; choose another")
    if folder.is_dir() and any(not entry.name.startswith(f"{TEMPORARY_PREFIX}") for entry in folder.iterdir()):
        raise ConfigError(f"DST {folder}: exists and is not empty; choose another, or remove it first")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder on the same disk, which takes the place of ``folder`` at the end and is removed after an error.

    A link is followed: what it leads to is written, and the link stays. An empty folder that cannot be renamed over (a
    disk is mounted there, say) is filled instead.

    What earlier conversions left there, when they were killed, is removed first; those that still run are let alone.

    Raises:
        ConfigError: the path exists and is not an empty folder, from the start or at the end.
    """
    check_absent(folder)
    folder = real_path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    home = folder if folder.is_dir() and cannot_be_renamed(folder) else folder.parent
    temporary, lock = _locked_folder(home, folder.name)
    try:
        yield temporary
        _flush_tree(temporary)
        if home == folder:
            _fill(temporary, folder)
        else:
            _take_place(temporary, folder)
        flush(home)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def _locked_folder(home: Path, name: str) -> tuple[Path, int]:
    """A temporary folder of this conversion's own, and the descriptor whose lock says that its owner lives."""
    prefix = f"{TEMPORARY_PREFIX}{name}-"
    parent = os.open(home, os.O_RDONLY)
    try:
        # Between its making and its locking, a folder looks like one whose owner is dead.
        can_lock = _lock(parent, wait=True)
        if can_lock:
            for left in home.iterdir():
                if re.fullmatch(re.escape(prefix) + _UNIQUE, left.name):
                    _remove_if_dead(left)
        temporary = home / (prefix + secrets.token_hex(_UNIQUE_BYTES))
        temporary.mkdir()
        lock = os.open(temporary, os.O_RDONLY)
        _lock(lock)
        return temporary, lock
    finally:
        os.close(parent)


def _remove_if_dead(folder: Path) -> None:
    """Remove a folder that a conversion left, unless its owner holds the lock."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # it took its place, or is none of ours
        return
    try:
        if _lock(descriptor):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, *, wait: bool = False) -> bool:
    """Lock what is open; False where another has it, or where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _take_place(temporary: Path, folder: Path) -> None:
    """Rename, which fails where something stands but an empty folder: between a look and a rename it could appear."""
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise _appeared(folder) from None


def _fill(temporary: Path, folder: Path) -> None:
    """Move all that was written into a folder that stays."""
    others = [entry for entry in folder.iterdir() if not entry.name.startswith(TEMPORARY_PREFIX)]
    if others:
        raise _appeared(folder)
    for entry in sorted(temporary.iterdir()):
        entry.rename(folder / entry.name)
    temporary.rmdir()


def _appeared(folder: Path) -> ConfigError:
    return ConfigError(
        f"DST {folder}: appeared while this was being converted, perhaps by another conversion, and was left as it "
        "is; choose another, or remove it first"
    )


def _flush_tree(folder: Path) -> None:
    """Force everything below a folder to the disk; what its writers have flushed costs nothing more."""
    for directory, _, files in os.walk(folder):
        for name in files:
            flush(Path(directory) / name)
        flush(Path(directory))
