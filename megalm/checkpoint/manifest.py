"""``manifest.json``: what a checkpoint holds and where each part of each full tensor lies. No torch, no pickle.

A checkpoint is a folder:

    step-00000200/
        manifest.json                            this file
        rank-00000.safetensors                   the pieces that rank 0 wrote, one-dimensional
        …
        ranks-00256/rank-00256.safetensors       those of ranks 256 to 511, and so on
        COMPLETE                                 written last; holds the manifest's sha256

What a piece is says ``pieces.py``, and how they are written ``columns.py``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from megalm.checkpoint.columns import check_seals, cuts_from_fields, is_fingerprint, tensor_from_fields
from megalm.checkpoint.pieces import Piece, TensorRecord
from megalm.errors import CheckpointError
from megalm.mesh.slices import Cut, ShardSpec

FORMAT = "megalm-checkpoint"
VERSION = 5
READABLE_VERSIONS = (2, 3, 4, 5)
"""Version 2 has no fingerprints; 2 and 3 slice along one dim, and all that they hold is trained; up to 4 there is an
object for each piece, and no fingerprint of moments."""
MANIFEST_FILE = "manifest.json"
COMPLETE_FILE = "COMPLETE"
_FOLDER = re.compile(r"ranks-\d{5,}")


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

    @property
    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by name."""
        return {name: record.shape for name, record in self.tensors.items()}

    @property
    def kinds(self) -> list[str]:
        """What is stored of tensors."""
        return sorted({kind for record in self.tensors.values() for kind in record.kinds})

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


def to_json(fields: Mapping[str, Any]) -> str:
    """Text of ``manifest.json``: a line for each field and each tensor, for people who search."""
    fields = {"format": FORMAT, "version": VERSION, **fields}
    lines = [f"{_compact(name)}:{_compact(value)}" for name, value in fields.items() if name != "tensors"]
    tensors = ",\n".join(f"{_compact(name)}:{_compact(tensor)}" for name, tensor in fields["tensors"].items())
    return "{" + ",\n".join([*lines, f'"tensors":{{\n{tensors}\n}}']) + "}\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a complete checkpoint.

    Raises:
        CheckpointError: incomplete, damaged, or of a version that this megalm does not read.
    """
    return parse_manifest(read_text(folder), folder / MANIFEST_FILE)


def read_text(folder: Path) -> str:
    """The text of the manifest of a complete checkpoint, as it was written.

    Raises:
        CheckpointError: the checkpoint is incomplete, or the text has changed.
    """
    path = folder / MANIFEST_FILE
    if not (folder / COMPLETE_FILE).is_file():
        raise CheckpointError(f"{folder}: not a complete checkpoint (no {COMPLETE_FILE} file, which is written last)")
    try:
        text = path.read_text(encoding="utf-8")
        expected = (folder / COMPLETE_FILE).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if hashlib.sha256(text.encode()).hexdigest() != expected:
        raise CheckpointError(f"{path}: changed since the checkpoint was completed; use another checkpoint")
    return text


def parse_manifest(text: str, path: Path, *, checked: bool = False) -> Manifest:
    """Build a manifest from untrusted JSON.

    Args:
        text: of the file.
        path: for messages.
        checked: whether another rank has parsed the same text: then pieces are made where one is asked for, unchecked.

    Raises:
        CheckpointError: naming what does not fit.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    return manifest_of(fields, path, checked=checked)


def manifest_of(fields: Any, path: Path, *, checked: bool = False) -> Manifest:
    """As :func:`parse_manifest`, of what the text says."""
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not the manifest of a {FORMAT}")
    if fields.get("version") not in READABLE_VERSIONS:
        readable = ", ".join(map(str, READABLE_VERSIONS))
        raise CheckpointError(f"{path}: format version {fields.get('version')}; this megalm reads versions {readable}")
    try:
        tensors = _parse_tensors(fields, path, checked=checked)
        plain = {name: fields[name] for name in Manifest.__dataclass_fields__ if name != "tensors"}
        manifest = Manifest(tensors=tensors, **plain)
        valid = _is_count(manifest.step) and all(
            isinstance(part, dict) for part in (manifest.config, manifest.topology, manifest.data, manifest.training)
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: incomplete or damaged ({error!r})") from None
    if not valid:
        raise CheckpointError(f"{path}: incomplete or damaged (a field has the wrong type)")
    return manifest


def _parse_tensors(fields: dict[str, Any], path: Path, *, checked: bool) -> dict[str, TensorRecord]:
    version = fields["version"]
    if version > 4:
        table, seals, found = [cuts_from_fields(cuts) for cuts in fields["cuts"]], fields["seals"], {}
        check_seals(seals)
        for name, tensor in fields["tensors"].items():
            try:
                found[name] = tensor_from_fields(name, tensor, table, seals, checked=checked)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise CheckpointError(f"{path}: tensor {name}: incomplete or damaged ({error})") from None
        return found
    tensors = {name: _parse_tensor(record, version) for name, record in fields["tensors"].items()}
    for name, record in tensors.items():
        slices: dict[tuple[Cut, ...], int] = {}
        for piece in record.pieces:
            _check_piece(path, name, record, piece, slices)
    return tensors


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse_tensor(record: dict[str, Any], version: int) -> TensorRecord:
    pieces = tuple(_parse_piece(piece if version > 3 else _with_cuts(piece)) for piece in record["pieces"])
    shape = tuple(record["shape"])
    if not all(map(_is_count, shape)):
        raise ValueError(f"shape {list(shape)}")
    fingerprint = record.get("fingerprint")
    if fingerprint is not None and not is_fingerprint(fingerprint):
        raise ValueError(f"fingerprint {fingerprint!r}")
    trainable = record["trainable"] if version > 3 else True
    if not isinstance(trainable, bool):
        raise ValueError(f"trainable {trainable!r}")
    return TensorRecord(shape, pieces, fingerprint, trainable)


def _parse_piece(fields: dict[str, Any]) -> Piece:
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
    *folders, file = PurePosixPath(piece.file).parts or ("",)
    inside = not folders or (len(folders) == 1 and _FOLDER.fullmatch(folders[0]))
    if not inside or "/".join((*folders, file)) != piece.file or file in ("", ".", ".."):
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


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
