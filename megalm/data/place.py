"""Where a dataset is put together, and how it takes its place: never half, never on another disk than asked. No torch.

A folder that is not there yet, or holds a dataset, is replaced by renaming; the new one is put together beside it. One
that must stay the same folder is filled instead: it is empty (someone may have made it with an owner and permissions of
its own), a disk is mounted there, this process stands in it, or the folder around it may not be written.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from megalm.data.names import shown
from megalm.errors import DataError

RECIPE_FILE = "recipe.json"
DATA_CARD_FILE = "data_card.json"
_LOCK_SUFFIX = ".owner"
_PARTS = frozenset({"train", "val", RECIPE_FILE})


def real_path(path: Path) -> Path:
    """The folder itself: links followed, ``.`` and ``..`` resolved. It need not exist."""
    return Path(os.path.realpath(path))


def partial_folder(path: Path) -> Path:
    """Where a dataset is put together before it takes its place at ``path``: on the same disk."""
    folder = real_path(path)
    name = f".{folder.name}.partial"
    return folder / name if _is_filled(folder) else folder.with_name(name)


def owner_lock(path: Path) -> Path:
    """The lock of whoever puts a dataset together there: in the same place whatever is there by now."""
    folder = real_path(path)
    name = f".{folder.name}{_LOCK_SUFFIX}"
    return folder / name if folder.is_dir() and _is_fixed(folder) else folder.with_name(name)


def is_vacant(path: Path) -> bool:
    """Whether a dataset can be put there without anything being lost: nothing is there, or an empty folder.

    What an interrupted preparation left in it does not count.
    """
    folder = real_path(path)
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    names = {entry.name for entry in folder.iterdir() if not is_lock(entry, folder)}
    own = {partial_folder(path).name, _replaced(folder, inside=True).name}
    return not names - own or (RECIPE_FILE not in names and bool(names & own))


def put_in_place(partial: Path, path: Path) -> None:
    """Move what was put together in :func:`partial_folder` to ``path``; an older one goes when it is whole."""
    folder = real_path(path)
    if partial.parent == folder:
        _fill(partial, folder)
        return
    replaced = _replaced(folder, inside=False)
    shutil.rmtree(replaced, ignore_errors=True)
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def check_apart(path: Path, inputs: Sequence[str], files: Iterable[Path] = ()) -> None:
    """Raise DataError if a dataset would lie among what it is made from, or would replace it.

    Args:
        path: where it is to lie.
        inputs: files and folders that the user names; others (a dataset's name) are passed over.
        files: what was found below them, links followed.
    """
    folder = real_path(path)
    right = "give an --out outside of --input"
    for name in inputs:
        if not Path(name).exists():
            continue
        given = real_path(Path(name))
        if given == folder:
            raise DataError(f"--out {shown(path)}: is also --input {shown(name)}; {right}")
        if given in folder.parents:
            raise DataError(f"--out {shown(path)}: lies inside --input {shown(name)}, which would read it; {right}")
        if folder in given.parents:
            raise DataError(
                f"--out {shown(path)}: --input {shown(name)} lies inside it, and would be replaced; {right}"
            )
    for around in sorted({file.parent for file in files}):
        given = real_path(around)
        if given == folder or folder in given.parents:
            raise DataError(f"--out {shown(path)}: --input leads into it ({shown(around)}); {right}")


def check_place(path: Path) -> None:
    """Raise DataError if no dataset can lie there, whatever is allowed to be replaced."""
    folder = real_path(path)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"--out {shown(path)}: is a file; name a folder that is not there yet")
    if folder in Path.cwd().parents:
        raise DataError(f"--out {shown(path)}: is a folder around the one that this command runs in; name another")


def cannot_be_renamed(folder: Path) -> bool:
    """Whether a folder must stay: this process is in it, a disk is mounted there, or its parent is closed."""
    return folder == Path.cwd() or _is_fixed(folder)


def _is_filled(folder: Path) -> bool:
    """Whether the folder stays, and its contents change."""
    return folder.is_dir() and (
        cannot_be_renamed(folder)
        or (not (folder / RECIPE_FILE).exists() and not any(entry.name in _PARTS for entry in folder.iterdir()))
    )


def _is_fixed(folder: Path) -> bool:
    """Whether no process can rename a folder that exists, and what lies beside it may be another machine's."""
    around = folder.parent
    return os.path.ismount(folder) or folder.stat().st_dev != around.stat().st_dev or not os.access(around, os.W_OK)


def is_lock(entry: Path, folder: Path) -> bool:
    """Whether an entry of a folder is of :func:`owner_lock`."""
    return entry.name.startswith(f".{folder.name}{_LOCK_SUFFIX}")


def _fill(partial: Path, folder: Path) -> None:
    """The recipe goes first and comes last: without it, nothing takes the folder for a dataset."""
    replaced = _replaced(folder, inside=True)
    shutil.rmtree(replaced, ignore_errors=True)
    old = [entry for entry in folder.iterdir() if entry not in (partial, replaced) and not is_lock(entry, folder)]
    if old:
        replaced.mkdir()
        for entry in sorted(old, key=lambda entry: entry.name != RECIPE_FILE):
            entry.rename(replaced / entry.name)
    for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == RECIPE_FILE):
        entry.rename(folder / entry.name)
    partial.rmdir()
    shutil.rmtree(replaced, ignore_errors=True)


def _replaced(folder: Path, *, inside: bool) -> Path:
    name = f".{folder.name}.replaced"
    return folder / name if inside else folder.with_name(name)
