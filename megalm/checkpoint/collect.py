"""What rank 0 does with the indexes of all ranks: waits for them, and makes one manifest of them. No torch.

It runs in a thread beside training, so that what it computes is linear in the pieces, and little for each of them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.checkpoint.columns import CutTable, Runs, tensor_to_fields
from megalm.checkpoint.pieces import rank_file, rank_folders
from megalm.errors import CheckpointError

INDEX_ENDING = "json"
"""Of the file in which a rank tells what it wrote."""

_SHORTEST_POLL, _LONGEST_POLL = 0.05, 1.0
"""Seconds between two looks for other ranks' indexes: a thousand ranks' file server is not asked without end."""

_MODULUS = 1 << 64
"""Of fingerprints."""


def await_indexes(folder: Path, world_size: int, given_up: Callable[[], str | None]) -> None:
    """Return when this host sees the index of every rank.

    Folders are listed one after the other, and a folder again only until it is complete: without waiting that is one
    listing for each 256 ranks.

    Raises:
        CheckpointError: ``given_up`` gave a reason to wait no longer.
    """
    pause = _SHORTEST_POLL
    for name, ranks in rank_folders(world_size):
        while _missing(folder / name, ranks):
            if reason := given_up():
                missing = [r for other, theirs in rank_folders(world_size) for r in _missing(folder / other, theirs)]
                listed = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
                raise CheckpointError(
                    f"{folder}: no index of {len(missing)} of {world_size} ranks ({listed}): {reason}"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, _LONGEST_POLL)


def _missing(folder: Path, ranks: range) -> list[int]:
    """Ranks whose index is not in their folder."""
    # One listing, which makes an NFS client ask the server again, and not a question per rank.
    present = set(os.listdir(folder)) if folder.is_dir() else set()  # noqa: PTH208 - names are all that is wanted
    return [rank for rank in ranks if Path(rank_file(rank, INDEX_ENDING)).name not in present]


@dataclass
class _Tensor:
    """What ranks say of one tensor."""

    said: list[Any]
    runs: dict[tuple[str, ...], tuple[Runs, dict[str, list[str]]]] = field(default_factory=dict)
    shares: dict[str, int] = field(default_factory=dict)


def collect(folder: Path, world_size: int) -> dict[str, Any]:
    """The fields ``cuts`` and ``tensors`` of a manifest, from the indexes of all ranks.

    Raises:
        CheckpointError: ranks disagree on a tensor.
    """
    table = CutTable()
    tensors: dict[str, _Tensor] = {}
    for rank in range(world_size):
        index = json.loads((folder / rank_file(rank, INDEX_ENDING)).read_text(encoding="utf-8"))
        cuts = [table.number(fields) for fields in index["cuts"]]
        for name, (shape, trainable, runs) in index["tensors"].items():
            tensor = tensors.setdefault(name, _Tensor([shape, trainable]))
            if tensor.said != [shape, trainable]:
                raise CheckpointError(
                    f"{name}: ranks disagree on its shape and whether it is trained: {tensor.said}, "
                    f"{[shape, trainable]}"
                )
            for cut, start, length, kinds in runs:
                _add(tensor, rank, cuts[cut], start, length, kinds)
    return {"cuts": table.fields, "tensors": {name: _fields(tensors[name]) for name in sorted(tensors)}}


def _add(tensor: _Tensor, rank: int, cut: int, start: int, length: int, kinds: dict[str, tuple[str, int]]) -> None:
    columns, digests = tensor.runs.setdefault(tuple(kinds), (Runs(), {kind: [] for kind in kinds}))
    columns.ranks.append(rank)
    columns.cuts.append(cut)
    columns.starts.append(start)
    columns.lengths.append(length)
    for kind, (digest, share) in kinds.items():
        digests[kind].append(digest)
        tensor.shares[kind] = tensor.shares.get(kind, 0) + share


def _fields(tensor: _Tensor) -> dict[str, Any]:
    for columns, digests in tensor.runs.values():
        columns.sha256 = {kind: "".join(parts) for kind, parts in digests.items()}
    fingerprints = {kind: f"{share % _MODULUS:016x}" for kind, share in tensor.shares.items()}
    shape, trainable = tensor.said
    return tensor_to_fields(shape, fingerprints, [columns for columns, _ in tensor.runs.values()], trainable=trainable)
