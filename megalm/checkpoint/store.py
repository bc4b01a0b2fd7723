"""The checkpoints of a run: which are complete, which is the newest, which may go. No torch."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.checkpoint.manifest import COMPLETE_FILE, read_manifest
from megalm.errors import CheckpointError

CHECKPOINTS_FOLDER = "checkpoints"
TEMPORARY_PREFIX = ".unfinished-"
_REPLACED_SUFFIX = ".replaced"
_STEP_NAME = re.compile(r"step-(\d{8,})")
_REPLACED_NAME = re.compile(rf"(step-\d{{8,}}){re.escape(_REPLACED_SUFFIX)}")


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint."""

    path: Path
    step: int


def step_folder(step: int) -> str:
    """Name of a checkpoint's folder."""
    return f"step-{step:08d}"


def replaced_folder(final: Path) -> Path:
    """Where a checkpoint waits while a newer one of the same step takes its place."""
    return final.with_name(final.name + _REPLACED_SUFFIX)


def complete_checkpoints(folder: Path) -> list[CheckpointInfo]:
    """Complete checkpoints in a run's checkpoint folder, oldest first; none where the folder does not exist.

    One that was stepping aside for a newer one of its step, when the process was killed, counts while that is missing.
    """
    found: dict[int, Path] = {}
    for path in (
        sorted(folder.iterdir(), reverse=True) if folder.is_dir() else ()
    ):  # a replaced one before its successor
        step = _step_of(path)
        if step is not None and (path / COMPLETE_FILE).is_file():
            found[step] = path
    return [CheckpointInfo(found[step], step) for step in sorted(found)]


def torn_checkpoints(folder: Path) -> list[Path]:
    """What interrupted saves left behind."""
    if not folder.is_dir():
        return []
    complete = {info.path for info in complete_checkpoints(folder)}
    return sorted(
        path
        for path in folder.iterdir()
        if path not in complete and (path.name.startswith(TEMPORARY_PREFIX) or _step_of(path) is not None)
    )


def remove_leftovers(folder: Path) -> None:
    """Delete what saves and deletions of an earlier life left under names that no checkpoint has.

    Raises:
        CheckpointError: one cannot be deleted.
    """
    for path in torn_checkpoints(folder):
        if _STEP_NAME.fullmatch(path.name) is None:  # a folder of that name was a checkpoint once: not ours to judge
            try:
                remove_folder(path)
            except OSError as error:
                raise CheckpointError(f"{path}: an interrupted save, cannot be deleted: {error.strerror}") from None


def remove_folder(path: Path) -> None:
    """Delete a folder, under a name that nothing takes for a checkpoint from the first moment on."""
    doomed = path
    if not path.name.startswith(TEMPORARY_PREFIX):
        doomed = path.rename(path.with_name(f"{TEMPORARY_PREFIX}removed-{path.name}"))
    shutil.rmtree(doomed)


def _step_of(path: Path) -> int | None:
    """The step that a folder's name says."""
    replaced = _REPLACED_NAME.fullmatch(path.name)
    match = _STEP_NAME.fullmatch(replaced.group(1) if replaced else path.name)
    return int(match.group(1)) if match else None


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


@dataclass(frozen=True)
class Retention:
    """Which complete checkpoints are kept; one that any rule keeps stays.

    Attributes:
        last: the newest so many; 0: all.
        every: those whose step is a multiple of this; 0: none.
        best: so many of the lowest validation loss, among those saved at a step that was validated.
    """

    last: int
    every: int = 0
    best: int = 0

    def expired(
        self, checkpoints: Sequence[CheckpointInfo], validation_loss: Callable[[CheckpointInfo], float]
    ) -> list[CheckpointInfo]:
        """Those that no rule keeps, oldest first.

        Args:
            checkpoints: all of a run, oldest first.
            validation_loss: of a checkpoint; NaN where there is none.
        """
        if self.last < 1:
            return []
        kept = set(checkpoints[-self.last :])
        if self.every:
            kept |= {info for info in checkpoints if info.step % self.every == 0}
        if self.best:
            losses = {info: validation_loss(info) for info in checkpoints}
            # Of equals the later one, which has seen more.
            ranked = sorted(checkpoints, key=lambda info: (losses[info], -info.step))
            kept |= set([info for info in ranked if math.isfinite(losses[info])][: self.best])
        return [info for info in checkpoints if info not in kept]


def prune(folder: Path, retention: Retention) -> None:
    """Delete the complete checkpoints that need not be kept."""
    for info in retention.expired(complete_checkpoints(folder), _validation_loss):
        remove_folder(info.path)


def _validation_loss(info: CheckpointInfo) -> float:
    validation = read_manifest(info.path).training.get("validation") or {}
    return float(validation.get("val_loss", math.nan))
