"""The ledger: which documents a step saw, which steps saw a document, against a loader that is really read."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megalm.config.schema import Data
from megalm.data.shards.documents import documents_of_shard
from megalm.data.shards.read import TokenShards
from megalm.data.shards.write import ShardWriter
from megalm.data.stream.batch_size import BatchSize
from megalm.data.stream.ledger import Ledger, Steps
from megalm.data.stream.loader import TrainLoader
from megalm.data.stream.phases import order_of
from megalm.data.stream.sequences import Corpora
from megalm.errors import DataError
from megalm.objectives.clm import next_tokens

LENGTH = 8
SETTINGS = Data(path=("unused",), weights=(2.0, 1.0), lanes=2)
BATCH = BatchSize(final=12, start=4, increment=4, ramp_tokens=8 * 40, sequence_length=LENGTH)
STEPS = 12


@pytest.fixture(scope="module", params=[1, 2], ids=["sequences", "pairs"])
def corpora(request, tmp_path_factory) -> Corpora:
    """Tokens tell their document: document d of corpus c is full of the number 100 · c + d."""
    shards = []
    for corpus, documents in enumerate(([30, 3, 90, 8, 1, 61], [40, 40])):
        folder = tmp_path_factory.mktemp("ledger") / str(corpus)
        writer = ShardWriter(
            folder, tokenizer_sha256="x", vocab_size=999, eos_id=0, chunk_tokens=16, chunks_per_shard=2
        )
        for number, length in enumerate(documents):
            writer.add(np.full(length, 100 * corpus + number + 1), [length], [f"{corpus}/{number}"])
        writer.close()
        shards.append(TokenShards(folder, LENGTH))
    return Corpora(tuple(shards), request.param)


@pytest.fixture(scope="module")
def seen(corpora: Corpora) -> list[dict[int, set[str]]]:
    """By step, the documents of each sample, from the tokens that a loader gave."""
    loader = TrainLoader(corpora, SETTINGS, make_batch=next_tokens, batch_size=BATCH, dp_rank=0, dp_size=1, seed=3)
    steps = []
    for _ in range(STEPS):
        batch = loader.next()
        steps.append({})
        for sample, tokens, labels, mask in zip(
            batch.samples.tolist(), batch.tokens, batch.labels, batch.loss_mask, strict=True
        ):
            real = set(labels[mask.astype(bool)].tolist()) | set(tokens[mask.astype(bool)].tolist())
            steps[-1][sample] = {f"{token // 100}/{token % 100 - 1}" for token in real}
    loader.close()
    return steps


@pytest.fixture
def ledger(corpora: Corpora, seen: list[dict[int, set[str]]]) -> Ledger:
    recorded = [max(step) + 1 for step in seen[:9]]
    return Ledger(corpora, order_of(corpora, SETTINGS, 3), start=0, end=recorded[-1], steps=Steps(recorded, BATCH))


def test_a_step_lists_the_documents_that_it_saw(ledger: Ledger, seen: list[dict[int, set[str]]]) -> None:
    """Also of steps that are yet to come."""
    for number, samples in enumerate(seen, start=1):
        listed = {source.sample: {d.name for d in source.documents} for source in ledger.sources_of_step(number)}
        assert listed == samples


def test_a_document_lists_the_steps_that_saw_it(ledger: Ledger, seen: list[dict[int, set[str]]]) -> None:
    for name in ("0/0", "0/1", "0/2", "0/3", "0/4", "0/5", "1/0", "1/1"):
        readings = ledger.readings_of_document(name)
        expected = [
            (step, sample)
            for step, samples in enumerate(seen[:9], start=1)
            for sample, names in sorted(samples.items())
            if name in names
        ]
        assert [(r.step, r.sample) for r in readings] == expected
        assert all(0 <= r.first <= r.last < r.document.tokens for r in readings)
    assert any(r.epoch for r in ledger.readings_of_document("1/0")), "the small corpus was read again"


@pytest.mark.parametrize("tokens", [2, 8, 9, 10, 25])
def test_passages_are_counted_as_often_as_a_loader_gave_their_tokens(
    ledger: Ledger, corpora: Corpora, tokens: int
) -> None:
    """Of a passage that lies in several sequences, as often as the rarest was read."""
    order, each, length = order_of(corpora, SETTINGS, 3), corpora.sequences_per_example, LENGTH
    taken = ledger._end // each
    of_examples = list(zip(*(part.tolist() for part in order(np.arange(taken))), strict=True))
    for corpus, shards in enumerate(corpora.shards):
        read = Counter(number * each + within for c, _, number in of_examples if c == corpus for within in range(each))
        starts = np.arange(shards.index.tokens - tokens + 1)
        brute = [
            min(read[sequence] for sequence in {(start + offset) // length for offset in range(tokens - 1)})
            for start in starts.tolist()
        ]
        assert ledger.times_read(corpus, starts, tokens).tolist() == brute
        assert max(brute) > 0


def test_the_steps_that_read_a_token_are_those_that_saw_it(ledger: Ledger) -> None:
    readings = ledger.readings_of_document("0/2")
    for token in range(33, 33 + 90 - 1):
        expected = [r.step for r in readings if r.first <= token - 33 < r.last]
        assert ledger.steps_reading(0, token) == expected


def test_a_name_that_no_document_has(ledger: Ledger) -> None:
    with pytest.raises(DataError, match=r"--document /5: none of the 8 documents has that name; did you mean 0/5\?"):
        ledger.readings_of_document("/5")


def test_a_damaged_list_of_documents_is_named(corpora: Corpora, tmp_path: Path) -> None:
    for path in Path(corpora.shards[1].store.location).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "shard-000000.documents.jsonl").write_text(json.dumps({"begin": 1}) + "\n")
    broken = Corpora((TokenShards(tmp_path, LENGTH),))
    with pytest.raises(DataError, match=r"shard-000000\.documents\.jsonl: damaged"):
        list(documents_of_shard(broken.shards[0].store, broken.shards[0].index, 0))


def test_a_phase_counts_from_its_start(corpora: Corpora) -> None:
    order = order_of(corpora, SETTINGS, 3)
    first = Ledger(corpora, order, start=0, end=50, steps=Steps([], BATCH))
    later = Ledger(corpora, order, start=1000, end=1050, steps=Steps([], BATCH))
    assert first.source_of_sample(7).documents == later.source_of_sample(1007).documents


def test_a_run_that_went_on_from_another_counts_from_there(ledger: Ledger) -> None:
    """Its record begins with step 11, after 100 samples of batches that no config of today tells."""
    planned = BATCH.resumed(124, 124 * LENGTH)
    steps = Steps([112, 124], planned, earlier_steps=10, earlier_samples=100)
    assert [steps.samples_of(step) for step in (11, 12)] == [range(100, 112), range(112, 124)]
    assert steps.samples_of(14) == range(136, 148)
    assert [steps.step_of(sample) for sample in (100, 111, 112)] == [11, 11, 12]
    with pytest.raises(DataError, match=r"--step 10: the record of this run begins with step 11"):
        steps.samples_of(10)
    assert all(reading.sample >= 100 for reading in _with(ledger, steps).readings_of_document("1/0"))


def _with(ledger: Ledger, steps: Steps) -> Ledger:
    return Ledger(ledger._corpora, ledger._order, start=0, end=steps.samples, steps=steps)
