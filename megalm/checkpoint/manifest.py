"""``manifest.json``: what a checkpoint holds and where each part of each full tensor lies. No torch, no pickle.

A checkpoint is a folder:

    step-00000200/
        manifest.json            this file
        rank-00000.safetensors   the pieces that rank 0 wrote, one-dimensional
        …
        COMPLETE                 written last; holds the manifest's sha256

A *piece* is a run of one rank's flattened local tensor. The local tensor is the slice of the full tensor that its
``cuts`` describe (see ``mesh.slices.ShardSpec``). Readers assemble any other slice from pieces, so a checkpoint has no
layout of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megalm.errors import CheckpointError
from megalm.mesh.slices import Cut, ShardSpec, uncovered

FORMAT = "megalm-checkpoint"
VERSION = 4
WEIGHT = "weight"
"""The kind of piece that is a parameter's master, or the parameter itself where it is not trained."""
BUFFER = "buffer"
"""The kind of piece that is state of the model and no parameter. All other kinds are state of the optimizer."""
READABLE_VERSIONS = (2, 3, 4)
"""Version 2 has no fingerprints; 2 and 3 slice along one dim, and all that they hold is trained."""
MANIFEST_FILE = "manifest.json"
COMPLETE_FILE = "COMPLETE"
_FINGERPRINT = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Piece:
    """A run of a flattened local tensor, and where it is stored.

    Attributes:
        kind: ``weight`` (fp32 master), ``exp_avg`` or ``exp_avg_sq`` (moments of Adam), ``buffer``.
        file: safetensors file, in the checkpoint's folder.
        key: name of the stored tensor in that file.
        cuts: what the local tensor keeps of the full one, by dim; none: the local tensor is the full one.
        flat_start: first element in the flattened local tensor.
        length: number of elements.
        dtype: torch's name, such as ``float32``.
        sha256: of the stored bytes.
    """

    kind: str
    file: str
    key: str
    cuts: tuple[Cut, ...]
    flat_start: int
    length: int
    dtype: str
    sha256: str


@dataclass(frozen=True)
class TensorRecord:
    """One full tensor.

    Attributes:
        shape: without padding.
        pieces: of every kind.
        fingerprint: hash of the weight that no layout changes (see ``fingerprint.py``), as 16 hexadecimal digits; None
            where the format's version has none.
        trainable: whether the run trained it; if not, there is no state of an optimizer.
    """

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    fingerprint: str | None = None
    trainable: bool = True

    def of_kind(self, kind: str) -> dict[ShardSpec, list[Piece]]:
        """Pieces of one kind by the local tensor they are runs of, each list in order."""
        found: dict[tuple[Cut, ...], list[Piece]] = defaultdict(list)
        for piece in self.pieces:
            if piece.kind == kind:
                found[piece.cuts].append(piece)
        return {
            ShardSpec(self.shape, cuts): sorted(pieces, key=lambda p: p.flat_start) for cuts, pieces in found.items()
        }

    def holes(self, kind: str) -> str | None:
        """Which part of the full tensor no piece of a kind covers, in words; None where all is covered."""
        slices = self.of_kind(kind)
        for shard, pieces in slices.items():
            end = 0
            for start, stop in [*((p.flat_start, p.flat_start + p.length) for p in pieces), (shard.local_numel,) * 2]:
                if start > end:
                    return f"elements {end} to {start} of the slice {shard}"
                end = max(end, stop)
        return uncovered(self.shape, list(slices))


@dataclass(frozen=True)
class Manifest:
    """Everything but the tensors.

    Attributes:
        megalm_version: what wrote it.
        step: optimizer steps taken.
        config: the run's config, as written to ``config.yaml``.
        topology: degrees of the layout that wrote it, and its ZeRO stage.
        data: state of the data loader.
        training: ``progress`` of the run, scalars of its ``engine``, the ``validation`` at this step if there was one,
            its ``parent`` if it began with another checkpoint's weights; or where weights were ``imported`` from.
        tensors: by layout-independent parameter name.
    """

    megalm_version: str
    step: int
    config: dict[str, Any]
    topology: dict[str, int]
    data: dict[str, Any]
    training: dict[str, Any]
    tensors: dict[str, TensorRecord]

    def to_json(self) -> str:
        """Text of ``manifest.json``."""
        return json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1) + "\n"

    @property
    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: record.shape for name, record in self.tensors.items()}

    @property
    def kinds(self) -> list[str]:
        """What is stored of tensors."""
        return sorted({piece.kind for record in self.tensors.values() for piece in record.pieces})

    @property
    def fingerprints(self) -> dict[str, int] | None:
        """Hash of each weight; None where the format's version has none."""
        found = {name: record.fingerprint for name, record in self.tensors.items()}
        return (
            {name: int(text, 16) for name, text in found.items() if text is not None} if all(found.values()) else None
        )

    @property
    def weights_only(self) -> bool:
        """Whether no run can continue from here: weights that were converted have no optimizer and no position."""
        return "progress" not in self.training


def combined_hash(fingerprints: Mapping[str, int]) -> str:
    """One hash of all weights' fingerprints, 16 hexadecimal digits: what a person compares."""
    lines = "".join(f"{name} {fingerprints[name]:016x}\n" for name in sorted(fingerprints))
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a complete checkpoint.

    Raises:
        CheckpointError: incomplete, damaged, or of a version that this megalm does not read.
    """
    path = folder / MANIFEST_FILE
    if not (folder / COMPLETE_FILE).is_file():
        raise CheckpointError(f"{folder}: not a complete checkpoint (no {COMPLETE_FILE} file, which is written last)")
    try:
        text = path.read_text(encoding="utf-8")
        fields = json.loads(text)
        expected = (folder / COMPLETE_FILE).read_text(encoding="utf-8").strip()
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if hashlib.sha256(text.encode()).hexdigest() != expected:
        raise CheckpointError(f"{path}: changed since the checkpoint was completed; use another checkpoint")
    return parse_manifest(fields, path)


def parse_manifest(fields: Any, path: Path) -> Manifest:
    """Build a manifest from untrusted JSON; ``path`` is for messages.

    Raises:
        CheckpointError: naming what does not fit.
    """
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not the manifest of a {FORMAT}")
    if fields.get("version") not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise CheckpointError(f"{path}: format version {fields.get('version')}; this megalm reads versions {readable}")
    try:
        tensors = {name: _parse_tensor(record, fields["version"]) for name, record in fields["tensors"].items()}
        plain = {name: fields[name] for name in Manifest.__dataclass_fields__ if name != "tensors"}
        manifest = Manifest(tensors=tensors, **plain)
        valid = _is_count(manifest.step) and all(
            isinstance(part, dict) for part in (manifest.config, manifest.topology, manifest.data, manifest.training)
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: incomplete or damaged ({error!r})") from None
    if not valid:
        raise CheckpointError(f"{path}: incomplete or damaged (a field has the wrong type)")
    for name, record in tensors.items():
        slices: dict[tuple[Cut, ...], int] = {}
        for piece in record.pieces:
            _check_piece(path, name, record, piece, slices)
    return manifest


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse_tensor(record: dict[str, Any], version: int) -> TensorRecord:
    pieces = tuple(parse_piece(piece if version > 3 else _with_cuts(piece)) for piece in record["pieces"])
    shape = tuple(record["shape"])
    if not all(map(_is_count, shape)):
        raise ValueError(f"shape {list(shape)}")
    fingerprint = record.get("fingerprint")
    if fingerprint is not None and not _FINGERPRINT.fullmatch(fingerprint):
        raise ValueError(f"fingerprint {fingerprint!r}")
    trainable = record["trainable"] if version > 3 else True
    if not isinstance(trainable, bool):
        raise ValueError(f"trainable {trainable!r}")
    return TensorRecord(shape, pieces, fingerprint, trainable)


def parse_piece(fields: dict[str, Any]) -> Piece:
    """Build a piece from JSON that nobody has checked.

    Raises:
        KeyError, TypeError, ValueError: a field is missing, unknown, or has the wrong type.
    """
    cuts = tuple(
        Cut(cut["dim"], tuple((start, stop) for start, stop in cut["ranges"]), cut["padding"]) for cut in fields["cuts"]
    )
    piece = Piece(**{**fields, "cuts": cuts})
    counts = [piece.flat_start, piece.length]
    for cut in cuts:
        counts += [cut.dim, cut.padding, *(end for pair in cut.ranges for end in pair)]
    texts = (piece.kind, piece.file, piece.key, piece.dtype, piece.sha256)
    if not all(map(_is_count, counts)) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"a field of a piece has the wrong type: {piece}")
    return piece


def _with_cuts(piece: dict[str, Any]) -> dict[str, Any]:
    """A piece of version 2 or 3, which are cut along one dim or none, as version 4 has it."""
    fields = dict(piece)
    cut = {name: fields.pop(name) for name in ("dim", "ranges", "padding")}
    if cut["dim"] is None and (cut["ranges"] or cut["padding"]):
        raise ValueError("ranges or padding of a slice that is the whole tensor")
    return {**fields, "cuts": [] if cut["dim"] is None else [cut]}


def _check_piece(path: Path, name: str, record: TensorRecord, piece: Piece, slices: dict[tuple[Cut, ...], int]) -> None:
    """``slices``: elements of the local tensors of this tensor that were checked already."""
    where = f"{path}: tensor {name}"
    if Path(piece.file).name != piece.file or piece.file in ("", ".", ".."):
        raise CheckpointError(f"{where}: file name {piece.file!r} leaves the checkpoint's folder")
    if piece.cuts not in slices:
        try:
            slices[piece.cuts] = ShardSpec(record.shape, piece.cuts).local_numel
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from None
    if piece.flat_start + piece.length > slices[piece.cuts]:
        raise CheckpointError(
            f"{where}: elements {piece.flat_start} + {piece.length} lie outside a slice of {slices[piece.cuts]}"
        )
