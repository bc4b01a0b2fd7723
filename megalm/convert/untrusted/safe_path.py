"""Paths named by files from elsewhere: only files inside their folder may be read."""

from __future__ import annotations

from pathlib import Path

from megalm.errors import CheckpointError


def safe_file(folder: Path, name: str) -> Path:
    """A file of a folder by a name that somebody else wrote; the file need not exist.

    Raises:
        CheckpointError: the name or a link leaves the folder, or it is no file.
    """
    if not name or Path(name).name != name or name in (".", ".."):
        raise CheckpointError(f"{folder}: file name {name[:200]!r} leaves the folder; only plain names can be read")
    return safe_path(folder, folder / name)


def safe_path(home: Path, path: Path) -> Path:
    """A file somewhere below the folder that the user named; it need not exist.

    The links of Hugging Face's download cache, from a snapshot to its blobs, are followed; others must stay inside.

    Raises:
        CheckpointError: a link leaves the folder, or it is no file: a pipe would be waited for without end.
    """
    try:
        real, root = path.resolve(), home.resolve()
    except (OSError, RuntimeError):
        raise CheckpointError(f"{path}: a link that leads to itself; copy the file here") from None
    if not real.is_relative_to(root) and real.parent not in _blobs(root):
        raise CheckpointError(f"{path}: a link to {real}, outside the folder; copy the file here")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: not a file")
    return path


def _blobs(root: Path) -> list[Path]:
    """Where the download cache keeps the files of a snapshot, or of a folder in one."""
    folders = (root, *root.parents)
    return [folder.parents[1] / "blobs" for folder in folders if folder.parent.name == "snapshots"]
