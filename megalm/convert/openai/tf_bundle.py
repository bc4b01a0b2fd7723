"""Reads TensorFlow's tensor bundles (``model.ckpt.index`` and ``model.ckpt.data-00000-of-00001``) without TensorFlow.

The index is a sorted table of blocks, as LevelDB has them: a footer names the block of blocks, each block holds keys
that share prefixes, and ends with a type and a checksum. Its values are protocol buffers that say in which data file,
where, and as what a tensor lies. From TensorFlow's ``core/lib/io/table_format.txt``,
``core/protobuf/tensor_bundle.proto`` and ``core/util/tensor_bundle``. The files are validated: every length and
offset is checked against the file before it is used, and the checksums of blocks and tensors are compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megalm.convert.openai.crc32c import crc32c
from megalm.convert.untrusted.safe_path import safe_file
from megalm.errors import CheckpointError

DTYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 9: torch.int64, 14: torch.bfloat16, 19: torch.float16}
"""TensorFlow's numbers of dtypes ▶ torch's; others are listed and not read."""

_MAGIC = 0xDB4775248B80FB57
_FOOTER_BYTES = 48
_TRAILER_BYTES = 5
"""After each block: its compression, and a checksum."""

_LARGEST_INDEX = 1 << 28
"""Bytes; TensorFlow's own largest models have some hundred KiB."""


@dataclass(frozen=True)
class Entry:
    """What the index says of a tensor.

    Attributes:
        dtype: TensorFlow's number of it.
        shape: its dims.
        shard: number of the data file.
        offset: first byte there.
        size: bytes.
        checksum: of the bytes, as TensorFlow masks it; None: the index has none.
        slices: whether it is stored in parts, under other names.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    checksum: int | None
    slices: bool


class TensorBundle:
    """A bundle, opened for reading: its index has been read and checked, and no tensor.

    Args:
        prefix: path of the bundle's files up to ``.index``.

    Raises:
        CheckpointError: a file is missing, damaged, not what it says, or a link to elsewhere.
    """

    def __init__(self, prefix: Path) -> None:
        self.index = safe_file(prefix.parent, f"{prefix.name}.index")
        table = _read_table(self.index)
        shards = _read_header(self.index, table.get(b"", b""))
        names = (f"{prefix.name}.data-{shard:05d}-of-{shards:05d}" for shard in range(shards))
        self._files = [safe_file(prefix.parent, name) for name in names]
        sizes = [_size_of(file) for file in self._files]
        self.entries = {_text(key): _read_entry(self.index, key, value) for key, value in table.items() if key}
        for name, entry in self.entries.items():
            self._check(name, entry, sizes)

    def read(self, name: str) -> Tensor:
        """One tensor, its checksum compared.

        Raises:
            CheckpointError: it has a dtype that is not read, is stored in parts, or its bytes are damaged.
        """
        entry = self.entries[name]
        file = self._files[entry.shard]
        if entry.dtype not in DTYPES or entry.slices:
            what = "in parts (a partitioned variable)" if entry.slices else f"as TensorFlow's dtype {entry.dtype}"
            raise CheckpointError(f"{self.index}: {name} is stored {what}, which is not converted")
        try:
            data = np.fromfile(file, np.uint8, entry.size, offset=entry.offset)
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
        if data.size != entry.size:
            raise CheckpointError(f"{file}: ends within {name}; it was cut off")
        if entry.checksum is not None and _masked(crc32c(data)) != entry.checksum:
            raise CheckpointError(f"{file}: the bytes of {name} are damaged: their checksum is another; copy it again")
        return torch.from_numpy(data).view(DTYPES[entry.dtype]).view(entry.shape)

    def _check(self, name: str, entry: Entry, sizes: list[int]) -> None:
        """An entry lies in its file, and is as long as its shape says."""
        if entry.shard >= len(sizes):
            raise CheckpointError(f"{self.index}: {name} is in data file {entry.shard} of {len(sizes)}")
        if entry.offset + entry.size > sizes[entry.shard]:
            raise CheckpointError(
                f"{self._files[entry.shard]}: {sizes[entry.shard]:,} bytes, and {name} is at {entry.offset:,} + "
                f"{entry.size:,}; the file was cut off, or is another checkpoint's"
            )
        dtype = DTYPES.get(entry.dtype)
        if dtype is not None and not entry.slices and prod(entry.shape) * dtype.itemsize != entry.size:
            raise CheckpointError(
                f"{self.index}: {name}: {entry.size:,} bytes are not a tensor {list(entry.shape)} of {dtype}"
            )


def _masked(checksum: int) -> int:
    """As TensorFlow stores it, so that checksums of data with checksums in it are no special values."""
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _size_of(file: Path) -> int:
    try:
        if not file.is_file():
            raise CheckpointError(f"{file}: missing; the index names it")
        return file.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None


def _read_table(index: Path) -> dict[bytes, bytes]:
    """All keys and values."""
    if not index.is_file():
        raise CheckpointError(f"{index}: no such file")
    if _size_of(index) > _LARGEST_INDEX:
        raise CheckpointError(f"{index}: {_size_of(index):,} bytes; no index of a bundle is that large")
    data = index.read_bytes()
    if len(data) < _FOOTER_BYTES or int.from_bytes(data[-8:], "little") != _MAGIC:
        raise CheckpointError(f"{index}: no whole index of a TensorFlow checkpoint: it does not end as one")
    footer = _Bytes(index, data[-_FOOTER_BYTES:-8])
    footer.varint(), footer.varint()  # a block of nothing that matters here
    found: dict[bytes, bytes] = {}
    for _, handle in _entries(index, _block(index, data, footer.varint(), footer.varint())):
        place = _Bytes(index, handle)
        for key, value in _entries(index, _block(index, data, place.varint(), place.varint())):
            if key in found:
                raise CheckpointError(f"{index}: damaged: {key[:200]!r} comes twice")
            found[key] = value
    return found


def _block(index: Path, data: bytes, offset: int, size: int) -> bytes:
    """One block, its checksum compared."""
    end = offset + size
    if end + _TRAILER_BYTES > len(data) - _FOOTER_BYTES:
        raise CheckpointError(f"{index}: damaged: a block at {offset:,} + {size:,} of {len(data):,} bytes")
    if _masked(crc32c(data[offset : end + 1])) != int.from_bytes(data[end + 1 : end + _TRAILER_BYTES], "little"):
        raise CheckpointError(f"{index}: damaged: the checksum of the block at {offset:,} is another; copy it again")
    if data[end]:
        raise CheckpointError(f"{index}: a block is compressed (type {data[end]}), as TensorFlow's saver never does")
    return data[offset:end]


def _entries(index: Path, block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block; each key takes its beginning from the one before."""
    restarts = int.from_bytes(block[-4:], "little")
    end = len(block) - 4 * (restarts + 1)
    if len(block) < 4 or end < 0:
        raise CheckpointError(f"{index}: damaged: a block with {restarts:,} restarts in {len(block):,} bytes")
    reader, key = _Bytes(index, block[:end]), b""
    while reader.left:
        shared, unshared, length = reader.varint(), reader.varint(), reader.varint()
        if shared > len(key):
            raise CheckpointError(f"{index}: damaged: a key shares {shared:,} bytes with one of {len(key):,}")
        key = key[:shared] + reader.take(unshared)
        yield key, reader.take(length)


class _Bytes:
    """Some bytes of the index, read from the start."""

    def __init__(self, index: Path, data: bytes) -> None:
        self._index, self._data, self._at = index, data, 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        """The next so many bytes."""
        if count > self.left:
            raise CheckpointError(f"{self._index}: damaged: {count:,} bytes are due where {self.left:,} are left")
        self._at += count
        return self._data[self._at - count : self._at]

    def varint(self) -> int:
        """An unsigned number of up to 64 bits, seven to a byte."""
        value = 0
        for place in range(10):
            (byte,) = self.take(1)
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                break
        else:
            raise CheckpointError(f"{self._index}: damaged: a number of more than 64 bits")
        if value >= 1 << 64:
            raise CheckpointError(f"{self._index}: damaged: a number of more than 64 bits")
        return value

    def fields(self) -> Iterator[tuple[int, int | bytes]]:
        """Fields of a protocol buffer: numbers, and values as they are on the wire."""
        while self.left:
            tag = self.varint()
            kind = tag & 7
            if kind == 0:
                yield tag >> 3, self.varint()
            elif kind == 2:
                yield tag >> 3, self.take(self.varint())
            elif kind in (1, 5):
                yield tag >> 3, int.from_bytes(self.take(8 if kind == 1 else 4), "little")
            else:
                raise CheckpointError(f"{self._index}: damaged: a field of wire type {kind}")


def _number(index: Path, fields: Mapping[int, int | bytes], field: int) -> int:
    value = fields.get(field, 0)
    if not isinstance(value, int) or value >= 1 << 63:
        raise CheckpointError(f"{index}: damaged: field {field} is no number from 0 to 2^63")
    return value


def _read_header(index: Path, value: bytes) -> int:
    """Data files, from ``BundleHeaderProto``: 1 num_shards, 2 endianness."""
    fields = dict(_Bytes(index, value).fields())
    shards = _number(index, fields, 1)
    if not 1 <= shards <= 99_999:
        raise CheckpointError(f"{index}: damaged: {shards:,} data files")
    if _number(index, fields, 2):
        raise CheckpointError(f"{index}: written on a big-endian machine, which is not converted")
    return shards


def _read_entry(index: Path, key: bytes, value: bytes) -> Entry:
    """``BundleEntryProto``: 1 dtype, 2 shape, 3 shard_id, 4 offset, 5 size, 6 crc32c, 7 slices."""
    fields = dict(_Bytes(index, value).fields())
    shape = fields.get(2, b"")
    if not isinstance(shape, bytes):
        raise CheckpointError(f"{index}: damaged: the shape of {key[:200]!r}")
    return Entry(
        dtype=_number(index, fields, 1),
        shape=tuple(_read_shape(index, shape)),
        shard=_number(index, fields, 3),
        offset=_number(index, fields, 4),
        size=_number(index, fields, 5),
        checksum=_number(index, fields, 6) if 6 in fields else None,
        slices=7 in fields,
    )


def _read_shape(index: Path, value: bytes) -> Iterator[int]:
    """``TensorShapeProto``: 2 dim, each with 1 size."""
    for field, dim in _Bytes(index, value).fields():
        if field == 2 and isinstance(dim, bytes):
            yield _number(index, dict(_Bytes(index, dim).fields()), 1)


def _text(key: bytes) -> str:
    try:
        return key.decode("utf-8")
    except UnicodeDecodeError:  # a part of a partitioned variable: its name is followed by where it lies
        return repr(key)


def find_bundle(folder: Path) -> Path:
    """The prefix of a folder's bundle: what its file ``checkpoint`` names, or the only one.

    Raises:
        CheckpointError: there is none, or several, or the file names one elsewhere.
    """
    state = safe_file(folder, "checkpoint")
    try:
        text = state.read_text(encoding="utf-8") if state.is_file() else ""
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{state}: cannot be read: {error}") from None
    named = re.search(r'^model_checkpoint_path: "((?:[^"\\]|\\.)*)"', text, re.MULTILINE)
    if named:
        name = named[1]
        if not name or Path(name).name != name or name in (".", ".."):
            raise CheckpointError(
                f'{state}: names {name[:200]!r}; a name beside it, such as "model.ckpt", would be right'
            )
        return folder / name
    found = sorted(folder.glob("*.index")) if folder.is_dir() else []
    if len(found) != 1:
        what = "no model.ckpt.index" if not found else f"{len(found)} files *.index and no file checkpoint"
        raise CheckpointError(
            f"{folder}: {what}; a folder of OpenAI's GPT-2 has checkpoint, model.ckpt.… and hparams.json"
        )
    return found[0].with_suffix("")


def overlapping(entries: Mapping[str, Entry]) -> list[str]:
    """Names of tensors that lie on each other, which TensorFlow never writes."""
    places = sorted((entry.shard, entry.offset, entry.size, name) for name, entry in entries.items() if entry.size)
    return [
        second[3] for first, second in pairwise(places) if first[0] == second[0] and first[1] + first[2] > second[1]
    ]
