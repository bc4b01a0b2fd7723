"""What differs between two checkpoints, whatever layouts wrote them: settings, and tensors element by element."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megalm.checkpoint.manifest import Manifest
from megalm.checkpoint.pieces import BUFFER, WEIGHT
from megalm.checkpoint.reader import CheckpointReader
from megalm.mesh.slices import ShardSpec


@dataclass(frozen=True)
class SettingDifference:
    """A field of the manifest that is not the same in both; None where one does not have it."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is not the same in both.

    Attributes:
        name: of the parameter.
        kind: ``weight``, ``exp_avg`` or ``exp_avg_sq``.
        what: in words: which checkpoint lacks it, other shapes, or how many elements differ and by how much.
    """

    name: str
    kind: str
    what: str


_LABELS = (
    *("run.name", "run.dir", "megalm_version"),
    *("report.", "evaluate.", "logging.", "launch.", "cluster.", "checkpoint."),
)
"""Settings, or whole sections, that name, show, place or keep a run."""


def is_label(name: str) -> bool:
    """Whether a setting, by its dotted name, changes nothing in what a run computes."""
    return name.startswith(_LABELS)


def setting_differences(first: Manifest, second: Manifest) -> list[SettingDifference]:
    """Everything of the manifests but the tensors, field by field, by dotted names."""
    mine, theirs = _flat(_settings(first)), _flat(_settings(second))
    return [
        SettingDifference(name, mine.get(name), theirs.get(name))
        for name in dict.fromkeys([*mine, *theirs])
        if repr(mine.get(name)) != repr(theirs.get(name))  # a NaN is equal to itself here
    ]


def tensor_differences(first: CheckpointReader, second: CheckpointReader) -> Iterator[TensorDifference]:
    """Compare every tensor of every kind, in the memory of a few full tensors.

    Weights of equal fingerprints are equal and are not read; ``find_corruption`` tells whether their bytes still are.

    Raises:
        CheckpointError: a tensor that is read is damaged.
    """
    mine, theirs = first.manifest, second.manifest
    for name in dict.fromkeys([*mine.tensors, *theirs.tensors]):
        for kind in dict.fromkeys([*mine.kinds, *theirs.kinds]):
            if what := _difference(first, second, name, kind):
                yield TensorDifference(name, kind, what)


def _difference(first: CheckpointReader, second: CheckpointReader, name: str, kind: str) -> str | None:
    has = first.has(name, kind), second.has(name, kind)
    if has == (False, False):
        return None
    if not all(has):
        return "only in the first" if has[0] else "only in the second"
    mine, theirs = first.manifest.tensors[name], second.manifest.tensors[name]
    if mine.shape != theirs.shape:
        return f"{list(mine.shape)} in the first, {list(theirs.shape)} in the second"
    is_value = kind in (WEIGHT, BUFFER)
    if is_value and mine.fingerprint is not None and mine.fingerprint == theirs.fingerprint:
        return None
    whole = ShardSpec.replicated(*mine.shape)
    one, other = (reader.read_local(name, kind, whole) for reader in (first, second))
    changed = one.view(torch.int32) != other.view(torch.int32)  # NaN is what it is, and minus zero is not zero
    count = int(changed.sum())
    if not count:
        return None
    apart = (one - other)[changed].abs()
    strange = int((~apart.isfinite()).sum())
    largest = float(apart.nan_to_num(0.0, 0.0, 0.0).max())
    infinite = f", {strange:,} of them not finite" if strange else ""
    return f"{count:,} of {one.numel():,} elements, by at most {largest:.3g}{infinite}"


def _settings(manifest: Manifest) -> dict[str, Any]:
    return {
        "step": manifest.step,
        "megalm_version": manifest.megalm_version,
        "layout": manifest.topology,
        **manifest.config,
        "position": manifest.data,
        "training": manifest.training,
    }


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in mapping.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
