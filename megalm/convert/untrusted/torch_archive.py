"""The zip archive of ``torch.save``: where each part lies, checked so that no two parts share bytes."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from megalm.errors import CheckpointError

_LOCAL_HEADER_BYTES = 30
"""Of a part, before its name and its extra field, whose lengths are its last four bytes."""

_LARGEST_PICKLE = 1 << 26
"""Bytes; names and settings of the largest models take a few MB, their tensors lie beside the pickle."""


@dataclass(frozen=True)
class Archive:
    """What is known of a file of ``torch.save`` before its pickle is run.

    Attributes:
        pickle: the bytes of ``data.pkl``.
        storages: keys of the storages ▶ their bytes.
    """

    pickle: bytes
    storages: dict[str, int]


@dataclass(frozen=True)
class Part:
    """A part of an archive, as its own header in the file places it.

    Attributes:
        name: in the archive.
        header: where its header begins in the file.
        offset: where its bytes begin.
        size: how many they are.
    """

    name: str
    header: int
    offset: int
    size: int


def read_archive(path: Path) -> Archive:
    """The pickle of a file of ``torch.save``, and how long the storages beside it are.

    Raises:
        CheckpointError: no such file, or not one of ``torch.save``'s of this decade; or its parts lie on each other.
    """
    parts = read_parts(path)
    root = parts[0].name.split("/", 1)[0] if parts else ""
    by_name = {part.name: part for part in parts}
    pickled = by_name.get(f"{root}/data.pkl")
    if pickled is None:
        raise CheckpointError(f"{path}: a zip file without data.pkl, which torch.save always writes")
    if pickled.size > _LARGEST_PICKLE:
        raise CheckpointError(f"{path}: its data.pkl has {pickled.size:,} bytes; at most {_LARGEST_PICKLE:,} are read")
    with path.open("rb") as file:
        file.seek(pickled.offset)
        data = file.read(pickled.size)
    start = f"{root}/data/"
    storages = {name.removeprefix(start): part.size for name, part in by_name.items() if name.startswith(start)}
    return Archive(data, storages)


def read_parts(path: Path) -> list[Part]:
    """Every part, in the archive's order; torch maps them as they are.

    Raises:
        CheckpointError: see :func:`read_archive`.
    """
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            members, end = archive.infolist(), archive.start_dir
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError(f"{path}: its parts are compressed, which torch.save never does; save it again")
        if sum(member.file_size for member in members) > size:
            raise CheckpointError(f"{path}: damaged: its parts are longer than the file")
        parts = _located(path, members)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: no whole file of torch.save, or of a torch before 1.6 ({str(error)[:200]}); take another copy, "
            "or open the old one with torch.load and save it again"
        ) from None
    _check_apart(path, parts, end)
    return parts


def _located(path: Path, members: list[zipfile.ZipInfo]) -> list[Part]:
    parts = []
    with path.open("rb") as file:
        for member in members:
            file.seek(member.header_offset + _LOCAL_HEADER_BYTES - 4)
            lengths = file.read(4)
            extra = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            offset = member.header_offset + _LOCAL_HEADER_BYTES + extra
            parts.append(Part(member.filename, member.header_offset, offset, member.file_size))
    return parts


def _check_apart(path: Path, parts: list[Part], end: int) -> None:
    """No part reaches into the next, and no name can be taken for another; torch's reader ignores case."""
    if len({part.name.lower() for part in parts}) != len(parts):
        raise CheckpointError(f"{path}: damaged: two of its parts have one name")
    ordered = sorted(parts, key=lambda part: part.header)
    limits = [second.header for _, second in pairwise(ordered)] + [end]
    for part, limit in zip(ordered, limits, strict=bool(ordered)):
        if part.offset + part.size > limit:
            raise CheckpointError(f"{path}: damaged: {part.name[:200]} reaches into what comes after it")
