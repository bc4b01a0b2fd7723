"""What rank 0 does with the indexes of all ranks: waits for them, and makes one manifest of them. No torch.

It runs in a thread beside training, so that what it computes is linear in the pieces, and little for each of them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalm.checkpoint.columns import CutTable, Runs, tensor_to_fields
from megalm.checkpoint.pieces import FINGERPRINT_MODULUS, rank_file, rank_folders
from megalm.errors import CheckpointError

INDEX_ENDING = "json"
"""Of the file in which a rank tells what it wrote."""

_SHORTEST_POLL, _LONGEST_POLL = 0.05, 1.0
"""Seconds between two looks for other ranks' indexes: a thousand ranks' file server is not asked without end."""


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
class _Found:
    """What ranks say of some kinds of one tensor.

    Attributes:
        runs: the pieces.
        shares: of fingerprints, added up, by kind.
        ends: number of the stretch that ends at an element of some cuts.
    """

    runs: Runs
    shares: list[int]
    ends: dict[tuple[int, int], int] = field(default_factory=dict)


def collect(folder: Path, world_size: int) -> dict[str, Any]:
    """The fields ``cuts``, ``seals`` and ``tensors`` of a manifest, from the indexes of all ranks (``index.py``).

    Raises:
        CheckpointError: ranks disagree on a tensor.
    """
    table, seals = CutTable(), []
    tensors: dict[str, dict[str, _Found]] = {}
    for rank in range(world_size):
        index = json.loads((folder / rank_file(rank, INDEX_ENDING)).read_text(encoding="utf-8"))
        seals.append(index["seal"])
        cuts = [table.number(text) for text in index["cuts"]]
        for tensor, kinds, shares, runs in index["runs"]:
            of_tensor = tensors.get(tensor) or tensors.setdefault(tensor, {})
            found = of_tensor.get(kinds)
            if found is None:
                found = of_tensor[kinds] = _Found(Runs(kinds.split(",")), [0] * len(shares))
            for number, share in enumerate(shares):
                found.shares[number] += share
            for at in range(0, len(runs), 3):
                _add(found.runs, found.ends, rank, cuts[runs[at]], runs[at + 1], runs[at + 2])
    return {
        "cuts": [json.loads(text) for text in table.texts],
        "seals": "".join(seals),
        "tensors": _tensors(tensors),
    }


def _add(runs: Runs, ends: dict[tuple[int, int], int], rank: int, cut: int, start: int, length: int) -> None:
    """Append a piece to the stretch that ends where it begins, if it goes on in equal steps; else begin one."""
    number = ends.pop((cut, start), None)
    if number is None or not _goes_on(runs, number, rank, length):
        number = len(runs.ranks)
        runs.append(cut, start, length, rank)
    else:
        if runs.counts[number] == 1:
            runs.steps[number] = rank - runs.ranks[number]
        runs.counts[number] += 1
    ends[cut, start + length] = number


def _goes_on(runs: Runs, number: int, rank: int, length: int) -> bool:
    if runs.lengths[number] != length:
        return False
    first, count = runs.ranks[number], runs.counts[number]
    return rank > first if count == 1 else rank == first + runs.steps[number] * count


def _tensors(said: Mapping[str, Mapping[str, _Found]]) -> dict[str, Any]:
    """The field ``tensors``, from what ranks say of each."""
    described: dict[str, tuple[list[int], bool]] = {}
    fields: dict[str, Any] = {}
    for text, found in said.items():
        name, shape, trainable = json.loads(text)
        if described.setdefault(name, (shape, trainable)) != (shape, trainable):
            raise CheckpointError(
                f"{name}: ranks disagree on its shape and whether it is trained: {described[name]}, "
                f"{(shape, trainable)}"
            )
        sums: dict[str, int] = {}
        for of_kinds in found.values():
            for kind, share in zip(of_kinds.runs.kinds, of_kinds.shares, strict=True):
                sums[kind] = sums.get(kind, 0) + share
        fingerprints = {kind: f"{share % FINGERPRINT_MODULUS:016x}" for kind, share in sums.items()}
        runs = [of_kinds.runs for of_kinds in found.values()]
        fields[name] = tensor_to_fields(shape, fingerprints, runs, trainable=trainable)
    return dict(sorted(fields.items()))
