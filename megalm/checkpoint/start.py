"""Where a run starts from: nothing, its own newest checkpoint, a given one, or another run's weights. No torch.

The launcher asks before any rank starts, so that a path that does not load costs nobody a node.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from megalm.checkpoint.manifest import Manifest, read_manifest
from megalm.checkpoint.store import (
    CHECKPOINTS_FOLDER,
    TEMPORARY_PREFIX,
    CheckpointInfo,
    find_latest,
    locate,
    torn_checkpoints,
)
from megalm.config.parse import config_to_dict
from megalm.config.schema import Config
from megalm.errors import CheckpointError


class StartMode(StrEnum):
    """What is loaded before the first step."""

    FRESH = "fresh"
    """Nothing: initial weights."""
    RESUME = "resume"
    """Everything: weights, moments, progress and data position."""
    INIT_FROM = "init_from"
    """Weights alone; optimizer, progress and data start anew."""


@dataclass(frozen=True)
class StartPoint:
    """Where a run starts.

    Attributes:
        mode: what is loaded.
        path: the checkpoint; None for a fresh start.
        step: steps already taken.
        notes: what the user should know, one line each: torn checkpoints, steps that are lost.
    """

    mode: StartMode
    path: Path | None = None
    step: int = 0
    notes: tuple[str, ...] = ()


def run_folder(config: Config) -> Path:
    """The folder of a run."""
    return Path(config.run.dir) / config.run.name


def resolve_start(config: Config, run_dir: Path) -> StartPoint:
    """Decide where a run starts, and prove that a checkpoint it starts from is complete and fits the model.

    ``checkpoint.resume=auto`` takes the run's own newest complete checkpoint. ``init_from`` is for a run that has none
    yet: a requeued job must continue, not begin again. A run that was cut off before its first checkpoint starts over,
    and a note says so.

    Raises:
        CheckpointError: a given path does not load, a checkpoint does not fit the model, the run has checkpoints but
            ``resume=never`` was asked for, or none of its checkpoints is complete.
    """
    own = run_dir / CHECKPOINTS_FOLDER
    resume = config.checkpoint.resume
    latest = find_latest(own)
    if resume not in ("auto", "never"):
        return _resume(config, locate(resume), ())
    if latest is not None:
        if resume == "never":
            raise CheckpointError(
                f"checkpoint.resume=never: run {config.run.name} has a checkpoint of step {latest.step}; resume it "
                "with checkpoint.resume=auto, or choose another run.name"
            )
        return _resume(config, latest, tuple(f"ignored {path}: an interrupted save" for path in torn_checkpoints(own)))
    torn = [path for path in torn_checkpoints(own) if not path.name.startswith(TEMPORARY_PREFIX)]
    if torn:
        raise CheckpointError(
            f"run {config.run.name}: {torn[0]} is not complete and there is no other checkpoint; remove it to train "
            "from the beginning, or choose another run.name"
        )
    notes = _lost_steps(config, run_dir)
    if config.checkpoint.init_from is not None:
        source = locate(config.checkpoint.init_from)
        _check_model(config, read_manifest(source.path), source.path)
        return StartPoint(StartMode.INIT_FROM, source.path, 0, notes)
    return StartPoint(StartMode.FRESH, notes=notes)


def _resume(config: Config, info: CheckpointInfo, notes: tuple[str, ...]) -> StartPoint:
    manifest = read_manifest(info.path)
    _check_model(config, manifest, info.path)
    return StartPoint(StartMode.RESUME, info.path, manifest.step, notes)


def _check_model(config: Config, manifest: Manifest, path: Path) -> None:
    """Every field of the model must be what the checkpoint was trained with; all differences are named."""
    saved = manifest.config.get("model", {})
    problems = [
        f"model.{name}={value}: {path} was trained with {saved.get(name)}; set model.{name}={saved.get(name)}, or "
        "choose another run.name"
        for name, value in config_to_dict(config)["model"].items()
        if name != "vocab_size" and saved.get(name) != value
    ]
    vocab_size = config.model.vocab_size
    if vocab_size is not None and saved.get("vocab_size") not in (None, vocab_size):
        problems.append(f"model.vocab_size={vocab_size}: {path} was trained with {saved['vocab_size']}")
    if problems:
        raise CheckpointError("\n".join(problems))


def _lost_steps(config: Config, run_dir: Path) -> tuple[str, ...]:
    """A note if the run has trained before but saved nothing."""
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        return ()
    last = 0
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            last = max(last, int(json.loads(line).get("step", 0)))
        except (ValueError, AttributeError):
            continue  # a torn last line
    if last == 0:
        return ()
    return (f"run {config.run.name} was cut off at step {last}, before its first checkpoint: it starts over at step 0",)
