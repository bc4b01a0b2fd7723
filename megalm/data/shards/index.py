"""``index.json``: what a folder of token shards holds. The file is written last: no index, no dataset. No torch.

A split is one long sequence of tokens, cut into chunks of ``chunk_tokens`` tokens that overlap by one (the label of a
chunk's last token is the first token of the next). The tail of the last chunk is padding and carries no loss. All
shards but the last hold the same number of chunks, so that the place of any token is arithmetic, and the index of a
trillion tokens holds one hash per shard and nothing else that grows.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from megalm.data.shards.store import MissingFile, Store, open_store
from megalm.errors import DataError

FORMAT = "megalm-tokens"
VERSION = 2
INDEX_FILE = "index.json"
MEMBER_HEADER_BYTES = 512 + 128
"""Before an array's bytes: the tar header and the header of a version 1 ``.npy`` array."""
BLOCK_BYTES = 512
"""A tar file's members begin at multiples of this."""
MAX_STATS = 10_000
"""Files whose sizes are looked up before a run starts; of more, the first and the last, the others when opened."""


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Attributes:
        number: its place in the split.
        first_chunk: number in the split of its first chunk.
        chunks: how many chunks it holds.
        bytes: size of the file.
        checks_sha256: of the file beside it, which holds its hashes and a crc32 per chunk.
    """

    number: int
    first_chunk: int
    chunks: int
    bytes: int
    checks_sha256: str

    @property
    def name(self) -> str:
        """The tar file."""
        return f"shard-{self.number:06d}.tar"

    @property
    def checks_name(self) -> str:
        """The file with this shard's hashes."""
        return f"{self.name}.idx.json"

    @property
    def documents_name(self) -> str:
        """The file that names the documents that begin in this shard."""
        return f"shard-{self.number:06d}.documents.jsonl"


@dataclass(frozen=True)
class Index:
    """Contents of ``index.json``.

    Attributes:
        dtype: ``uint16`` or ``uint32``.
        chunk_tokens: tokens per chunk, the overlapping one not counted.
        chunks_per_shard: of every shard but the last, which may hold fewer.
        masked: whether each chunk has a mask beside its tokens: 1 where a token, as a label, carries loss.
        packed_length: sequence length that documents were packed for; 0: they were concatenated, for any length.
        tokenizer_sha256: hash of the tokenizer's definition.
        vocab_size: token ids are below this.
        eos_id: ends every document.
        document_start: tokens that begin every document; None: ``[CLS]``, if the tokenizer has one, or nothing.
        documents: number of documents.
        tokens: valid tokens; padding at the end not counted.
        loss_tokens: tokens that carry loss.
        checks: for each shard, the sha256 of its file of hashes.
        fingerprint: hash of all this, and so, through the shards' hashes, of every token; checked when it is read.
    """

    dtype: str
    chunk_tokens: int
    chunks_per_shard: int
    masked: bool
    packed_length: int
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    documents: int
    tokens: int
    loss_tokens: int
    checks: tuple[str, ...]
    document_start: tuple[str, ...] | None = None
    fingerprint: str = field(default="", compare=False)

    @property
    def marks(self) -> str:
        """How documents begin and end, in words."""
        start = "no start but [CLS]" if self.document_start is None else " ".join(self.document_start) or "no start"
        return f"{start}, end {self.eos_id}"

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk's tokens, the overlapping one included."""
        return (self.chunk_tokens + 1) * np.dtype(self.dtype).itemsize

    @property
    def mask_offset(self) -> int:
        """Bytes from the start of a chunk's first member to its mask."""
        return _member_bytes(self.chunk_bytes) + MEMBER_HEADER_BYTES

    @property
    def stride(self) -> int:
        """Bytes from one chunk of a shard to the next."""
        return _member_bytes(self.chunk_bytes) + (_member_bytes(self.chunk_tokens + 1) if self.masked else 0)

    @property
    def num_chunks(self) -> int:
        """Chunks in all shards."""
        return max(-(-self.labels // self.chunk_tokens), 1)

    @property
    def num_shards(self) -> int:
        """Tar files."""
        return -(-self.num_chunks // self.chunks_per_shard)

    @property
    def labels(self) -> int:
        """Every valid token but the first is the label of the one before it."""
        return self.tokens - 1

    def shard(self, number: int) -> Shard:
        """What the index says of one shard."""
        first = number * self.chunks_per_shard
        chunks = min(self.chunks_per_shard, self.num_chunks - first)
        return Shard(number, first, chunks, chunks * self.stride + 2 * BLOCK_BYTES, self.checks[number])

    @property
    def is_whole(self) -> bool:
        """Whether the hashes of the shards are here, without which no token can be read."""
        return len(self.checks) == self.num_shards

    def without_checks(self) -> Index:
        """All but the hashes of the shards: what grows with the data. The fingerprint stays, which they are part of."""
        return replace(self, checks=())

    @classmethod
    def from_dict(cls, contents: Mapping[str, Any]) -> Index:
        """What ``dataclasses.asdict`` made, after a journey as JSON."""
        start = contents["document_start"]
        return cls(
            **{
                **contents,
                "checks": tuple(contents["checks"]),
                "document_start": None if start is None else tuple(start),
            }
        )

    def num_sequences(self, sequence_length: int) -> int:
        """Sequences of ``sequence_length`` tokens that have at least one label."""
        return -(-self.labels // sequence_length)

    def to_json(self) -> str:
        """Text of ``index.json``."""
        left_out = {"fingerprint", *(["document_start"] if self.document_start is None else [])}
        contents = {key: value for key, value in asdict(self).items() if key not in left_out}
        return json.dumps(signed({"format": FORMAT, "version": VERSION, "stride": self.stride, **contents}), indent=0)


def signed(contents: dict[str, Any]) -> dict[str, Any]:
    """Contents of an index with their hash."""
    plain = {key: value for key, value in contents.items() if key != "fingerprint"}
    return {**plain, "fingerprint": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def read_index(split: Store | Path) -> Index:
    """Read and check a split's ``index.json``.

    Raises:
        DataError: missing, half-written, or of a format or version that is not read.
    """
    store = open_store(split) if isinstance(split, Path) else split
    where = store.path_of(INDEX_FILE)
    try:
        data = store.read(INDEX_FILE)
    except MissingFile:
        raise DataError(_why_no_index(store)) from None
    try:
        contents = json.loads(data)
    except ValueError as error:
        raise DataError(f"{where}: cannot be read as JSON ({error}); prepare the dataset again") from None
    return _parse(contents, where)


def read_same_index(split: Store, known: Index) -> Index:
    """Read a split's index, of which another rank knows that all of its files are there.

    Args:
        split: its folder, as this rank sees it.
        known: what the other rank read, without the hashes of the shards.

    Raises:
        DataError: as :func:`read_index`; or this rank sees another one.
    """
    found = read_index(split)
    if found.fingerprint != known.fingerprint:
        raise DataError(
            f"{split.path_of(INDEX_FILE)}: {platform.node()} reads contents {found.fingerprint[:12]}…, rank 0 read "
            f"{known.fingerprint[:12]}…; all ranks must see the same files: copy the dataset to every node again, and "
            "prepare none that a run is reading"
        )
    return found


def check_files(index: Index, store: Store) -> None:
    """Every shard is there and has the size that the index states; contents are checked when they are read.

    Raises:
        DataError: naming every file that is missing or has another size.
    """
    few = store.is_local and index.num_shards <= MAX_STATS
    numbers = range(index.num_shards) if few else sorted({0, index.num_shards - 1})
    problems = []
    for shard in map(index.shard, numbers):
        for name, size in ((shard.name, shard.bytes), (shard.checks_name, None)):
            try:
                found = store.size(name)
            except MissingFile:
                problems.append(f"{store.path_of(name)}: missing; {INDEX_FILE} lists it")
                continue
            if None not in (size, found) and found != size:
                problems.append(
                    f"{store.path_of(name)}: {found} bytes, {INDEX_FILE} says {size}: cut short or replaced"
                )
    if problems:
        raise DataError("\n".join(problems) + "\ncopy the files again, or prepare the dataset again")


def check_marks(found: Mapping[str, str]) -> None:
    """Refuse to blend data whose documents begin or end otherwise: a model would learn both.

    Args:
        found: locations of datasets ▶ their marks in words.

    Raises:
        DataError: they differ.
    """
    if len(set(found.values())) > 1:
        spoken = " and ".join(f"{where} ({marks})" for where, marks in found.items())
        raise DataError(
            f"data.path: documents begin or end with different tokens: {spoken}; prepare one of them again as the "
            "other, with --add-bos or --no-add-bos, and --eos"
        )


def _member_bytes(array_bytes: int) -> int:
    """What an array takes in a tar file."""
    return -(-(MEMBER_HEADER_BYTES + array_bytes) // BLOCK_BYTES) * BLOCK_BYTES


def _parse(contents: Any, where: str) -> Index:
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise DataError(f"{where}: not the index of a {FORMAT} dataset")
    if contents.get("version") != VERSION:
        raise DataError(
            f"{where}: format version {contents.get('version')}; this megalm reads version {VERSION}: "
            "prepare the dataset again"
        )
    if signed(contents) != contents:
        raise DataError(f"{where}: damaged: its contents are not those that its fingerprint is of; copy it again")
    try:
        names = [each.name for each in fields(Index) if each.name not in ("checks", "document_start")]
        start = contents.get("document_start")
        if start is not None and not isinstance(start, list):
            raise TypeError(f"document_start is {start!r}, not a list")
        index = Index(
            checks=tuple(map(str, contents["checks"])),
            document_start=None if start is None else tuple(start),
            **{name: contents[name] for name in names},
        )
        _check_types(index)
        stride = contents["stride"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: incomplete or damaged ({error}); prepare the dataset again") from None
    if index.dtype not in ("uint16", "uint32") or stride != index.stride:
        raise DataError(f"{where}: dtype {index.dtype!r} and stride {stride} do not fit together")
    if index.tokens < 2 or len(index.checks) != index.num_shards:
        raise DataError(
            f"{where}: {index.tokens} tokens in {len(index.checks)} shards of {index.chunks_per_shard} chunks "
            f"of {index.chunk_tokens} tokens: damaged; prepare the dataset again"
        )
    if index.packed_length and index.chunk_tokens % index.packed_length:
        raise DataError(f"{where}: packed_length {index.packed_length} does not divide {index.chunk_tokens}")
    return index


def _check_types(index: Index) -> None:
    """JSON carries no types; a string where a number belongs must not surface later as a traceback."""
    for each in fields(Index):
        value = getattr(index, each.name)
        if each.type == "str" and not isinstance(value, str):
            raise TypeError(f"{each.name} is {value!r}, not text")
        if each.type == "bool" and not isinstance(value, bool):
            raise TypeError(f"{each.name} is {value!r}, not true or false")
        if each.type == "int" and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
            raise TypeError(f"{each.name} is {value!r}, not a count")
    if not all(isinstance(token, str) for token in index.document_start or ()):
        raise TypeError(f"document_start is {index.document_start!r}, not tokens")
    for name in ("chunk_tokens", "chunks_per_shard"):
        if getattr(index, name) < 1:
            raise TypeError(f"{name} is 0")


def _why_no_index(store: Store) -> str:
    remedy = "megalm prepare --out prepares one, and data.path=FOLDER names another"
    if not store.is_local:
        return f"{store.path_of(INDEX_FILE)}: not there, so this is no dataset; {remedy}"
    folder = Path(store.location)
    if not folder.is_dir():
        return f"{folder}: no dataset here; {remedy}"
    if any(folder.glob("*.tar")):
        return f"{folder}: half-written: it has shards but no {INDEX_FILE}, which is written last; prepare it again"
    return f"{folder}: no {INDEX_FILE}, so not a dataset; {remedy}"
