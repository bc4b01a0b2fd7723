"""The checkpoints of a run: which are complete, which is the newest, which may go. No torch."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megalm.checkpoint.manifest import COMPLETE_FILE, read_manifest
from megalm.errors import CheckpointError

CHECKPOINTS_FOLDER = "checkpoints"
TEMPORARY_PREFIX = ".unfinished-"
_REPLACED_SUFFIX = ".replaced"
_SET_ASIDE_SUFFIX = ".set-aside"
_REMOVED_PREFIX = f"{TEMPORARY_PREFIX}removed-"
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


def describe_torn(path: Path) -> str:
    """What a folder is that :func:`torn_checkpoints` gave."""
    return "an interrupted deletion" if path.name.startswith(_REMOVED_PREFIX) else "an interrupted save"


def remove_leftovers(folder: Path) -> list[str]:
    """Delete what saves and deletions of an earlier life left under names that no checkpoint has.

    Returns:
        What could not be deleted and why, one line each.
    """
    # A folder step-… without its marker was a checkpoint once: not ours to judge.
    return _remove_all([path for path in torn_checkpoints(folder) if _STEP_NAME.fullmatch(path.name) is None])


def set_aside(folder: Path, step: int) -> list[Path]:
    """Rename the complete checkpoints after a step, which a run that goes back to it leaves behind as another course.

    They are no checkpoints of the run any more: neither resumed nor counted among the newest.

    Returns:
        Their new names.
    """
    later = [info.path for info in complete_checkpoints(folder) if info.step > step]
    return [path.rename(path.with_name(path.name + _SET_ASIDE_SUFFIX)) for path in later]


def checkpoints_set_aside(folder: Path) -> list[Path]:
    """What :func:`set_aside` has renamed."""
    return sorted(folder.glob(f"step-*{_SET_ASIDE_SUFFIX}")) if folder.is_dir() else []


def remove_folder(path: Path) -> None:
    """Delete a folder, under a name that nothing takes for a checkpoint from the first moment on."""
    doomed = path
    if not path.name.startswith(TEMPORARY_PREFIX):
        doomed = path.rename(path.with_name(f"{_REMOVED_PREFIX}{path.name}"))
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
        best: so many of the lowest validation loss, among those saved at a step that was validated; losses on other
            samples are not compared, and of each kind so many are kept.
    """

    last: int
    every: int = 0
    best: int = 0

    def expired(
        self,
        checkpoints: Sequence[CheckpointInfo],
        validation_loss: Callable[[CheckpointInfo], float],
        validated_on: Callable[[CheckpointInfo], str] = lambda _: "",
    ) -> list[CheckpointInfo]:
        """Those that no rule keeps, oldest first.

        Args:
            checkpoints: all of a run, oldest first.
            validation_loss: of a checkpoint; NaN where there is none.
            validated_on: what it was measured on, in any words.
        """
        if self.last < 1:
            return []
        kept = set(checkpoints[-self.last :])
        if self.every:
            kept |= {info for info in checkpoints if info.step % self.every == 0}
        if self.best:
            measured = {info: validation_loss(info) for info in checkpoints}
            validated = {info: validated_on(info) for info, loss in measured.items() if math.isfinite(loss)}
            for samples in set(validated.values()):
                losses = {info: measured[info] for info, on in validated.items() if on == samples}
                # Of equals the later one, which has seen more.
                kept |= set(sorted(losses, key=lambda info: (losses[info], -info.step))[: self.best])
        return [info for info in checkpoints if info not in kept]


def prune(folder: Path, retention: Retention) -> list[str]:
    """Delete the complete checkpoints that need not be kept, and what an earlier deletion did not get to.

    Returns:
        What could not be deleted and why, one line each.
    """
    validation = cache(_validation)
    expired = retention.expired(
        complete_checkpoints(folder), lambda info: validation(info)[0], lambda info: validation(info)[1]
    )
    return _remove_all([*(info.path for info in expired), *folder.glob(f"{_REMOVED_PREFIX}*")])


def _remove_all(paths: Sequence[Path]) -> list[str]:
    problems = []
    for path in paths:
        try:
            remove_folder(path)
        except OSError as error:
            problems.append(f"{path} could not be deleted: {error.strerror or error}")
    return problems


def _validation(info: CheckpointInfo) -> tuple[float, str]:
    """Loss of the samples that are validated again and again, and which they are; NaN where there is none, or where it
    cannot be read.

    They are those of the config that the checkpoint was saved with, which may have changed since.
    """
    try:
        manifest = read_manifest(info.path)
        validation = manifest.training.get("validation") or {}
        loss = math.nan if validation.get("whole_split") else float(validation.get("val_loss", math.nan))
        train, model = manifest.config.get("train", {}), manifest.config.get("model", {})
        phases = manifest.data.get("phases") or [{}]
        samples = (train.get("validation_samples"), model.get("sequence_length"), phases[-1].get("number"))
        return loss, json.dumps([*samples, manifest.config.get("objective")])
    except (CheckpointError, TypeError, ValueError, AttributeError):
        return math.nan, ""  # a damaged one is neither the best nor a reason to keep all
