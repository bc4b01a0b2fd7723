"""Writes token shards: uncompressed tar files of fixed-size ``.npy`` members, with their hashes beside them. No torch.

Of each chunk there is a member ``{12 digits}.tokens.npy`` and, for supervised data, ``{12 digits}.mask.npy``. Nothing
of the machine or the moment goes into a file, so equal tokens give equal bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalm.data.shards.index import BLOCK_BYTES, INDEX_FILE, MEMBER_HEADER_BYTES, Index, read_index
from megalm.data.shards.row_counts import RowCounts
from megalm.errors import DataError

_Array = NDArray[np.unsignedinteger[Any]]


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def member_header(name: str, dtype: np.dtype[Any], length: int) -> bytes:
    """What a tar file holds before an array's bytes: the header of the member, then that of the ``.npy`` array."""
    npy = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        npy, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (length,)}
    )
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = len(npy.getvalue()) + length * dtype.itemsize, 0, 0o644
    header = info.tobuf(tarfile.USTAR_FORMAT) + npy.getvalue()
    if len(header) != MEMBER_HEADER_BYTES:
        raise AssertionError("this NumPy writes .npy headers of another size than the format's 128 bytes")
    return header


class ShardWriter:
    """Writes one split of a dataset: feed tokens with :meth:`add`, then :meth:`close` writes the index, last.

    The bytes written depend on the tokens, documents and masks alone, not on how they were fed.

    Args:
        folder: the split.
        tokenizer_sha256: hash of the tokenizer's definition.
        vocab_size: token ids are below this.
        eos_id: ends every document; pads the last chunk.
        chunk_tokens: tokens per chunk, the overlapping one not counted.
        chunks_per_shard: chunks per tar file.
        masked: whether tokens come with a loss mask.
        packed_length: sequence length that documents were packed for; 0: they are concatenated.
        document_start: what the index says of it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tokenizer_sha256: str,
        vocab_size: int,
        eos_id: int,
        chunk_tokens: int,
        chunks_per_shard: int,
        masked: bool = False,
        packed_length: int = 0,
        document_start: tuple[str, ...] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._dtype = dtype_for(vocab_size)
        self._masked = masked
        self._eos_id, self._vocab_size = eos_id, vocab_size
        self._meta: dict[str, Any] = {
            "dtype": self._dtype.name,
            "chunk_tokens": chunk_tokens,
            "chunks_per_shard": chunks_per_shard,
            "masked": masked,
            "packed_length": packed_length,
            "tokenizer_sha256": tokenizer_sha256,
            "vocab_size": vocab_size,
            "eos_id": eos_id,
            "document_start": document_start,
        }
        self._chunk_tokens = chunk_tokens
        self._chunks_per_shard = chunks_per_shard
        self._rows = RowCounts.of(chunk_tokens, packed_length) if masked else None
        self._pending: list[tuple[_Array, _Array]] = []
        self._pending_tokens = 0
        self._documents = self._tokens = self._loss_tokens = self._chunks = 0
        self._open_shard: _OpenShard | None = None
        self._waiting_names: list[tuple[int, str]] = []  # (first token, line) of documents whose shard is not written
        self._checks: list[str] = []

    @property
    def tokens(self) -> int:
        """Tokens fed so far."""
        return self._tokens

    @property
    def rows(self) -> RowCounts | None:
        """Rows written so far, and those with nothing to learn; None where every token carries loss."""
        return self._rows

    @property
    def documents(self) -> int:
        """Documents fed so far."""
        return self._documents

    def add(
        self,
        tokens: NDArray[np.integer[Any]],
        lengths: Sequence[int],
        names: Sequence[str],
        mask: NDArray[np.uint8] | None = None,
        *,
        documents: int | None = None,
    ) -> None:
        """Append whole documents, end to end.

        Args:
            tokens: of all of them.
            lengths: of each; they add up to the number of tokens.
            names: where each is from.
            mask: 1 where a token carries loss; None: everywhere.
            documents: how many they count as, where some are parts of one; None: as many as there are names.

        Raises:
            DataError: a token is outside the vocabulary.
        """
        lowest, highest = (int(tokens.min()), int(tokens.max())) if tokens.size else (0, 0)
        if lowest < 0 or highest >= self._vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise DataError(f"token id {wrong} is outside the vocabulary of {self._vocab_size}")
        if sum(lengths) != tokens.size or (mask is not None and (not self._masked or mask.size != tokens.size)):
            raise ValueError(f"{tokens.size} tokens do not fit lengths of {sum(lengths)}, or the mask")
        start = self._tokens
        for length, name in zip(lengths, names, strict=True):
            line = json.dumps({"start": start, "tokens": length, "name": name}, ensure_ascii=False)
            self._waiting_names.append((start, line))
            start += length
        if mask is None:
            mask = np.ones(tokens.size, dtype=np.uint8) if self._masked else np.empty(0, dtype=np.uint8)
        self._pending.append((tokens.astype(self._dtype), mask))
        self._pending_tokens += tokens.size
        self._tokens += tokens.size
        self._loss_tokens += int(mask.sum()) if self._masked else tokens.size
        self._documents += len(names) if documents is None else documents
        if self._pending_tokens > self._chunk_tokens:
            self._write_whole_chunks()

    def close(self) -> Index:
        """Write the padded tail, close the last shard and write the index.

        Raises:
            DataError: fewer than two tokens were fed, so there is nothing to predict.
        """
        if self._tokens < 2:
            raise DataError(f"{self._folder}: {self._tokens} tokens are too few for a dataset")
        tokens, mask = self._join()
        if tokens.size > 1 or self._chunks == 0:
            padding = self._chunk_tokens + 1 - tokens.size
            tokens = np.pad(tokens, (0, padding), constant_values=self._eos_id)
            self._write_chunk(tokens, np.pad(mask, (0, padding)) if self._masked else mask)
        self._finish_shard(last=True)
        index = Index(
            documents=self._documents,
            tokens=self._tokens,
            loss_tokens=self._loss_tokens,
            checks=tuple(self._checks),
            **self._meta,
        )
        write_durably(self._folder / INDEX_FILE, index.to_json().encode())
        return read_index(self._folder)

    def _join(self) -> tuple[_Array, _Array]:
        tokens, masks = zip(*self._pending, strict=True)
        return np.concatenate(tokens), np.concatenate(masks)

    def _write_whole_chunks(self) -> None:
        tokens, mask = self._join()
        start = 0
        while tokens.size - start > self._chunk_tokens:
            part = slice(start, start + self._chunk_tokens + 1)
            self._write_chunk(tokens[part], mask[part])
            start += self._chunk_tokens
        self._pending = [(tokens[start:], mask[start:])]
        self._pending_tokens = tokens.size - start

    def _write_chunk(self, tokens: _Array, mask: _Array) -> None:
        if self._rows is not None:
            valid = min(self._chunk_tokens, self._tokens - 1 - self._chunks * self._chunk_tokens)
            self._rows.add(mask[1 : 1 + valid])
        if self._open_shard is None:
            self._open_shard = _OpenShard(self._folder / f"shard-{len(self._checks):06d}.tar")
        arrays = {"tokens": tokens, "mask": mask} if self._masked else {"tokens": tokens}
        self._open_shard.append(f"{self._chunks:012d}", arrays)
        self._chunks += 1
        if len(self._open_shard.crc32) == self._chunks_per_shard:
            self._finish_shard()

    def _finish_shard(self, *, last: bool = False) -> None:
        if self._open_shard is None:
            return
        end = self._tokens if last else self._chunks * self._chunk_tokens
        count = next((i for i, (start, _) in enumerate(self._waiting_names) if start >= end), len(self._waiting_names))
        lines = [line for _, line in self._waiting_names[:count]]
        self._waiting_names = self._waiting_names[count:]
        self._checks.append(self._open_shard.finish(lines))
        self._open_shard = None


class _OpenShard:
    """A tar file being written, hashed on the way."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._hasher = hashlib.sha256()
        self.crc32: list[int] = []

    def append(self, key: str, arrays: dict[str, _Array]) -> None:
        """One member per array; the chunk's crc32 is of all of its arrays' bytes."""
        crc = 0
        for kind, array in arrays.items():
            data = array.tobytes()
            header = member_header(f"{key}.{kind}.npy", array.dtype, array.size)
            self._write(header + data + bytes(-(len(header) + len(data)) % BLOCK_BYTES))
            crc = zlib.crc32(data, crc)
        self.crc32.append(crc)

    def finish(self, document_lines: Sequence[str]) -> str:
        """Close the file, write what belongs beside it, and return the sha256 of its hashes."""
        self._write(bytes(2 * BLOCK_BYTES))  # a tar file ends with two empty blocks
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        documents = "".join(f"{line}\n" for line in document_lines).encode()
        stem = self._path.name.removesuffix(".tar")
        write_durably(self._path.with_name(f"{stem}.documents.jsonl"), documents)
        contents = {
            "shard": self._path.name,
            "chunks": len(self.crc32),
            "sha256": self._hasher.hexdigest(),
            "documents_sha256": hashlib.sha256(documents).hexdigest(),
            "crc32": self.crc32,
        }
        checks = json.dumps(contents).encode()
        write_durably(self._path.with_name(f"{self._path.name}.idx.json"), checks)
        return hashlib.sha256(checks).hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hasher.update(data)


def write_durably(path: Path, data: bytes) -> None:
    """Write, fsync, rename: a reader sees the whole file or none."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
