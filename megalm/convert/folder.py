"""A folder that appears complete, or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalm.checkpoint.durable import flush
from megalm.checkpoint.store import TEMPORARY_PREFIX
from megalm.data.place import cannot_be_renamed, is_lock, owner_lock, real_path
from megalm.errors import ConfigError
from megalm.ownership import owned

_UNIQUE_BYTES = 4
_UNIQUE = rf"[0-9a-f]{{{2 * _UNIQUE_BYTES}}}"
"""Random bytes in the name of a temporary folder, so that two conversions to one target do not share it."""


def check_absent(folder: Path) -> None:
    """Refuse a target that exists already.

    Raises:
        ConfigError: the path exists and is not an empty folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"DST {folder}: exists and is no folder; choose another")
    if folder.is_dir() and not all(_is_conversions(entry, folder) for entry in folder.iterdir()):
        raise ConfigError(f"DST {folder}: exists and is not empty; choose another, or remove it first")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder on the same disk, which takes the place of ``folder`` at the end and is removed after an error.

    A link is followed: what it leads to is written, and the link stays. An empty folder that cannot be renamed over (a
    disk is mounted there, say) is filled instead.

    One conversion at a time writes to one place. What earlier ones left there, when they were killed, is removed first.

    Raises:
        ConfigError: the path exists and is not an empty folder, from the start or at the end; or another conversion is
            writing there.
    """
    check_absent(folder)
    folder = real_path(folder)
    remedy = "wait for it to end, or choose another"
    with owned(owner_lock(folder), f"DST {folder}", remedy) as ownership:
        check_absent(folder)  # another has just ended
        home = folder if folder.is_dir() and cannot_be_renamed(folder) else folder.parent
        temporary = _temporary_folder(home, folder.name)
        try:
            yield temporary
            _flush_tree(temporary)
            ownership.claim.check()
            if home == folder:
                _fill(temporary, folder)
            else:
                _take_place(temporary, folder)
            flush(home)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _temporary_folder(home: Path, name: str) -> Path:
    """Make this conversion's temporary folder, after removing those that killed conversions left."""
    prefix = f"{TEMPORARY_PREFIX}{name}-"
    for left in home.iterdir():
        if re.fullmatch(re.escape(prefix) + _UNIQUE, left.name):
            shutil.rmtree(left, ignore_errors=True)
    temporary = home / (prefix + secrets.token_hex(_UNIQUE_BYTES))
    temporary.mkdir()
    return temporary


def _take_place(temporary: Path, folder: Path) -> None:
    """Rename; fails if the target has become a file or a folder with something in it since it was checked."""
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        raise _appeared(folder) from None


def _fill(temporary: Path, folder: Path) -> None:
    """Move all that was written into a folder that stays."""
    if not all(_is_conversions(entry, folder) for entry in folder.iterdir()):
        raise _appeared(folder)
    for entry in sorted(temporary.iterdir()):
        entry.rename(folder / entry.name)
    temporary.rmdir()


def _is_conversions(entry: Path, folder: Path) -> bool:
    """Whether an entry is the lock or a temporary folder of a conversion."""
    return entry.name.startswith(TEMPORARY_PREFIX) or is_lock(entry, real_path(folder))


def _appeared(folder: Path) -> ConfigError:
    return ConfigError(
        f"DST {folder}: appeared while this was being converted, and was left as it is; choose another, or remove it "
        "first"
    )


def _flush_tree(folder: Path) -> None:
    """Force everything below a folder to the disk; what its writers have flushed costs nothing more."""
    for directory, _, files in os.walk(folder):
        for name in files:
            flush(Path(directory) / name)
        flush(Path(directory))
