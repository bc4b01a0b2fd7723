"""Token shards on disk: uncompressed tar files of fixed-size ``.npy`` members. No torch.

Members have a fixed size, so the place of any token is arithmetic, and stock ``webdataset`` reads the same files. Each
chunk's crc32 is checked whenever it is read from disk for the first time.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalm.data.index import BLOCK_BYTES, INDEX_FILE, MEMBER_HEADER_BYTES, Index, Shard, check_files, read_index
from megalm.errors import DataError

Tokens = NDArray[np.unsignedinteger[Any]]


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


class ShardWriter:
    """Writes one split of a dataset: feed tokens with :meth:`add`, then :meth:`close` writes the index, last.

    The bytes written depend on the tokens alone, not on how they were fed.
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
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._dtype = dtype_for(vocab_size)
        self._meta: dict[str, Any] = {"tokenizer_sha256": tokenizer_sha256, "vocab_size": vocab_size, "eos_id": eos_id}
        self._chunk_tokens = chunk_tokens
        self._chunks_per_shard = chunks_per_shard
        self._pending: list[Tokens] = []
        self._pending_tokens = 0
        self._documents = 0
        self._tokens = 0
        self._chunks = 0
        self._shards: list[Shard] = []
        self._open_shard: _OpenShard | None = None

    @property
    def tokens(self) -> int:
        """Tokens fed so far."""
        return self._tokens

    @property
    def documents(self) -> int:
        """Documents fed so far."""
        return self._documents

    def add(self, tokens: NDArray[np.integer[Any]], documents: int) -> None:
        """Append the tokens of ``documents`` whole documents, each ending with end-of-text."""
        lowest, highest = (int(tokens.min()), int(tokens.max())) if tokens.size else (0, 0)
        if lowest < 0 or highest >= self._meta["vocab_size"]:
            wrong = lowest if lowest < 0 else highest
            raise DataError(f"token id {wrong} is outside the vocabulary of {self._meta['vocab_size']}")
        self._pending.append(tokens.astype(self._dtype))
        self._pending_tokens += tokens.size
        self._tokens += tokens.size
        self._documents += documents
        if self._pending_tokens > self._chunk_tokens:
            self._write_whole_chunks()

    def close(self) -> Index:
        """Write the padded tail, close the last shard and write the index.

        Raises:
            DataError: fewer than two tokens were fed, so there is nothing to predict.
        """
        if self._tokens < 2:
            raise DataError(f"{self._folder}: {self._tokens} tokens are too few for a dataset")
        rest = np.concatenate(self._pending)
        if rest.size > 1 or self._chunks == 0:
            padding = self._chunk_tokens + 1 - rest.size
            self._write_chunk(np.pad(rest, (0, padding), constant_values=self._meta["eos_id"]))
        self._finish_shard()
        index = Index(
            dtype=self._dtype.name,
            chunk_tokens=self._chunk_tokens,
            documents=self._documents,
            tokens=self._tokens,
            shards=tuple(self._shards),
            **self._meta,
        )
        _write_durably(self._folder / INDEX_FILE, index.to_json().encode())
        return index

    def _write_whole_chunks(self) -> None:
        buffer = np.concatenate(self._pending)
        start = 0
        while buffer.size - start > self._chunk_tokens:
            self._write_chunk(buffer[start : start + self._chunk_tokens + 1])
            start += self._chunk_tokens
        self._pending = [buffer[start:]]
        self._pending_tokens = buffer.size - start

    def _write_chunk(self, tokens: Tokens) -> None:
        if self._open_shard is None:
            self._open_shard = _OpenShard(self._folder / f"shard-{len(self._shards):06d}.tar")
        self._open_shard.append(f"{self._chunks:012d}.tokens.npy", tokens)
        self._chunks += 1
        if len(self._open_shard.checks) == self._chunks_per_shard:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._open_shard is not None:
            self._shards.append(self._open_shard.finish())
            self._open_shard = None


class _OpenShard:
    """A tar file being written, hashed on the way."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._hasher = hashlib.sha256()
        self._bytes = 0
        self.checks: list[int] = []

    def append(self, name: str, tokens: Tokens) -> None:
        body = io.BytesIO()
        np.lib.format.write_array(body, np.ascontiguousarray(tokens), version=(1, 0))
        data = body.getvalue()
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = len(data), 0, 0o644  # nothing of the machine or the moment
        header = info.tobuf(tarfile.USTAR_FORMAT)
        if len(header) + len(data) - tokens.nbytes != MEMBER_HEADER_BYTES:
            raise AssertionError("this NumPy writes .npy headers of another size than the format's 128 bytes")
        self._write(header + data + bytes(-len(data) % BLOCK_BYTES))
        self.checks.append(zlib.crc32(data[-tokens.nbytes :]))

    def finish(self) -> Shard:
        self._write(bytes(2 * BLOCK_BYTES))  # a tar file ends with two empty blocks
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        checks = json.dumps({"shard": self._path.name, "chunks": len(self.checks), "crc32": self.checks}).encode()
        shard = Shard(
            name=self._path.name,
            chunks=len(self.checks),
            bytes=self._bytes,
            sha256=self._hasher.hexdigest(),
            checks_sha256=hashlib.sha256(checks).hexdigest(),
        )
        _write_durably(self._path.with_name(shard.checks_name), checks)
        return shard

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hasher.update(data)
        self._bytes += len(data)


class ChunkReader:
    """Checked random access to the chunks of one split; files are mapped when first touched.

    Args:
        folder: the split.
        index: its index.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder = folder
        self.index = index
        self._maps: dict[int, Any] = {}
        # Arrays, not sets and lists of Python integers: a long run touches tens of millions of chunks in every rank.
        self._checks: dict[int, NDArray[np.uint32]] = {}
        self._verified = np.zeros(index.num_chunks, dtype=bool)

    def chunk(self, chunk: int) -> Tokens:
        """All ``chunk_tokens + 1`` tokens of a chunk: a view of the file, checked when it is read for the first time.

        Raises:
            DataError: the file is missing or cut short, or the bytes are not those that were written.
        """
        shard, within = self._locate(chunk)
        offset = within * self.index.stride + MEMBER_HEADER_BYTES
        mapped = self._map(shard)
        tokens: Tokens = np.frombuffer(mapped, self.index.dtype, self.index.chunk_tokens + 1, offset)
        if not self._verified[chunk]:
            self._verify(tokens, shard, within, offset)
            self._verified[chunk] = True
        return tokens

    def _locate(self, chunk: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self.index.chunk_ends, chunk, side="right"))
        return shard, chunk - (int(self.index.chunk_ends[shard - 1]) if shard else 0)

    def _map(self, number: int) -> Any:
        if number not in self._maps:
            shard = self.index.shards[number]
            path = self.folder / shard.name
            try:
                mapped = np.memmap(path, dtype=np.uint8, mode="r")
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: cannot be read: {error}") from None
            if mapped.size != shard.bytes:
                raise DataError(f"{path}: {mapped.size} bytes, the index says {shard.bytes}: cut short or replaced")
            self._checks[number] = self._read_checks(shard)
            self._maps[number] = mapped
        return self._maps[number]

    def _read_checks(self, shard: Shard) -> NDArray[np.uint32]:
        path = self.folder / shard.checks_name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        if hashlib.sha256(data).hexdigest() != shard.checks_sha256:
            raise DataError(f"{path}: does not belong to {self.folder / INDEX_FILE}; copy the dataset again")
        return np.array(json.loads(data)["crc32"], dtype=np.uint32)

    def _verify(self, tokens: Tokens, shard: int, within: int, offset: int) -> None:
        path = self.folder / self.index.shards[shard].name
        where = f"{path} chunk {within} (bytes {offset} to {offset + tokens.nbytes})"
        if zlib.crc32(tokens.data) != self._checks[shard][within]:
            raise DataError(f"{where}: corrupt, the checksum differs; copy the shard again or prepare the data again")
        if int(tokens.max()) >= self.index.vocab_size:
            raise DataError(
                f"{where}: token id {int(tokens.max())} is outside the vocabulary of {self.index.vocab_size}"
            )


class TokenShards:
    """Random access to the sequences of one split.

    Sequence ``i`` is ``sequence_length + 1`` tokens from token ``i · sequence_length`` on: inputs and, shifted by one,
    labels. Any length that divides ``chunk_tokens`` works without preparing the data again.

    Args:
        folder: the split, such as ``data/quickstart/train``.
        sequence_length: tokens per sequence.

    Raises:
        DataError: the dataset is missing, half-written or incomplete, or the length does not divide its chunks.
    """

    def __init__(self, folder: str | Path, sequence_length: int) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        check_files(self.index, self.folder)
        if self.index.chunk_tokens % sequence_length:
            raise DataError(
                f"model.sequence_length={sequence_length}: does not divide the {self.index.chunk_tokens} tokens of a "
                f"chunk of {self.folder}; use a divisor, or prepare with another --chunk-tokens"
            )
        self.sequence_length = sequence_length
        self._per_chunk = self.index.chunk_tokens // sequence_length
        self._chunks = ChunkReader(self.folder, self.index)

    def __len__(self) -> int:
        return self.index.num_sequences(self.sequence_length)

    def sequence(self, i: int) -> tuple[Tokens, int]:
        """Sequence ``i``: its ``sequence_length + 1`` tokens, and how many of its labels are valid, not padding."""
        if not 0 <= i < len(self):
            raise IndexError(f"sequence {i} of {len(self)}")
        chunk, within = divmod(i, self._per_chunk)
        start = within * self.sequence_length
        tokens = self._chunks.chunk(chunk)[start : start + self.sequence_length + 1]
        return tokens, min(self.sequence_length, self.index.labels - i * self.sequence_length)


def find_corruption(folder: Path) -> Iterator[str]:
    """Read every byte of one split and describe each fault: file, chunk and bytes."""
    try:
        index = read_index(folder)
    except DataError as error:
        yield str(error)
        return
    reader = ChunkReader(folder, index)
    first = 0
    for shard in index.shards:
        faults = []
        for chunk in range(first, first + shard.chunks):
            try:
                reader.chunk(chunk)
            except DataError as error:
                if str(error) not in faults:  # a missing file is one fault, not one per chunk
                    faults.append(str(error))
        if not faults and _sha256_of(folder / shard.name) != shard.sha256:
            faults.append(
                f"{folder / shard.name}: sha256 differs, though no token does: tar or array headers were changed"
            )
        yield from faults
        first += shard.chunks


def iterate_with_webdataset(folder: str | Path) -> Iterator[Tokens]:
    """Chunks in file order through stock ``webdataset``, for users' own pipelines; without megalm's checks."""
    import webdataset

    index = read_index(Path(folder))
    urls = [str(Path(folder) / shard.name) for shard in index.shards]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode()
    for sample in dataset:
        yield sample["tokens.npy"]


def _sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_durably(path: Path, data: bytes) -> None:
    """Write, fsync, rename: a reader sees the whole file or none."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
