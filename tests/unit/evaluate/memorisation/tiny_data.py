"""Datasets whose passages a test counts by looking at every sequence that a run took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megalm.config.schema import Data
from megalm.data.shards.read import TokenShards
from megalm.data.shards.tokens import SplitTokens
from megalm.data.shards.write import ShardWriter
from megalm.data.stream.batch_size import BatchSize
from megalm.data.stream.ledger import Ledger, Steps
from megalm.data.stream.phases import order_of
from megalm.data.stream.sequences import Corpora
from megalm.evaluate.memorisation.seen import RunData

LENGTH = 16
END = 0
BATCH = BatchSize(final=4, start=4, increment=4, ramp_tokens=0, sequence_length=LENGTH)


def split(folder: Path, documents: Sequence[tuple[str, Sequence[int]]]) -> Path:
    """Documents by name; each gets the token that ends it. Two chunks of 32 tokens a shard."""
    writer = ShardWriter(folder, tokenizer_sha256="x", vocab_size=999, eos_id=END, chunk_tokens=32, chunks_per_shard=2)
    for name, tokens in documents:
        writer.add(np.array([*tokens, END]), [len(tokens) + 1], [name])
    writer.close()
    return folder


def run_data(
    train: Sequence[Path], held_out: Sequence[Path], samples: int, *, weights: tuple[float, ...] = ()
) -> tuple[RunData, Corpora]:
    """The data of a run that has taken some samples, four a step."""
    corpora = Corpora(tuple(TokenShards(folder, LENGTH) for folder in train))
    order = order_of(corpora, Data(path=("unused",), weights=weights, lanes=2), 3)
    steps = Steps(list(range(4, samples + 1, 4)), BATCH)
    ledger = Ledger(corpora, order, start=0, end=samples, steps=steps)
    of_train = tuple(SplitTokens(shards.store) for shards in corpora.shards)
    of_held_out = tuple(SplitTokens(TokenShards(folder, LENGTH).store) for folder in held_out)
    return RunData(of_train, of_held_out, ledger, samples, LENGTH), corpora


def sequences_read(data: RunData, corpora: Corpora, weights: tuple[float, ...] = ()) -> list[tuple[int, int]]:
    """(dataset, sequence) of each sample that the run took, in order."""
    order = order_of(corpora, Data(path=("unused",), weights=weights, lanes=2), 3)
    dataset, _, sequence = order(np.arange(data.samples))
    return list(zip(dataset.tolist(), sequence.tolist(), strict=True))
