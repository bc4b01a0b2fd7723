"""Where a run starts from: nothing, its own newest checkpoint, a given one, or another run's weights. No torch.

The launcher asks before any rank starts, so that a path that does not load costs nobody a node.
"""

from __future__ import annotations

import json
import platform
import time
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from megalm.checkpoint.manifest import COMPLETE_FILE, Manifest, read_manifest
from megalm.checkpoint.store import (
    CHECKPOINTS_FOLDER,
    TEMPORARY_PREFIX,
    CheckpointInfo,
    checkpoints_set_aside,
    complete_checkpoints,
    describe_torn,
    find_latest,
    locate,
    torn_checkpoints,
)
from megalm.config.parse import config_to_dict, default_dict
from megalm.config.schema import Config, Model
from megalm.config.violation import format_value
from megalm.errors import CheckpointError
from megalm.runs.folder import METRICS_FILE

RESUMED_FROM = "resumed_from"
"""Where a manifest's ``training`` says which named checkpoint the run went on from."""

_VISIBLE_SECONDS = 120.0
"""Longest that a rank waits to see what rank 0 has seen: NFS shows new names when its caches expire."""


class StartMode(StrEnum):
    """What is loaded before the first step."""

    FRESH = "fresh"
    """Nothing: initial weights."""
    RESUME = "resume"
    """Everything: weights, moments, progress and data position."""
    INIT_FROM = "init_from"
    """Weights alone; optimizer, progress and data start anew."""
    FINETUNE = "finetune"
    """Weights, for a new phase of data; optimizer and progress start anew."""


@dataclass(frozen=True)
class StartPoint:
    """Where a run starts.

    Attributes:
        mode: what is loaded.
        path: the checkpoint; None for a fresh start.
        step: steps already taken.
        notes: what the user should know, one line each: torn checkpoints, steps that are lost.
        is_named: whether ``checkpoint.resume`` names the checkpoint, and it is where the run goes on from.
        extends_vocab: whether the model has more words than the checkpoint, whose embeddings get rows for them.
    """

    mode: StartMode
    path: Path | None = None
    step: int = 0
    notes: tuple[str, ...] = ()
    is_named: bool = False
    extends_vocab: bool = False

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> StartPoint:
        """What ``dataclasses.asdict`` made, after a journey as JSON."""
        path = fields["path"]
        return cls(
            mode=StartMode(fields["mode"]),
            path=None if path is None else Path(path),
            step=fields["step"],
            notes=tuple(fields["notes"]),
            is_named=fields["is_named"],
            extends_vocab=fields["extends_vocab"],
        )


def await_visible(start: StartPoint) -> None:
    """Wait until this host sees the checkpoint that was chosen on another one.

    Raises:
        CheckpointError: it does not appear.
    """
    if start.path is None:
        return
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while not (start.path / COMPLETE_FILE).is_file():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{start.path}: {platform.node()} does not see it, and another host does; checkpoints must be on a "
                "file system that all ranks share"
            )
        time.sleep(0.5)


def run_folder(config: Config) -> Path:
    """The folder of a run."""
    return Path(config.run.dir) / config.run.name


def resolve_start(config: Config, run_dir: Path) -> StartPoint:
    """Decide where a run starts, and prove that a checkpoint it starts from is complete and fits the model.

    ``checkpoint.resume=auto`` takes the run's own newest complete checkpoint. ``init_from`` and ``finetune_from`` are
    for a run that has none yet: a requeued job must continue, not begin again. A run that was cut off before its first
    checkpoint starts over, and a note says so.

    Raises:
        CheckpointError: a given path does not load, a checkpoint does not fit the model, the run has checkpoints but
            ``resume=never`` was asked for, or none of its checkpoints is complete.
    """
    own = run_dir / CHECKPOINTS_FOLDER
    resume = config.checkpoint.resume
    latest = find_latest(own)
    if resume not in ("auto", "never"):
        start = _resume_named(config, own, locate(resume), latest)
        return replace(start, notes=(*start.notes, *_steps_again(run_dir, start.step)))
    if latest is not None:
        if resume == "never":
            raise CheckpointError(
                f"checkpoint.resume=never: run {config.run.name} has a checkpoint of step {latest.step}; resume it "
                "with checkpoint.resume=auto, or choose another run.name"
            )
        notes = (*_ignored(own), *_unused_sources(config, latest), *_steps_again(run_dir, latest.step))
        return _resume(config, latest, notes)
    torn = [path for path in torn_checkpoints(own) if not path.name.startswith(TEMPORARY_PREFIX)]
    if torn:
        raise CheckpointError(
            f"run {config.run.name}: {torn[0]} is not complete and there is no other checkpoint; remove it to train "
            "from the beginning, or choose another run.name"
        )
    if aside := checkpoints_set_aside(own):
        raise CheckpointError(
            f"run {config.run.name}: all of its checkpoints were set aside, {aside[-1]} the last; name what it is to "
            "go on from with checkpoint.resume=PATH, or choose another run.name"
        )
    notes = (*_ignored(own), *_lost_steps(config, run_dir))
    if config.checkpoint.init_from is not None:
        return _begin_with(config, StartMode.INIT_FROM, locate(config.checkpoint.init_from), notes)
    if config.checkpoint.finetune_from is not None:
        return _begin_with(config, StartMode.FINETUNE, locate(config.checkpoint.finetune_from), notes)
    return StartPoint(StartMode.FRESH, notes=notes)


def _ignored(own: Path) -> tuple[str, ...]:
    return tuple(f"ignored {path}: {describe_torn(path)}" for path in torn_checkpoints(own))


def _resume_named(config: Config, own: Path, named: CheckpointInfo, latest: CheckpointInfo | None) -> StartPoint:
    """Go back, or over, to a named checkpoint; once the run has saved since, go on from there instead.

    A requeued job repeats its command, and must not begin at the named checkpoint every time. Checkpoints of the run
    after the named step belong to another course of it, and are going to be set aside.
    """
    if latest is not None and latest.step > named.step:
        origin = read_manifest(latest.path).training.get(RESUMED_FROM) or {}
        if origin.get("checkpoint") == str(named.path.resolve()):
            note = f"checkpoint.resume={named.path}: the run has gone on from there to step {latest.step}"
            return _resume(config, latest, (*_ignored(own), note))
    later = [info for info in complete_checkpoints(own) if info.step > named.step]
    notes = tuple(f"{info.path} is set aside: the run goes back to step {named.step}" for info in later)
    start = _resume(config, named, (*_ignored(own), *notes))
    return replace(start, is_named=True)


def _unused_sources(config: Config, latest: CheckpointInfo) -> tuple[str, ...]:
    """What a run that has checkpoints of its own does not start from."""
    return tuple(
        f"checkpoint.{name}={source}: was for the beginning; the run goes on from its own step {latest.step}"
        for name in ("init_from", "finetune_from")
        if (source := getattr(config.checkpoint, name)) is not None
    )


def _resume(config: Config, info: CheckpointInfo, notes: tuple[str, ...]) -> StartPoint:
    manifest = read_manifest(info.path)
    if manifest.weights_only:
        raise CheckpointError(
            f"{info.path}: converted weights, without optimizer and position in the data: no run can be resumed from "
            f"them; begin one with another run.name and checkpoint.init_from={info.path}"
        )
    _check_model(config, manifest, info.path, except_for=_changeable(config) - {"init_std"})
    return StartPoint(StartMode.RESUME, info.path, manifest.step, notes)


def _begin_with(config: Config, mode: StartMode, info: CheckpointInfo, notes: tuple[str, ...]) -> StartPoint:
    """A new run with a checkpoint's weights; what of the model may differ from it is said, the rest is refused."""
    manifest = read_manifest(info.path)
    adaptable = _changeable(config)
    _check_model(config, manifest, info.path, except_for=adaptable)
    if mode is StartMode.FINETUNE:
        _check_phase(config, manifest, info.path)
    saved = _saved_model(manifest)
    mine = config_to_dict(config)["model"]
    changed = [
        f"model.{name}={mine[name]}: {info.path} was trained with {saved.get(name)}; this run trains with its own "
        f"{mine[name]} (model.{name}={saved.get(name)} keeps the other)"
        for name in sorted(adaptable)
        if saved.get(name) != mine[name]
    ]
    return StartPoint(mode, info.path, 0, (*notes, *changed))


def _changeable(config: Config) -> frozenset[str]:
    """Fields of a model that may differ from those of the weights that are loaded."""
    return _ADAPTABLE | (_ADAPTABLE_ROTARY if config.model.position == "rotary" else frozenset())


ARCHITECTURE = "architecture"
"""Where a manifest's ``training`` names the Hugging Face architecture that its weights were converted from."""

_ADAPTABLE = frozenset({"dropout", "attention_dropout", "init_std"})
"""Fields of a model that a run with another's weights may set otherwise: no weight and no output depends on them."""

_ADAPTABLE_ROTARY = frozenset(
    {
        "sequence_length",
        "rotary_scaling",
        "rotary_factor",
        "rotary_original_length",
        "rotary_low_frequency_factor",
        "rotary_high_frequency_factor",
        "rotary_beta_fast",
        "rotary_beta_slow",
    }
)
"""And of rotary positions: how a trained context is stretched, which further training is for."""


def _check_phase(config: Config, manifest: Manifest, path: Path) -> None:
    """Fine-tuning reads a phase of its own, so that its samples are not those that the weights have seen."""
    phases = manifest.data.get("phases") or []
    last = max((int(phase["number"]) for phase in phases), default=-1)
    if config.data.phase <= last:
        raise CheckpointError(
            f"data.phase={config.data.phase}: {path} was trained in phase {last} already; data.phase={last + 1} begins "
            "the phase to fine-tune in (checkpoint.init_from starts anew in any)"
        )


def _check_model(config: Config, manifest: Manifest, path: Path, *, except_for: frozenset[str] = frozenset()) -> None:
    """Every field of the model must be what the checkpoint was trained with; all differences are named.

    A resumed run may be trained anew under another name; weights that a new run begins with are as they are.
    """
    saved = _saved_model(manifest)
    different = {
        name: value
        for name, value in config_to_dict(config)["model"].items()
        if name != "vocab_size" and name not in except_for and saved.get(name) != value
    }
    vocab_size, is_fixed = config.model.vocab_size, not config.checkpoint.extend_vocab
    if vocab_size is not None and is_fixed and saved.get("vocab_size") not in (None, vocab_size):
        different["vocab_size"] = vocab_size
    if not different:
        return
    sources = ("init_from", "finetune_from")
    source = next((name for name in sources if except_for and getattr(config.checkpoint, name) is not None), None)
    whole = " ".join(f"model.{name}={format_value(saved.get(name))}" for name in different)
    problems = [
        f"model.{name}={format_value(value)}: {path} was trained with {format_value(saved.get(name))}; set "
        f"model.{name}={format_value(saved.get(name))}{'' if source else ', or choose another run.name'}"
        for name, value in different.items()
    ]
    if source:
        problems.append(
            f"checkpoint.{source}={getattr(config.checkpoint, source)}: weights of another model; give its settings, "
            f"{whole}, or leave checkpoint.{source} out"
        )
    raise CheckpointError("\n".join(problems))


def _saved_model(manifest: Manifest) -> dict[str, Any]:
    """The model that a checkpoint was trained with, field by field; those that its megalm had not, as they default."""
    return default_dict(Model) | manifest.config.get("model", {})


def _lost_steps(config: Config, run_dir: Path) -> tuple[str, ...]:
    """A note if the run has trained before but saved nothing."""
    last = _last_recorded_step(run_dir)
    if last == 0:
        return ()
    return (f"run {config.run.name} was cut off at step {last}, before its first checkpoint: it starts over at step 0",)


def _steps_again(run_dir: Path, step: int) -> tuple[str, ...]:
    """A note if the run had trained beyond the checkpoint that it resumes from."""
    lost = _last_recorded_step(run_dir) - step
    if lost <= 0:
        return ()
    again = f"{lost} steps after it are computed again" if lost > 1 else "1 step after it is computed again"
    return (f"resumed at step {step}, {again}",)


def _last_recorded_step(run_dir: Path) -> int:
    """The last step in the run's record; 0: none."""
    metrics = run_dir / METRICS_FILE
    if not metrics.is_file():
        return 0
    last = 0
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            last = max(last, int(json.loads(line).get("step", 0)))
        except (ValueError, AttributeError):
            continue  # a torn last line
    return last
