"""Reads token shards: checked random access to the sequences of a split, wherever its files lie. No torch.

Members have a fixed size, so the place of any token is arithmetic, and stock ``webdataset`` reads the same files. Each
chunk's crc32 is checked when it is read: once where a file is mapped, each time where its bytes are copied.

Shapes: B rows, S sequence length.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalm.data.shards.index import (
    INDEX_FILE,
    MEMBER_HEADER_BYTES,
    Index,
    Shard,
    check_files,
    read_index,
    read_same_index,
)
from megalm.data.shards.store import OpenFile, Store, open_store
from megalm.errors import DataError

Tokens = NDArray[np.unsignedinteger[Any]]
_OPEN_SHARDS = 4096
"""Shards open at a time, far below the kernel's limit of mappings; a closed one is opened again when needed."""


@dataclass(frozen=True)
class Chunk:
    """One chunk's arrays.

    Attributes:
        tokens: ``chunk_tokens + 1`` ids.
        mask: as many, 1 where a token carries loss; None: everywhere.
    """

    tokens: Tokens
    mask: NDArray[np.uint8] | None


@dataclass(frozen=True)
class _OpenShard:
    """A shard that can be read.

    Attributes:
        shard: what the index says of it.
        file: its bytes.
        crc32: [chunks].
        verified: [chunks], whether a chunk's bytes have been checked, and will not change since they are mapped.
    """

    shard: Shard
    file: OpenFile
    crc32: NDArray[np.uint32]
    verified: NDArray[np.bool_]


class ChunkReader:
    """Checked random access to the chunks of one split.

    Args:
        store: the split's folder.
        index: its index; one without hashes is read again, and must be the same, when the first chunk is asked for.
    """

    def __init__(self, store: Store, index: Index) -> None:
        self.store = store
        self.index = index
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def chunk(self, number: int) -> Chunk:
        """A chunk, a view of the file where it is mapped.

        Raises:
            DataError: the file is missing or cut short, or the bytes are not those that were written.
        """
        if not self.index.is_whole:
            self.index = read_same_index(self.store, self.index)
        index = self.index
        shard_number, within = divmod(number, index.chunks_per_shard)
        opened = self._opened(shard_number)
        offset = within * index.stride + MEMBER_HEADER_BYTES
        mask_offset = within * index.stride + index.mask_offset
        end = mask_offset + index.chunk_tokens + 1 if index.masked else offset + index.chunk_bytes
        data = opened.file.view(offset, end - offset)
        tokens: Tokens = data[: index.chunk_bytes].view(index.dtype)
        mask = data[mask_offset - offset :] if index.masked else None
        if not opened.verified[within]:
            self._verify(tokens, mask, opened, within, offset, end)
            opened.verified[within] = self.store.is_local
        return Chunk(tokens, mask)

    def read_checks(self, shard: Shard) -> dict[str, Any]:
        """The hashes beside a shard.

        Raises:
            DataError: missing, or not those that the index lists.
        """
        data = self.store.read(shard.checks_name)
        if hashlib.sha256(data).hexdigest() != shard.checks_sha256:
            raise DataError(
                f"{self.store.path_of(shard.checks_name)}: does not belong to {self.store.path_of(INDEX_FILE)}, so "
                f"{self.place(shard, 0, shard.chunks)} cannot be checked; copy the dataset again"
            )
        contents: dict[str, Any] = json.loads(data)
        return contents

    def place(self, shard: Shard, first: int, stop: int) -> str:
        """Some chunks of a shard as messages name them."""
        chunks = f"chunk {first}" if stop == first + 1 else f"chunks {first} to {stop - 1}"
        start, end = first * self.index.stride, stop * self.index.stride
        return f"{self.store.path_of(shard.name)} {chunks} (bytes {start} to {end})"

    def _opened(self, number: int) -> _OpenShard:
        opened = self._open.get(number)
        if opened is None:
            shard = self.index.shard(number)
            file = self.store.open(shard.name, shard.bytes)
            crc32 = np.array(self.read_checks(shard)["crc32"], dtype=np.uint32)
            opened = self._open[number] = _OpenShard(shard, file, crc32, np.zeros(shard.chunks, dtype=bool))
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(number)
        return opened

    def _verify(
        self, tokens: Tokens, mask: NDArray[np.uint8] | None, opened: _OpenShard, within: int, start: int, end: int
    ) -> None:
        where = f"{self.store.path_of(opened.shard.name)} chunk {within} (bytes {start} to {end})"
        crc = zlib.crc32(tokens.data)
        if mask is not None:
            crc = zlib.crc32(mask.data, crc)
        if crc != opened.crc32[within]:
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
        split: such as ``data/quickstart/train``: a folder, or the store of one.
        sequence_length: tokens per sequence.
        known: what another process has read of the index, after it had checked that every file is there: then nothing
            is opened before the first sequence is read. None: index and files are looked at here.

    Raises:
        DataError: the dataset is missing, half-written or incomplete, or the length does not divide its chunks.
    """

    def __init__(self, split: str | Path | Store, sequence_length: int, known: Index | None = None) -> None:
        self.store = open_store(split) if isinstance(split, str | Path) else split
        if known is None:
            self.index = read_index(self.store)
            check_files(self.index, self.store)
        else:
            self.index = known
        self.check_length(self.index, sequence_length, self.store.location)
        self.sequence_length = sequence_length
        self._per_chunk = self.index.chunk_tokens // sequence_length
        self._chunks = ChunkReader(self.store, self.index)

    @staticmethod
    def check_length(index: Index, sequence_length: int, where: str) -> None:
        """Raise DataError if sequences of this length cannot be read."""
        if index.packed_length not in (0, sequence_length):
            raise DataError(
                f"model.sequence_length={sequence_length}: {where} was packed for {index.packed_length}; "
                "use that, or prepare the data again with another --pack"
            )
        if index.chunk_tokens % sequence_length:
            raise DataError(
                f"model.sequence_length={sequence_length}: does not divide the {index.chunk_tokens} tokens of a "
                f"chunk of {where}; use a divisor, or prepare with another --chunk-tokens"
            )

    def __len__(self) -> int:
        return self.index.num_sequences(self.sequence_length)

    def read(self, sequences: NDArray[np.int64], tokens: NDArray[np.int64], mask: NDArray[np.uint8] | None) -> None:
        """Copy sequences into the rows of arrays.

        Args:
            sequences: [B], numbers of the sequences.
            tokens: [B, S + 1], filled.
            mask: [B, S + 1], filled with 1 where a token carries loss; None: not wanted.
        """
        if sequences.size and not 0 <= int(sequences.min()) <= int(sequences.max()) < len(self):
            raise IndexError(f"sequences {sequences.min()} to {sequences.max()} of {len(self)}")
        length = self.sequence_length
        for row, sequence in enumerate(sequences.tolist()):
            number, within = divmod(sequence, self._per_chunk)
            chunk = self._chunks.chunk(number)
            part = slice(within * length, (within + 1) * length + 1)
            tokens[row] = chunk.tokens[part]
            if mask is not None:
                mask[row] = 1 if chunk.mask is None else chunk.mask[part]

    def valid(self, sequences: NDArray[np.int64]) -> NDArray[np.int64]:
        """[B]: how many labels of each sequence are valid, not padding."""
        return np.minimum(self.sequence_length, self.index.labels - sequences * self.sequence_length)


def iterate_with_webdataset(folder: str | Path) -> Iterator[Tokens]:
    """Chunks in file order through stock ``webdataset``, for users' own pipelines; without megalm's checks."""
    import webdataset

    index = read_index(Path(folder))
    urls = [str(Path(folder) / index.shard(number).name) for number in range(index.num_shards)]
    dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode()
    for sample in dataset:
        yield sample["tokens.npy"]
