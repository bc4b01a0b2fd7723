"""The checkpoints of a run: which are complete, which is the newest, which may go. No torch."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from megalm.checkpoint.manifest import COMPLETE_FILE
from megalm.errors import CheckpointError

CHECKPOINTS_FOLDER = "checkpoints"
TEMPORARY_PREFIX = ".unfinished-"
_STEP_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint."""

    path: Path
    step: int


def step_folder(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def complete_checkpoints(folder: Path) -> list[CheckpointInfo]:
    """Complete checkpoints in a run's checkpoint folder, oldest first; none where the folder does not exist."""
    found = [
        CheckpointInfo(path, int(match.group(1)))
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _STEP_NAME.fullmatch(path.name)) and (path / COMPLETE_FILE).is_file()
    ]
    return sorted(found, key=lambda info: info.step)


def torn_checkpoints(folder: Path) -> list[Path]:
    """What interrupted saves left behind."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.name.startswith(TEMPORARY_PREFIX)
        or (_STEP_NAME.fullmatch(path.name) and not (path / COMPLETE_FILE).is_file())
    )


def find_latest(folder: Path) -> CheckpointInfo | None:
    """The newest complete checkpoint in a run's checkpoint folder."""
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def locate(path: str | Path) -> CheckpointInfo:
    """The checkpoint that a user's path means: a checkpoint, or the newest of a run or of its checkpoint folder.

    Raises:
        CheckpointError: there is no complete checkpoint at the path.
    """
    folder = Path(path)
    match = _STEP_NAME.fullmatch(folder.resolve().name)
    if (folder / COMPLETE_FILE).is_file() and match:
        return CheckpointInfo(folder, int(match.group(1)))
    if not folder.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    latest = find_latest(folder / CHECKPOINTS_FOLDER) or find_latest(folder)
    if latest is None:
        raise CheckpointError(
            f"{path}: no complete checkpoint here (a complete one is a folder step-… with a {COMPLETE_FILE} file)"
        )
    return latest


def prune(folder: Path, keep_last: int) -> None:
    """Delete all but the newest ``keep_last`` complete checkpoints (0 keeps all).

    A folder is renamed before it is deleted, so that what a kill leaves behind is not taken for a checkpoint, and the
    next save removes it.
    """
    if keep_last < 1:
        return
    for info in complete_checkpoints(folder)[:-keep_last]:
        doomed = info.path.rename(folder / f"{TEMPORARY_PREFIX}pruned-{info.path.name}")
        shutil.rmtree(doomed)
