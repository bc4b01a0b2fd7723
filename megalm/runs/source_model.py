"""The model of the run whose weights another begins with, so that a command need not name it again. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalm.checkpoint.manifest import read_manifest
from megalm.checkpoint.store import CHECKPOINTS_FOLDER, find_latest, locate
from megalm.config.arguments import expand_home
from megalm.config.compose import Source
from megalm.errors import CheckpointError


def source_model(mapping: Mapping[str, Any]) -> Source | None:
    """The model that ``checkpoint.init_from`` or ``finetune_from`` implies: that of the checkpoint it names.

    A run that has checkpoints of its own goes on from them, and has their model: the source may be gone by then.

    Args:
        mapping: section ▶ field ▶ value, as far as they are known; values may be of any type.

    Returns:
        None where neither is set, or no complete checkpoint is there: what needs one says so later.
    """
    run, checkpoint = mapping["run"], mapping["checkpoint"]
    named = checkpoint["init_from"] or checkpoint["finetune_from"]
    if not isinstance(named, str) or not isinstance(run["dir"], str) or not isinstance(run["name"], str):
        return None
    try:
        own = find_latest(Path(expand_home(run["dir"])) / run["name"] / CHECKPOINTS_FOLDER)
        found = own or locate(expand_home(named))
        model = read_manifest(found.path).config.get("model")
    except (CheckpointError, OSError, ValueError):
        return None
    if not isinstance(model, Mapping):
        return None
    grows = own is None and checkpoint["extend_vocab"] is True
    return Source(str(found.path), {**model, "vocab_size": None} if grows else model)
