"""``index.json``: what a folder of token shards holds. The file is written last: no index, no dataset. No torch.

A dataset is one long sequence of tokens, cut into chunks of ``chunk_tokens`` tokens that overlap by one (the label of a
chunk's last token is the first token of the next). The tail of the last chunk is padding and carries no loss.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalm.errors import DataError

FORMAT = "megalm-tokens"
VERSION = 1
INDEX_FILE = "index.json"
MEMBER_HEADER_BYTES = 512 + 128
"""Before a chunk's tokens: the tar header and the header of a version 1 ``.npy`` array."""
BLOCK_BYTES = 512
"""A tar file's members begin at multiples of this."""


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Attributes:
        name: file name, in the dataset's folder.
        chunks: members.
        bytes: size of the file.
        sha256: of the whole file.
        checks_sha256: of the file beside it that holds a crc32 per chunk.
    """

    name: str
    chunks: int
    bytes: int
    sha256: str
    checks_sha256: str

    @property
    def checks_name(self) -> str:
        """The file with this shard's crc32 values."""
        return f"{self.name}.idx.json"


@dataclass(frozen=True)
class Index:
    """Contents of ``index.json``.

    Attributes:
        dtype: ``uint16`` or ``uint32``.
        chunk_tokens: tokens per chunk, the overlapping one not counted.
        tokenizer_sha256: hash of the tokenizer's definition.
        vocab_size: token ids are below this.
        eos_id: ends every document.
        documents: number of documents.
        tokens: valid tokens; padding not counted.
        shards: the tar files, in order.
    """

    dtype: str
    chunk_tokens: int
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    documents: int
    tokens: int
    shards: tuple[Shard, ...]

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's tokens, the overlapping one included."""
        return (self.chunk_tokens + 1) * np.dtype(self.dtype).itemsize

    @property
    def stride(self) -> int:
        """Bytes from one member of a shard to the next."""
        return -(-(MEMBER_HEADER_BYTES + self.chunk_bytes) // BLOCK_BYTES) * BLOCK_BYTES

    @property
    def num_chunks(self) -> int:
        """Chunks in all shards."""
        return sum(shard.chunks for shard in self.shards)

    @property
    def labels(self) -> int:
        """Tokens that carry loss: every valid token but the first is a label."""
        return self.tokens - 1

    @cached_property
    def chunk_ends(self) -> NDArray[np.int64]:
        """For each shard, the number of chunks up to its end."""
        return np.cumsum([shard.chunks for shard in self.shards], dtype=np.int64)

    def num_sequences(self, sequence_length: int) -> int:
        """Sequences of ``sequence_length`` tokens that have at least one label."""
        return -(-self.labels // sequence_length)

    def to_json(self) -> str:
        """Text of ``index.json``."""
        contents = {**asdict(self), "shards": [asdict(shard) for shard in self.shards]}
        return json.dumps({"format": FORMAT, "version": VERSION, "stride": self.stride, **contents}, indent=1) + "\n"

    @property
    def fingerprint(self) -> str:
        """Hash of everything in the index, and so, through the shards' hashes, of every token."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def read_index(folder: Path) -> Index:
    """Read and check ``folder/index.json``.

    Raises:
        DataError: missing, half-written, or of a format or version that is not read.
    """
    path = folder / INDEX_FILE
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(_why_no_index(folder)) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}); prepare the dataset again") from None
    return _parse(contents, path)


def check_files(index: Index, folder: Path) -> None:
    """Every shard is there and has the size that the index states; contents are checked when they are read.

    Raises:
        DataError: naming every file that is missing or has another size.
    """
    problems = []
    for shard in index.shards:
        path = folder / shard.name
        for file, size in ((path, shard.bytes), (folder / shard.checks_name, None)):
            if not file.is_file():
                problems.append(f"{file}: missing; {INDEX_FILE} lists it")
            elif size is not None and file.stat().st_size != size:
                problems.append(f"{file}: {file.stat().st_size} bytes, {INDEX_FILE} says {size}: cut short or replaced")
    if problems:
        raise DataError("\n".join(problems) + f"\ncopy the files again, or prepare {folder.parent} again")


def _parse(contents: Any, path: Path) -> Index:
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise DataError(f"{path}: not the index of a {FORMAT} dataset")
    if contents.get("version") != VERSION:
        raise DataError(f"{path}: format version {contents.get('version')}; this megalm reads version {VERSION}")
    try:
        shards = tuple(Shard(**shard) for shard in contents["shards"])
        names = [name for name in Index.__dataclass_fields__ if name != "shards"]
        index = Index(shards=shards, **{name: contents[name] for name in names})
        stride = contents["stride"]
        _check_types(index)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: incomplete or damaged ({error}); prepare the dataset again") from None
    outside = [shard.name for shard in shards if Path(shard.name).name != shard.name]
    if outside:
        raise DataError(f"{path}: shard name {outside[0]!r} leaves the dataset's folder")
    if index.dtype not in ("uint16", "uint32") or stride != index.stride:
        raise DataError(f"{path}: dtype {index.dtype!r} and stride {stride} do not fit together")
    for shard in shards:
        if shard.bytes != shard.chunks * stride + 2 * BLOCK_BYTES:
            raise DataError(f"{path}: {shard.name}: {shard.chunks} chunks do not take {shard.bytes} bytes")
    if index.tokens < 2 or not 0 < index.labels <= index.num_chunks * index.chunk_tokens:
        raise DataError(f"{path}: {index.tokens} tokens in {index.num_chunks} chunks of {index.chunk_tokens}")
    return index


def _check_types(index: Index) -> None:
    """JSON carries no types; a string where a number belongs must not surface later as a traceback."""
    records: tuple[Index | Shard, ...] = (index, *index.shards)
    for record in records:
        for field in fields(record):
            value = getattr(record, field.name)
            if field.type == "str" and not isinstance(value, str):
                raise TypeError(f"{field.name} is {value!r}, not text")
            if field.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise TypeError(f"{field.name} is {value!r}, not a count")
    if index.chunk_tokens < 1:
        raise TypeError("chunk_tokens is 0")


def _why_no_index(folder: Path) -> str:
    remedy = "tools/prepare_data.py --out prepares one"
    if not folder.is_dir():
        return f"{folder}: no dataset here; {remedy}"
    if any(folder.glob("*.tar")):
        return f"{folder}: half-written: it has shards but no {INDEX_FILE}, which is written last; prepare it again"
    return f"{folder}: no {INDEX_FILE}, so not a dataset; {remedy}"
