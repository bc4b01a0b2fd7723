"""Corpus ▶ token shards: tokenise in parallel, split into training and validation, write the shards.

The output is the same to the last byte for any number of workers: documents are handed out and written in the order of
the corpus. A dataset appears in one rename; what a killed preparation leaves behind is not mistaken for one.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megalm.data.corpora import CORPORA, Corpus
from megalm.data.dataset import SPLITS, TOKENIZER_FILE, partial_folder
from megalm.data.index import Index
from megalm.data.shards import ShardWriter
from megalm.data.tokenizer import Tokenizer, train_byte_level_bpe
from megalm.errors import DataError

RECIPE_FILE = "recipe.json"
TOKENIZER_TRAINING_BYTES = 64 * 2**20
"""A byte-level BPE hardly changes with more text than this, but its training takes memory in proportion."""
_BATCH_BYTES = 2**20
"""Text handed to a worker at once."""
_Encoded = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""Tokens of a batch end to end, and the length of each document."""


@dataclass(frozen=True)
class Recipe:
    """What decides the bytes of a dataset, besides the corpus.

    Attributes:
        corpus: a name in ``CORPORA``.
        inputs: files or folders, for corpora that take them.
        tokenizer: path of a ``tokenizer.json``; None: train one.
        tokenizer_vocab: vocabulary of the tokenizer to train.
        val_fraction: share of documents that go to validation, chosen by a hash of their text.
        chunk_tokens: tokens per chunk; sequence lengths must divide it.
        chunks_per_shard: chunks per tar file.
    """

    corpus: str
    inputs: tuple[str, ...] = ()
    tokenizer: str | None = None
    tokenizer_vocab: int | None = None
    val_fraction: float = 0.02
    chunk_tokens: int = 8192
    chunks_per_shard: int = 4096


@dataclass
class Counts:
    """What happened to the documents of one preparation."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    empty: int = 0
    undecodable: int = 0
    seconds: float = field(default=0.0, compare=False)


Progress = Callable[[str, int, int, Counts], None]
"""(phase, bytes done, bytes in all, counts so far)"""


def prepare(recipe: Recipe, out: Path, *, workers: int, overwrite: bool, progress: Progress) -> Counts | None:
    """Write the dataset ``out``; None if it is there already, made by the same recipe from the same files.

    Raises:
        DataError: the corpus or the tokenizer cannot be read, a split would be empty, or ``out`` holds something else.
    """
    corpus = CORPORA[recipe.corpus](recipe.inputs)
    signature = _signature(recipe, corpus)
    if out.exists() and not overwrite:
        if _recorded_signature(out) == signature:
            return None
        raise DataError(
            f"{out}: exists and was made from other files or with other settings; --overwrite replaces it, "
            "another --out keeps it"
        )
    if out.exists() and not (out / RECIPE_FILE).is_file():
        raise DataError(f"{out}: exists and is no prepared dataset, so --overwrite leaves it alone; remove it yourself")
    partial = partial_folder(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        counts = _write_dataset(recipe, corpus, signature, partial, workers, progress)
    except BaseException:  # an interrupt too: only a kill leaves something behind, and the next run removes that
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _put_in_place(partial, out)
    return counts


def _write_dataset(
    recipe: Recipe, corpus: Corpus, signature: str, folder: Path, workers: int, progress: Progress
) -> Counts:
    started = time.perf_counter()
    tokenizer = _tokenizer(recipe, corpus, progress)
    (folder / TOKENIZER_FILE).write_text(tokenizer.definition, encoding="utf-8")
    counts, indexes = _write_splits(recipe, corpus, tokenizer, folder, workers, progress)
    counts.seconds = time.perf_counter() - started
    splits = {split: {"documents": i.documents, "tokens": i.tokens} for split, i in indexes.items()}
    record = {"signature": signature, "source": corpus.source, **asdict(recipe), "counts": asdict(counts), **splits}
    (folder / RECIPE_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return counts


def _put_in_place(partial: Path, out: Path) -> None:
    """Two renames: ``out`` never holds half a dataset, and the old one goes only when the new one is whole."""
    replaced = out.with_name(f".{out.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if out.exists():
        out.rename(replaced)
    partial.rename(out)
    shutil.rmtree(replaced, ignore_errors=True)


def documents_of(corpus: Corpus, counts: Counts) -> Iterator[str]:
    """The documents as text, in order; counts those left out and those whose bytes are no UTF-8, which are replaced."""
    for data in corpus.documents():
        counts.bytes += len(data)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = data.decode("utf-8", errors="replace")
            counts.undecodable += 1
        if not text.strip():
            counts.empty += 1
            continue
        counts.documents += 1
        yield text


def split_of(text: str, val_fraction: float) -> str:
    """``train`` or ``val``: a function of the text alone, so a document never changes sides when the corpus grows."""
    digest = hashlib.sha256(text.encode("utf-8", errors="replace")).digest()
    return "val" if int.from_bytes(digest[:8], "big") < val_fraction * 2**64 else "train"


def _tokenizer(recipe: Recipe, corpus: Corpus, progress: Progress) -> Tokenizer:
    if recipe.tokenizer is not None:
        return Tokenizer.load(recipe.tokenizer)
    assert recipe.tokenizer_vocab is not None
    counts = Counts()
    total = min(corpus.total_bytes, TOKENIZER_TRAINING_BYTES)

    def training_texts() -> Iterator[str]:
        for text in documents_of(corpus, counts):
            if counts.bytes > TOKENIZER_TRAINING_BYTES:
                return
            progress("training the tokenizer", min(counts.bytes, total), total, counts)
            if split_of(text, recipe.val_fraction) == "train":
                yield text

    return train_byte_level_bpe(training_texts(), recipe.tokenizer_vocab)


def _write_splits(
    recipe: Recipe, corpus: Corpus, tokenizer: Tokenizer, folder: Path, workers: int, progress: Progress
) -> tuple[Counts, dict[str, Index]]:
    writers = {
        split: ShardWriter(
            folder / split,
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            chunk_tokens=recipe.chunk_tokens,
            chunks_per_shard=recipe.chunks_per_shard,
        )
        for split in SPLITS
    }
    counts = Counts()
    total = corpus.total_bytes
    for batch, tokens, lengths in _tokenised(documents_of(corpus, counts), tokenizer, workers):
        ends = np.cumsum(lengths)
        for text, start, end in zip(batch, (ends - lengths).tolist(), ends.tolist(), strict=True):
            writers[split_of(text, recipe.val_fraction)].add(tokens[start:end], documents=1)
        counts.tokens += int(tokens.size)
        progress("tokenising", min(counts.bytes, total), total, counts)
    if counts.documents == 0:
        raise DataError(f"{corpus.source}: no document with any text in it; give other --input")
    for split, writer in writers.items():
        if writer.documents == 0:
            other = "smaller" if split == "train" else "larger"
            raise DataError(
                f"--val-fraction {recipe.val_fraction}: none of the {counts.documents} documents falls into {split}; "
                f"a {other} fraction or more documents would fill it"
            )
    return counts, {split: writer.close() for split, writer in writers.items()}


def _tokenised(
    texts: Iterator[str], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[list[str], NDArray[np.uint32], NDArray[np.int64]]]:
    """Batches of documents with their tokens, in the order of the corpus."""
    batches = _batches(texts)
    if workers <= 1:
        for batch in batches:
            yield batch, *tokenizer.encode_documents(batch)
        return
    # Spawned, not forked: forked children inherit the library's threads. A few batches are in flight, so that memory is
    # bounded however large the corpus is.
    # An executor, not a multiprocessing.Pool: when a worker is killed (out of memory), a Pool waits for ever.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(tokenizer.definition,))
    in_flight: deque[tuple[list[str], Future[_Encoded]]] = deque()
    try:
        for batch in batches:
            in_flight.append((batch, pool.submit(_encode, batch)))
            if len(in_flight) > 2 * workers:
                done, result = in_flight.popleft()
                yield done, *result.result()
        while in_flight:
            done, result = in_flight.popleft()
            yield done, *result.result()
    except BrokenProcessPool:
        raise DataError(
            f"--workers {workers}: a worker process was killed, most likely for memory; use fewer workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_worker_tokenizer: dict[str, Tokenizer] = {}
"""The tokenizer of a worker process, which receives it once instead of with every batch."""


def _start_worker(definition: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone reports it
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer["current"] = Tokenizer(definition)


def _encode(batch: list[str]) -> _Encoded:
    return _worker_tokenizer["current"].encode_documents(batch)


def _signature(recipe: Recipe, corpus: Corpus) -> str:
    """Changes with anything that would change the dataset."""
    given = None if recipe.tokenizer is None else Tokenizer.load(recipe.tokenizer).sha256
    parts = {**asdict(recipe), "tokenizer": given, "inputs": None, "files": corpus.fingerprint()}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _recorded_signature(out: Path) -> str | None:
    try:
        record = json.loads((out / RECIPE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return str(record.get("signature"))
