"""The loader: the same samples at any number of replicas, resumed anywhere; errors arrive, nothing hangs."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.config.schema import Data
from megalm.data.shards.read import TokenShards
from megalm.data.shards.write import ShardWriter
from megalm.data.stream.batch import document_starts
from megalm.data.stream.batch_size import BatchSize
from megalm.data.stream.loader import TrainLoader, validation_batches
from megalm.data.stream.sequences import Corpora
from megalm.errors import DataError
from megalm.objectives.clm import next_tokens

SETTINGS = Data(path=("unused",), block_sequences=2, lanes=3, window_blocks=2)
GLOBAL_BATCH = 12
CONSTANT = BatchSize(GLOBAL_BATCH, GLOBAL_BATCH, GLOBAL_BATCH, 0, sequence_length=8)
RAMP = BatchSize(final=24, start=6, increment=6, ramp_tokens=36 * 8, sequence_length=8)


def write(folder: Path, tokens: int, seed: int = 0, *, masked: bool = False, tokenizer: str = "x") -> TokenShards:
    writer = ShardWriter(
        folder,
        tokenizer_sha256=tokenizer,
        vocab_size=1000,
        eos_id=0,
        chunk_tokens=16,
        chunks_per_shard=4,
        masked=masked,
    )
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, tokens).astype(np.uint8) if masked else None
    writer.add(rng.integers(0, 1000, tokens), [tokens], ["a"], mask)
    writer.close()
    return TokenShards(folder, 8)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Corpora:
    return Corpora((write(tmp_path_factory.mktemp("data"), 301),))


@pytest.fixture(scope="module")
def blend(tmp_path_factory) -> Corpora:
    """Three corpora of 38, 7 and 20 sequences, one of them supervised."""
    folder = tmp_path_factory.mktemp("blend")
    return Corpora((write(folder / "a", 301), write(folder / "b", 50, 1), write(folder / "c", 161, 2, masked=True)))


def loader(dataset: Corpora, dp_rank: int = 0, dp_size: int = 1, **changes) -> TrainLoader:
    settings = replace(SETTINGS, **{k: v for k, v in changes.items() if k not in ("seed", "batch_size")})
    return TrainLoader(
        dataset,
        settings,
        make_batch=next_tokens,
        batch_size=changes.get("batch_size", CONSTANT),
        dp_rank=dp_rank,
        dp_size=dp_size,
        seed=changes.get("seed", 1),
    )


def step(loaders: list[TrainLoader]) -> dict[int, tuple[list[int], list[int], list[float]]]:
    """One global batch by sample number."""
    rows = {}
    for replica in loaders:
        batch = replica.next()
        for i, sample in enumerate(batch.samples.tolist()):
            assert sample not in rows
            rows[sample] = batch.tokens[i].tolist(), batch.labels[i].tolist(), batch.loss_mask[i].tolist()
    return rows


@settings(max_examples=15, deadline=None)
@given(path=st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=4))
def test_any_path_of_replicas_reads_the_stream_of_one(dataset: Corpora, path: list[int]) -> None:
    alone = loader(dataset)
    state = None
    for dp_size in path:
        replicas = [loader(dataset, rank, dp_size) for rank in range(dp_size)]
        for replica in replicas:
            if state is not None:
                replica.load_state_dict(state)
        for _ in range(2):
            assert step(replicas) == step([alone])
        state = replicas[0].state_dict()
        for replica in replicas:
            replica.close()
    alone.close()


@settings(max_examples=10, deadline=None)
@given(stop=st.integers(0, 6), dp_size=st.sampled_from([1, 2, 3, 6]), prefetch=st.sampled_from([1, 4]))
def test_a_ramp_resumed_anywhere_continues_at_any_number_of_replicas(
    dataset: Corpora, stop: int, dp_size: int, prefetch: int
) -> None:
    alone = loader(dataset, batch_size=RAMP)
    straight = [step([alone]) for _ in range(8)]
    assert [len(rows) for rows in straight] == [6, 6, 12, 18, 24, 24, 24, 24]
    before = loader(dataset, batch_size=RAMP)
    for _ in range(stop):
        before.next()
    replicas = [loader(dataset, rank, dp_size, batch_size=RAMP, prefetch_batches=prefetch) for rank in range(dp_size)]
    for replica in replicas:
        replica.load_state_dict(before.state_dict())
    assert [step(replicas) for _ in range(8 - stop)] == straight[stop:]
    for each in (alone, before, *replicas):
        each.close()


def test_another_ramp_cuts_the_same_stream(dataset: Corpora) -> None:
    """A checkpoint of a ramp resumes at a constant batch: no sample is lost, none comes twice or changes."""
    ramping, constant = loader(dataset, batch_size=RAMP), loader(dataset)
    rows = {**step([ramping]), **step([ramping])}
    expected = {**step([constant]), **step([constant])}
    resumed = loader(dataset)
    resumed.load_state_dict(ramping.state_dict())
    assert {**rows, **step([resumed])} == expected
    for each in (ramping, constant, resumed):
        each.close()


def test_every_size_of_a_ramp_splits_over_the_replicas(dataset: Corpora) -> None:
    with pytest.raises(ValueError, match="global batch of 6 does not split over 4 replicas"):
        loader(dataset, 0, 4, batch_size=RAMP)


def test_a_label_is_the_next_token(dataset: Corpora) -> None:
    batch = next(iter(validation_batches(dataset, None, 4, dp_rank=0, dp_size=1, make_batch=next_tokens)))
    assert np.array_equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.tokens.dtype == np.int64


def test_what_was_prefetched_but_not_taken_is_not_counted(dataset: Corpora) -> None:
    replica = loader(dataset, prefetch_batches=4)
    replica.next()
    assert replica.state_dict()["consumed_samples"] == GLOBAL_BATCH
    replica.close()


def test_changed_data_is_refused_and_every_difference_named(dataset: Corpora) -> None:
    state = loader(dataset).state_dict()
    with pytest.raises(DataError) as error:
        loader(dataset, seed=2, lanes=1).load_state_dict(state)
    lines = str(error.value).splitlines()
    assert [line.split("=")[0] for line in lines[:-1]] == ["run.seed", "data.lanes"]
    assert "run.seed=2: the checkpoint was trained with 1" in lines[0]


def test_a_corrupt_chunk_reaches_the_trainer_every_time_and_the_thread_ends(dataset: Corpora, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in Path(dataset.shards[0].store.location).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for shard in folder.glob("*.tar"):
        data = bytearray(shard.read_bytes())
        for offset in range(645, len(data) - 1024, 1024):
            data[offset] ^= 1
        shard.write_bytes(data)
    replica = loader(Corpora((TokenShards(folder, 8),)))
    for _ in range(2):
        with pytest.raises(DataError, match="checksum differs"):
            replica.next()
    replica.close()
    assert not any(thread.name == "megalm-data" for thread in threading.enumerate())


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("samples", [None, 1, 7])
def test_validation_counts_every_sequence_once(dataset: Corpora, dp_size: int, samples: int | None) -> None:
    replicas = [
        list(validation_batches(dataset, samples, 4, dp_rank=r, dp_size=dp_size, make_batch=next_tokens))
        for r in range(dp_size)
    ]
    assert len({len(batches) for batches in replicas}) == 1
    counted = {}
    for batches in replicas:
        for batch in batches:
            assert batch.tokens.shape == (4, 8)
            for i, sample in enumerate(batch.samples.tolist()):
                if batch.loss_mask[i].any():
                    assert sample not in counted
                    counted[sample] = float(batch.loss_mask[i].sum())
    total = sum(dataset.sizes) if samples is None else samples
    assert sorted(counted) == list(range(total))
    assert sum(counted.values()) == (dataset.shards[0].index.labels if samples is None else 8 * samples)


@settings(max_examples=15, deadline=None)
@given(
    path=st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=4),
    weights=st.sampled_from([(), (1.0, 2.0, 0.5), (0.2, 0.2, 0.6)]),
    lanes=st.integers(1, 4),
)
def test_any_path_of_replicas_reads_the_stream_of_one_from_a_blend(
    blend: Corpora, path: list[int], weights: tuple[float, ...], lanes: int
) -> None:
    changes = {"weights": weights, "lanes": lanes}
    alone, state = loader(blend, **changes), None
    for dp_size in path:
        replicas = [loader(blend, rank, dp_size, **changes) for rank in range(dp_size)]
        for replica in replicas:
            if state is not None:
                replica.load_state_dict(state)
        for _ in range(3):
            assert step(replicas) == step([alone])
        state = replicas[0].state_dict()
        for replica in replicas:
            replica.close()
    alone.close()


def test_a_blend_repeats_the_small_corpus_and_masks_the_supervised_one(blend: Corpora) -> None:
    replica = loader(blend, weights=(1.0, 1.0, 1.0))
    seen: dict[tuple[int, ...], int] = {}
    masks = []
    for _ in range(10):
        batch = replica.next()
        for row in batch.tokens.tolist():
            seen[tuple(row)] = seen.get(tuple(row), 0) + 1
        masks.append(float(batch.loss_mask.mean()))
    replica.close()
    small = [seen.get(tuple(row), 0) for row in blend.read(np.ones(7, int), np.arange(7)).tokens[:, :-1].tolist()]
    large = [seen.get(tuple(row), 0) for row in blend.read(np.zeros(38, int), np.arange(38)).tokens[:, :-1].tolist()]
    assert min(small) >= 5 and max(small) <= 6, "forty samples of seven sequences"
    assert max(large) <= 2
    assert max(masks) < 1.0, "a third of the rows has half of its tokens masked"


def test_another_blend_is_refused_and_a_new_phase_takes_it(blend: Corpora, dataset: Corpora) -> None:
    first = loader(blend, weights=(1.0, 1.0, 1.0))
    first.next()
    state = first.state_dict()
    first.close()
    with pytest.raises(DataError) as error:
        loader(dataset).load_state_dict(state)
    text = str(error.value)
    assert "data.path[1]=nothing: the checkpoint was trained with contents " in text
    assert "data.weights=[65536]: the checkpoint was trained with [21846, 21845, 21845]" in text
    assert "data.phase=1 begins a new phase with these" in text

    second = loader(dataset, phase=1)
    second.load_state_dict(state)
    rows = step([second])
    assert min(rows) == GLOBAL_BATCH, "sample numbers go on"
    again = loader(dataset, phase=1)
    again.load_state_dict(second.state_dict())
    assert step([again]) == step([second])
    with pytest.raises(DataError, match=r"data\.phase=0: the checkpoint is in phase 1 already"):
        loader(dataset).load_state_dict(second.state_dict())
    first_phase = loader(dataset)
    assert list(step([first_phase]).values()) != list(rows.values()), "nor with what the first phase began with"
    first_phase.close()
    fresh = loader(dataset, phase=1)
    assert list(step([fresh]).values()) == list(rows.values()), "a phase begins at its own beginning"
    for each in (second, again, fresh):
        each.close()


def test_corpora_of_different_tokenizers_are_refused(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", 50), write(tmp_path / "b", 50, tokenizer="y")
    with pytest.raises(DataError, match="were made by different tokenizers"):
        Corpora.open([first.store, second.store], 8)


@pytest.mark.parametrize("samples", [None, 1, 10, 64])
def test_validation_of_a_blend_takes_a_share_of_each(blend: Corpora, samples: int | None) -> None:
    batches = list(validation_batches(blend, samples, 4, dp_rank=0, dp_size=1, make_batch=next_tokens))
    rows = sum(int(batch.loss_mask.any(axis=1).sum()) for batch in batches)
    assert rows == (65 if samples is None else samples)
    corpus, sequence = blend.first(samples)
    assert len({*zip(corpus.tolist(), sequence.tolist(), strict=True)}) == corpus.size
    if samples == 64:
        assert np.bincount(corpus).min() >= 6


@pytest.fixture(scope="module")
def pairs(blend: Corpora) -> Corpora:
    """19, 3 and 10 pairs; the odd sequence of the second corpus is left out."""
    return replace(blend, sequences_per_example=2)


def test_neighbouring_sequences_that_belong_together_are_never_parted(pairs: Corpora) -> None:
    assert pairs.sizes == (19, 3, 10)
    stored = {
        tuple(pair.ravel().tolist())
        for corpus, size in enumerate(pairs.sizes)
        for pair in pairs.read(np.full(size, corpus), np.arange(size)).tokens[:, :-1].reshape(size, 2, 8)
    }
    alone, replicas = loader(pairs), [loader(pairs, rank, 3) for rank in range(3)]
    for number in range(6):
        batches = [replica.next() for replica in replicas]
        for batch in batches:
            assert batch.samples.reshape(-1, 2).tolist() == [[s, s + 1] for s in batch.samples[::2].tolist()]
            assert {tuple(pair.ravel().tolist()) for pair in batch.tokens.reshape(-1, 2, 8)} <= stored
        rows = {s: row.tolist() for batch in batches for s, row in zip(batch.samples, batch.tokens, strict=True)}
        assert sorted(rows) == list(range(12 * number, 12 * number + 12))
        whole = alone.next()
        assert [rows[s] for s in whole.samples] == whole.tokens.tolist()
    state = alone.state_dict()
    assert state["consumed_samples"] == sum(entry["samples"] for entry in state["corpora"]) == 72
    resumed = loader(pairs)
    resumed.load_state_dict(state)
    assert resumed.next().tokens.tolist() == alone.next().tokens.tolist()
    for each in (alone, resumed, *replicas):
        each.close()


def test_another_grouping_is_another_order(blend: Corpora, pairs: Corpora) -> None:
    with pytest.raises(DataError, match="sequences per example=nothing: the checkpoint was trained with 2"):
        loader(blend).load_state_dict(loader(pairs).state_dict())


def test_batches_hold_whole_groups(pairs: Corpora) -> None:
    with pytest.raises(ValueError, match="global batch of 12 does not split over 4 replicas in groups of 2 sequences"):
        loader(pairs, 0, 4)


@pytest.mark.parametrize("dp_size", [1, 2])
def test_validation_of_pairs_counts_every_pair_once(pairs: Corpora, dp_size: int) -> None:
    seen = []
    for rank in range(dp_size):
        for batch in validation_batches(pairs, None, 4, dp_rank=rank, dp_size=dp_size, make_batch=next_tokens):
            assert batch.tokens.shape == (4, 8)
            seen += [s for s, mask in zip(batch.samples.tolist(), batch.loss_mask, strict=True) if mask.any()]
    assert sorted(seen) == list(range(64))


def test_documents_begin_after_each_end_in_the_rows_as_they_are_stored(dataset: Corpora) -> None:
    """Whatever an objective puts in their place; and where nobody asks, nothing is looked for."""

    def hidden(rows, samples):
        batch = next_tokens(rows, samples)
        return replace(batch, tokens=np.full_like(batch.tokens, 7))

    (plain, *_) = validation_batches(dataset, None, 32, dp_rank=0, dp_size=1, make_batch=next_tokens)
    assert plain.document_starts is None
    (batch, *_) = validation_batches(
        dataset, None, 32, dp_rank=0, dp_size=1, make_batch=hidden, reset_at_documents=True
    )
    assert np.array_equal(batch.document_starts, document_starts(plain.tokens, 0))
    replica = loader(dataset, reset_at_documents=True)
    taken = replica.next()
    assert np.array_equal(taken.document_starts, document_starts(taken.tokens, 0))
    replica.close()
