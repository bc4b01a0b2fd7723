"""Finds what is wrong with a prepared split: reads every byte and names each fault by file, chunk and byte."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from megalm.data.shards.index import MEMBER_HEADER_BYTES, Index, Shard, read_index
from megalm.data.shards.read import ChunkReader
from megalm.data.shards.store import MissingFile, Store
from megalm.data.shards.write import member_header
from megalm.errors import DataError

Report = Callable[[int, int], None]
"""(shards done, shards in all)"""


def find_corruption(store: Store, report: Report | None = None) -> Iterator[str]:
    """Describe each fault of a split, one line each; none if all is as it was written."""
    try:
        index = read_index(store)
    except DataError as error:
        yield str(error)
        return
    reader = ChunkReader(store, index)
    for number in range(index.num_shards):
        yield from _shard_faults(reader, index, index.shard(number))
        if report is not None:
            report(number + 1, index.num_shards)


def _shard_faults(reader: ChunkReader, index: Index, shard: Shard) -> Iterator[str]:
    store = reader.store
    whole = reader.place(shard, 0, shard.chunks)
    try:
        size = store.size(shard.name)
    except MissingFile:
        yield f"{store.path_of(shard.name)}: missing: {whole}; copy the file again"
        return
    if size is not None and size != shard.bytes:
        sound = min(size // index.stride, shard.chunks)
        lost = f"; lost: {reader.place(shard, sound, shard.chunks)}" if sound < shard.chunks else ""
        foreign = "" if size < shard.bytes else ", so this index.json may be that of another dataset"
        yield (
            f"{store.path_of(shard.name)}: {size} bytes, the index says {shard.bytes}: "
            f"{'cut short' if size < shard.bytes else 'longer'} at byte {min(size, shard.bytes)}{lost}{foreign}"
        )
        return
    try:
        checks = reader.read_checks(shard)
        file = store.open(shard.name, shard.bytes)
    except DataError as error:
        yield str(error)
        return
    faults = []
    hasher = hashlib.sha256()
    for within in range(shard.chunks):
        data = file.view(within * index.stride, index.stride)
        hasher.update(data.data)
        try:
            reader.chunk(shard.first_chunk + within)
        except DataError as error:
            faults.append(str(error))
            continue
        faults += _header_faults(reader, shard, within, data.tobytes())
    hasher.update(file.view(shard.chunks * index.stride, shard.bytes - shard.chunks * index.stride).data)
    if not faults and hasher.hexdigest() != checks["sha256"]:
        faults.append(f"{store.path_of(shard.name)}: sha256 differs, though no chunk does: padding was changed")
    yield from faults
    yield from _document_faults(store, shard, checks["documents_sha256"])


def _header_faults(reader: ChunkReader, shard: Shard, within: int, data: bytes) -> Iterator[str]:
    """Tar and array headers follow from the index, so what differs is known to the byte."""
    index = reader.index
    key = f"{shard.first_chunk + within:012d}"
    members = [(0, "tokens", np.dtype(index.dtype))]
    if index.masked:
        members.append((index.mask_offset - MEMBER_HEADER_BYTES, "mask", np.dtype(np.uint8)))
    for start, kind, dtype in members:
        expected = member_header(f"{key}.{kind}.npy", dtype, index.chunk_tokens + 1)
        found = data[start : start + MEMBER_HEADER_BYTES]
        if found != expected:
            wrong = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
            byte = within * index.stride + start + wrong
            yield (
                f"{reader.store.path_of(shard.name)} chunk {within} (byte {byte}): the header of its {kind} was changed"
            )


def _document_faults(store: Store, shard: Shard, sha256: str) -> Iterator[str]:
    name = store.path_of(shard.documents_name)
    try:
        data = store.read(shard.documents_name)
    except MissingFile:
        yield f"{name}: missing; copy the file again"
        return
    if hashlib.sha256(data).hexdigest() != sha256:
        yield f"{name}: changed since it was written; copy the file again"
