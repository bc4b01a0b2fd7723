"""One block of a corpus ▶ tokens in a file: all the work of preparing data that any process may do. No torch.

Shapes: D documents, T tokens of a block.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megalm.data.document import Block, Document, Rejected
from megalm.data.prepare.clean import Cleaned, Cleaner, Cleaning
from megalm.data.prepare.clean.near_duplicates import bands
from megalm.data.prepare.left_out import LeftOutTotals
from megalm.data.tally import EXAMPLES, FileTally, RejectedFile
from megalm.data.tokenization.document_tokens import encode_documents
from megalm.data.tokenization.tokenizer import Tokenizer

CONVERSATIONS = "conversations, whose turns the chat template puts together"
"""What the card counts documents by that a chat template was used for."""


@dataclass(frozen=True)
class Work:
    """What a worker needs to know besides the block; small, since it travels with each.

    Attributes:
        cleaning: what is done to each document.
        exact_duplicates: whether texts are hashed.
        val_fraction: share of documents that go to validation.
        tokenizer: path of the ``tokenizer.json``, beside which lies what its tokens are for; None: texts are wanted.
        tokenizer_hash: of all that, so that a process that outlives one preparation does not keep its tokenizer.
        folder: where results go.
    """

    cleaning: Cleaning
    exact_duplicates: bool
    val_fraction: float
    tokenizer: str | None
    tokenizer_hash: str | None
    folder: str

    def path_of(self, number: int) -> Path:
        """The file of a block's result; a thousand to a folder."""
        return Path(self.folder) / f"{number // 1000:06d}" / f"{number:09d}.npz"


_RECORDED = ("names", "bytes", "read", "removed", "notes", "left_out", "examples", "files")
"""Fields of a result that are no arrays."""


@dataclass(frozen=True)
class BlockResult:
    """What became of a block.

    Attributes:
        tokens: [T], of all documents end to end.
        lengths: [D], tokens of each document.
        mask: [T], 1 where a token carries loss; None: everywhere.
        validation: [D], whether a document is for validation.
        digests: [D, 16] bytes, hashes of texts; [D, 0]: not wanted.
        bands: [D, bands], MinHash bands; [D, 0]: not wanted.
        text_bytes: [D], size of each cleaned text.
        names: of the documents.
        bytes: text that was read, before cleaning.
        read: documents that were read, rejected ones included.
        removed: how many documents each rule removed.
        notes: how often something was changed.
        left_out: what readers left out of documents, as :meth:`LeftOutTotals.to_dict` gives it.
        examples: by rule, the first documents that it removed.
        files: by reason, files that hold no text which can be read (:meth:`FileTally.to_dict`).
    """

    tokens: NDArray[np.uint32]
    lengths: NDArray[np.int64]
    mask: NDArray[np.uint8] | None
    validation: NDArray[np.bool_]
    digests: NDArray[np.uint8]
    bands: NDArray[np.uint64]
    text_bytes: NDArray[np.int64]
    names: tuple[str, ...]
    bytes: int
    read: int
    removed: dict[str, int]
    notes: dict[str, int]
    left_out: dict[str, Any]
    examples: dict[str, list[str]]
    files: dict[str, dict[str, Any]]

    def save(self, path: Path) -> None:
        """Write, then rename: a killed worker leaves no result."""
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {name: getattr(self, name) for name in _RECORDED}
        arrays: dict[str, Any] = {
            "tokens": self.tokens,
            "lengths": self.lengths,
            "mask": np.empty(0, dtype=np.uint8) if self.mask is None else self.mask,
            "validation": self.validation,
            "digests": self.digests,
            "bands": self.bands,
            "text_bytes": self.text_bytes,
            "record": np.frombuffer(json.dumps(record).encode(), dtype=np.uint8),
        }
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        temporary.replace(path)

    @classmethod
    def load(cls, path: Path) -> BlockResult:
        """What :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            record: dict[str, Any] = json.loads(arrays["record"].tobytes())
            mask = arrays["mask"]
            return cls(
                tokens=arrays["tokens"],
                lengths=arrays["lengths"],
                mask=mask if mask.size else None,
                validation=arrays["validation"],
                digests=arrays["digests"],
                bands=arrays["bands"],
                text_bytes=arrays["text_bytes"],
                names=tuple(record.pop("names")),
                **record,
            )


def tokenise_block(work: Work, number: int, block: Block) -> tuple[int, int, int]:
    """Read, clean and tokenise a block, and write the result.

    Returns:
        (bytes of text, documents, tokens), for progress.
    """
    assert work.tokenizer is not None
    tokenizer = _tokenizer(work.tokenizer, work.tokenizer_hash)
    reading = _Reading()
    documents, texts = reading.rendered(work, block, tokenizer)
    tokens, lengths, mask = encode_documents(tokenizer, documents)
    digests = [text_digest(text) for text in texts] if work.exact_duplicates else []
    near = [bands(text) for text in texts] if work.cleaning.near_duplicates else []
    result = BlockResult(
        tokens=tokens,
        lengths=lengths,
        mask=mask,
        validation=np.array([is_validation(text, work.val_fraction) for text in texts], dtype=bool),
        digests=np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(texts), -1 if digests else 0),
        bands=np.stack(near) if near else np.empty((len(texts), 0), dtype=np.uint64),
        text_bytes=np.array([len(text.encode("utf-8", "surrogatepass")) for text in texts], dtype=np.int64),
        names=tuple(document.name for document in documents),
        bytes=reading.bytes,
        read=reading.read,
        removed=dict(reading.removed),
        notes=dict(reading.notes),
        left_out=reading.left_out.to_dict(),
        examples=reading.examples,
        files=reading.files.to_dict(),
    )
    result.save(work.path_of(number))
    return reading.bytes, len(documents), int(tokens.size)


def texts_of_block(work: Work, block: Block) -> list[str]:
    """Cleaned texts of a block's training documents: what a tokenizer is trained on."""
    texts = (document.text for document in _Reading().cleaned(work, block))
    return [text for text in texts if not is_validation(text, work.val_fraction)]


def is_validation(text: str, val_fraction: float) -> bool:
    """A function of the text alone, so that a document never changes sides when the corpus grows."""
    return int.from_bytes(text_digest(text)[:8], "big") < val_fraction * 2**64


def text_digest(text: str) -> bytes:
    """[16] bytes; texts with equal ones are taken to be equal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


class _Reading:
    """Documents of a block as they come out of cleaning, and a count of everything else."""

    def __init__(self) -> None:
        self.bytes = self.read = 0
        self.removed: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.left_out = LeftOutTotals()
        self.examples: dict[str, list[str]] = {}
        self.files = FileTally()

    def cleaned(self, work: Work, block: Block) -> Iterator[Document]:
        """The documents that stay."""
        cleaner = _cleaner(work.cleaning)
        for document in block.documents():
            if isinstance(document, RejectedFile):
                self.files.add(document)
                continue
            self.read += 1
            if document.left_out is not None:
                self.left_out.add(document.name, document.left_out)
            outcome: Cleaned | Rejected
            if isinstance(document, Document):
                self.bytes += _size(document)
                outcome = cleaner.clean(document)
            else:
                outcome = document
            if isinstance(outcome, Rejected):
                self._reject(outcome)
            else:
                self.notes.update(outcome.notes)
                yield outcome.document

    def rendered(self, work: Work, block: Block, tokenizer: Tokenizer) -> tuple[list[Document], list[str]]:
        """The documents that stay, conversations as the chat template has them, and the text of each before that."""
        documents, texts = [], []
        for document in self.cleaned(work, block):
            outcome = tokenizer.rendered(document)
            if isinstance(outcome, Rejected):
                self._reject(outcome)
                continue
            self.notes.update([CONVERSATIONS] if document.is_conversation else [])
            documents.append(outcome)
            texts.append(document.text)
        return documents, texts

    def _reject(self, rejected: Rejected) -> None:
        self.removed[rejected.rule] += 1
        examples = self.examples.setdefault(rejected.rule, [])
        examples += [rejected.name] if len(examples) < EXAMPLES else []


def _size(document: Document) -> int:
    texts: Sequence[str | bytes] = [segment.text for segment in document.segments]
    return sum(len(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")) for text in texts)


@lru_cache(maxsize=1)
def _cleaner(cleaning: Cleaning) -> Cleaner:
    """Built once per process: a decontamination index is not small."""
    return Cleaner(cleaning)


@lru_cache(maxsize=1)
def _tokenizer(path: str, hash_of_it: str | None) -> Tokenizer:  # noqa: ARG001 - part of the key
    return Tokenizer.load(path)
