"""What a rank opens at its start, and when it first reads: nothing that grows with the data, if rank 0 has looked."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from megalm.data.shards.index import Index, read_index
from megalm.data.shards.store import LocalStore
from megalm.data.shards.write import ShardWriter
from megalm.data.stream.sequences import Corpora
from megalm.errors import DataError
from tests.file_counts import counted_files

CHUNK, VOCAB = 16, 100


def write(folder: Path, shards: int, seed: int = 0) -> LocalStore:
    """A split of so many shards, two chunks each."""
    writer = ShardWriter(
        folder, tokenizer_sha256="ab", vocab_size=VOCAB, eos_id=0, chunk_tokens=CHUNK, chunks_per_shard=2
    )
    tokens = np.random.default_rng(seed).integers(0, VOCAB, shards * 2 * CHUNK).astype(np.uint16)
    writer.add(tokens, [tokens.size], ["a document"])
    writer.close()
    return LocalStore(folder)


def sent(index: Index) -> Index:
    """An index as another rank gets it."""
    return Index.from_dict(json.loads(json.dumps(asdict(index.without_checks()))))


def read(corpora: Corpora, *sequences: int) -> np.ndarray:
    numbers = np.array(sequences, dtype=np.int64)
    return corpora.read(np.zeros_like(numbers), numbers).tokens


@pytest.mark.parametrize("shards", [1, 8, 80])
def test_a_rank_that_is_told_opens_nothing_before_it_reads(tmp_path: Path, shards: int) -> None:
    split = write(tmp_path / "s", shards)
    with counted_files(split.folder) as looked:
        first = Corpora.open([split], CHUNK)
    assert looked.indexes() == 1
    assert looked.shards() == (0, 2 * shards), "rank 0 asks for the size of every file"

    known = sent(first.shards[0].index)
    assert not known.checks
    with counted_files(split.folder) as start:
        told = Corpora.open([split], CHUNK, known=[known])
        assert (told.sizes, told.vocab_size, told.eos_id, told.masked) == (first.sizes, VOCAB, 0, False)
        assert told.shards[0].index.fingerprint == first.shards[0].index.fingerprint
    assert not start.opened
    assert not start.asked

    with counted_files(split.folder) as reading:
        found = read(told, 0, 1)  # of one shard
    assert np.array_equal(found, read(first, 0, 1))
    assert reading.indexes() == 1
    assert reading.shards() == (2, 1), "the shard and its hashes, whatever the number of shards"
    with counted_files(split.folder) as again:
        read(told, 1, 0)
    assert not again.opened
    assert not again.asked


def test_a_rank_that_sees_other_contents_refuses_and_names_both(tmp_path: Path) -> None:
    split, other = write(tmp_path / "s", 3), write(tmp_path / "other", 3, seed=1)
    theirs, mine = read_index(split), read_index(other)
    assert theirs.num_sequences(CHUNK) == mine.num_sequences(CHUNK)
    told = Corpora.open([other], CHUNK, known=[sent(theirs)])
    with pytest.raises(DataError) as refused:
        read(told, 0)
    for part in (str(other.folder / "index.json"), theirs.fingerprint[:12], mine.fingerprint[:12], "rank 0"):
        assert part in str(refused.value)


def test_a_rank_that_sees_no_dataset_says_so_when_it_reads(tmp_path: Path) -> None:
    index = read_index(write(tmp_path / "s", 2))
    told = Corpora.open([LocalStore(tmp_path / "elsewhere")], CHUNK, known=[sent(index)])
    with pytest.raises(DataError, match="elsewhere: no dataset here"):
        read(told, 0)


def test_lengths_are_checked_though_nothing_is_opened(tmp_path: Path) -> None:
    split = write(tmp_path / "s", 2)
    with pytest.raises(DataError, match="does not divide the 16 tokens"):
        Corpora.open([split], 5, known=[sent(read_index(split))])
