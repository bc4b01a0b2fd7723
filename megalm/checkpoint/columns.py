"""How a manifest of version 5 writes where pieces lie: few numbers, however many ranks there are. No torch.

Ranks that hold equal parts of a slice, as ZeRO's replicas do, are one *stretch* (see ``pieces.Stretch``); stretches of
one tensor are columns; cuts are numbers in a table of the whole manifest; and a file is the number of the rank that
wrote it (see ``pieces.rank_file``):

    "cuts": [[], [[0, [[0, 6288]], 0]], …],                        each a list of [dim, ranges, padding]
    "seals": "64 hexadecimal digits for each rank",
    "tensors": {
    "embedding.weight": {"shape": [50257, 12288], "trainable": true, "fingerprints": {"weight": "91f0…", …}, "runs": [
        {"kinds": ["weight", "exp_avg", "exp_avg_sq"], "cuts": [1, 2], "starts": [0, 0], "lengths": [603648, 603648],
         "ranks": [0, 1], "steps": [8, 8], "counts": [128, 128]}]},
    …}

A stored tensor's name in its file is ``KIND/NAME``, and ``KIND/NAME@START`` for all of a rank's runs of it but the
first. A file has the sha256 of each of its tensors in its own header, and the rank's *seal* is the sha256 of that text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megalm.checkpoint.pieces import BUFFER, SEAL_DIGITS, WEIGHT, Stretch, StretchedPieces, TensorRecord
from megalm.mesh.slices import Cut, ShardSpec

Cuts = tuple[Cut, ...]

_HEXADECIMAL = re.compile(r"[0-9a-f]*")
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


@dataclass
class Runs:
    """Stretches of one tensor that have the same kinds, as columns.

    Attributes:
        kinds: of pieces.
        cuts: number of each stretch's cuts in the table.
        starts, lengths, ranks, steps, counts: as of ``pieces.Stretch``.
    """

    kinds: list[str]
    cuts: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def columns(self) -> list[list[int]]:
        """All but the kinds, in the order of the fields of a stretch."""
        return [self.cuts, self.starts, self.lengths, self.ranks, self.steps, self.counts]

    def append(self, cut: int, start: int, length: int, rank: int) -> None:
        """A stretch of one piece."""
        for column, value in zip(self.columns(), (cut, start, length, rank, 1, 1), strict=True):
            column.append(value)


class CutTable:
    """Numbers for the cuts that occur, each written once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def number(self, text: str) -> int:
        """The number of cuts, which are given as JSON."""
        return self._numbers.setdefault(text, len(self._numbers))

    @property
    def texts(self) -> list[str]:
        """All cuts, as JSON, by number."""
        return list(self._numbers)


def cuts_to_json(cuts: Cuts) -> str:
    """Cuts as they are written."""
    return json.dumps([[cut.dim, cut.ranges, cut.padding] for cut in cuts], separators=(",", ":"))


def cuts_from_fields(fields: Any) -> Cuts:
    """Cuts as they were written.

    Raises:
        TypeError, ValueError: they are none.
    """
    cuts = tuple(Cut(dim, tuple((start, stop) for start, stop in ranges), padding) for dim, ranges, padding in fields)
    for cut in cuts:
        _check_counts([cut.dim, cut.padding, *(end for pair in cut.ranges for end in pair)], "a cut")
    return cuts


def is_fingerprint(text: object) -> bool:
    """Whether a text is 16 hexadecimal digits."""
    return isinstance(text, str) and _FINGERPRINT.fullmatch(text) is not None


def check_seals(seals: Any) -> None:
    """Refuse what is no seals.

    Raises:
        TypeError, ValueError: it is not 64 digits for each rank.
    """
    if len(seals) % SEAL_DIGITS or _HEXADECIMAL.fullmatch(seals) is None:
        raise ValueError(f"seals: {len(seals)} characters; {SEAL_DIGITS} hexadecimal digits for each rank")


def tensor_to_fields(
    shape: Sequence[int], fingerprints: dict[str, str], runs: Sequence[Runs], *, trainable: bool
) -> dict[str, Any]:
    """A tensor as it is written."""
    return {
        "shape": list(shape),
        "trainable": trainable,
        "fingerprints": fingerprints,
        "runs": [dict(vars(columns)) for columns in runs],
    }


def tensor_from_fields(
    name: str, fields: dict[str, Any], table: Sequence[Cuts], seals: str, *, checked: bool
) -> TensorRecord:
    """A tensor as it was written.

    Args:
        name: of the tensor.
        fields: JSON.
        table: the manifest's cuts.
        seals: of the ranks' files.
        checked: whether another rank has checked the same text.

    Raises:
        LookupError, TypeError, ValueError: what does not fit.
    """
    shape, trainable, fingerprints = tuple(fields["shape"]), fields["trainable"], fields["fingerprints"]
    blocks = [Runs(**columns) for columns in fields["runs"]]
    if not checked:
        _check_counts(shape, "shape")
        if not isinstance(trainable, bool) or not all(map(is_fingerprint, fingerprints.values())):
            raise ValueError(f"trainable {trainable!r}, fingerprints {fingerprints!r}")
        for block in blocks:
            _check(block, table, shape, len(seals) // SEAL_DIGITS)
    stretches: dict[str, list[Stretch]] = {}
    for block in blocks:
        found = [Stretch(table[cut], *rest) for cut, *rest in zip(*block.columns(), strict=True)]
        for kind in block.kinds:
            stretches[kind] = [*stretches.get(kind, ()), *found]
    value = fingerprints.get(WEIGHT, fingerprints.get(BUFFER))
    moments = {kind: text for kind, text in fingerprints.items() if kind not in (WEIGHT, BUFFER)}
    return TensorRecord(shape, StretchedPieces(name, stretches, seals), value, trainable, moments)


def _check(runs: Runs, table: Sequence[Cuts], shape: tuple[int, ...], ranks: int) -> None:
    if not all(isinstance(kind, str) for kind in runs.kinds):
        raise ValueError(f"kinds {runs.kinds!r}")
    for name, column in vars(runs).items():
        if len(column) != len(runs.ranks) and name != "kinds":
            raise ValueError(f"{len(column)} {name} of {len(runs.ranks)} runs")
        if name != "kinds":
            _check_counts(column, name)
    sizes = {number: ShardSpec(shape, table[number]).local_numel for number in set(runs.cuts)}
    for number, start, length, rank, step, count in zip(*runs.columns(), strict=True):
        if start + length * count > sizes[number]:
            raise ValueError(f"elements {start} + {count}·{length} lie outside a slice of {sizes[number]}")
        if not (step and count) or rank + step * (count - 1) >= ranks:
            raise ValueError(f"{count} ranks from {rank} on in steps of {step}: the seals are those of {ranks} ranks")


def _check_counts(values: Sequence[object], what: str) -> None:
    """Refuse what is no count; True is one to Python, and not here."""
    if not set(map(type, values)) <= {int} or min(values, default=0) < 0:  # type: ignore[type-var, operator]
        raise ValueError(f"{what}: {list(values)[:8]}: whole numbers from 0 on")
