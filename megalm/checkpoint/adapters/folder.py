"""A folder that comes into being whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megalm.checkpoint.store import TEMPORARY_PREFIX
from megalm.errors import ConfigError


def check_absent(folder: Path) -> None:
    """Refuse to write where something is.

    Raises:
        ConfigError: the path exists and is not an empty folder.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ConfigError(f"DST {folder}: exists and is no folder; choose another")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"DST {folder}: exists and is not empty; choose another, or remove it first")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside ``folder`` to write to, which takes its place at the end and is removed after an error.

    What an earlier conversion left there, when it was killed, is removed first.
    """
    check_absent(folder)
    folder = folder.absolute()
    temporary = folder.parent / f"{TEMPORARY_PREFIX}{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _flush_tree(temporary)
        temporary.rename(folder)
        _flush(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _flush_tree(folder: Path) -> None:
    """Force everything below a folder to the disk; what its writers have flushed costs nothing more."""
    for directory, _, files in os.walk(folder):
        for name in files:
            _flush(Path(directory) / name)
        _flush(Path(directory))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
