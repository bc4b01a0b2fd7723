"""The loader: the same samples at any number of replicas, resumed anywhere; errors arrive, nothing hangs."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.config.schema import Data
from megalm.data.batch_size import BatchSize
from megalm.data.loader import TrainLoader, validation_batches
from megalm.data.objectives import CausalLM
from megalm.data.shards import ShardWriter, TokenShards
from megalm.errors import DataError

SETTINGS = Data(path=("unused",), block_sequences=2, lanes=3, window_blocks=2)
GLOBAL_BATCH = 12
CONSTANT = BatchSize(GLOBAL_BATCH, GLOBAL_BATCH, GLOBAL_BATCH, 0, sequence_length=8)
RAMP = BatchSize(final=24, start=6, increment=6, ramp_tokens=36 * 8, sequence_length=8)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> TokenShards:
    folder = tmp_path_factory.mktemp("data")
    writer = ShardWriter(folder, tokenizer_sha256="x", vocab_size=1000, eos_id=0, chunk_tokens=16, chunks_per_shard=4)
    writer.add(np.random.default_rng(0).integers(0, 1000, 301), documents=3)
    writer.close()
    return TokenShards(folder, 8)


def loader(dataset: TokenShards, dp_rank: int = 0, dp_size: int = 1, **changes) -> TrainLoader:
    settings = replace(SETTINGS, **{k: v for k, v in changes.items() if k not in ("seed", "batch_size")})
    return TrainLoader(
        dataset,
        settings,
        objective=CausalLM(),
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
def test_any_path_of_replicas_reads_the_stream_of_one(dataset: TokenShards, path: list[int]) -> None:
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
    dataset: TokenShards, stop: int, dp_size: int, prefetch: int
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


def test_another_ramp_cuts_the_same_stream(dataset: TokenShards) -> None:
    """A checkpoint of a ramp resumes at a constant batch: no sample is lost, none comes twice or changes."""
    ramping, constant = loader(dataset, batch_size=RAMP), loader(dataset)
    rows = {**step([ramping]), **step([ramping])}
    expected = {**step([constant]), **step([constant])}
    resumed = loader(dataset)
    resumed.load_state_dict(ramping.state_dict())
    assert {**rows, **step([resumed])} == expected
    for each in (ramping, constant, resumed):
        each.close()


def test_every_size_of_a_ramp_splits_over_the_replicas(dataset: TokenShards) -> None:
    with pytest.raises(ValueError, match="global batch of 6 does not split over 4 replicas"):
        loader(dataset, 0, 4, batch_size=RAMP)


def test_a_label_is_the_next_token(dataset: TokenShards) -> None:
    batch = next(iter(validation_batches(dataset, None, 4, dp_rank=0, dp_size=1)))
    assert torch.equal(batch.tokens[:, 1:], batch.labels[:, :-1])
    assert batch.tokens.dtype is torch.int64


def test_what_was_prefetched_but_not_taken_is_not_counted(dataset: TokenShards) -> None:
    replica = loader(dataset, prefetch_batches=4)
    replica.next()
    assert replica.state_dict()["consumed_samples"] == GLOBAL_BATCH
    replica.close()


def test_changed_data_is_refused_and_every_difference_named(dataset: TokenShards) -> None:
    state = loader(dataset).state_dict()
    with pytest.raises(DataError) as error:
        loader(dataset, seed=2, lanes=1).load_state_dict(state)
    lines = str(error.value).splitlines()
    assert [line.split("=")[0] for line in lines] == ["run.seed", "data.lanes"]
    assert "run.seed=2: the checkpoint was trained with 1" in lines[0]


def test_a_corrupt_chunk_reaches_the_trainer_every_time_and_the_thread_ends(
    dataset: TokenShards, tmp_path: Path
) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in dataset.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for shard in folder.glob("*.tar"):
        data = bytearray(shard.read_bytes())
        for offset in range(645, len(data) - 1024, 1024):
            data[offset] ^= 1
        shard.write_bytes(data)
    replica = loader(TokenShards(folder, 8))
    for _ in range(2):
        with pytest.raises(DataError, match="checksum differs"):
            replica.next()
    replica.close()
    assert not any(thread.name == "megalm-data" for thread in threading.enumerate())


@pytest.mark.parametrize("dp_size", [1, 2, 3])
@pytest.mark.parametrize("samples", [None, 1, 7])
def test_validation_counts_every_sequence_once(dataset: TokenShards, dp_size: int, samples: int | None) -> None:
    replicas = [list(validation_batches(dataset, samples, 4, dp_rank=r, dp_size=dp_size)) for r in range(dp_size)]
    assert len({len(batches) for batches in replicas}) == 1
    counted = {}
    for batches in replicas:
        for batch in batches:
            assert batch.tokens.shape == (4, 8)
            for i, sample in enumerate(batch.samples.tolist()):
                if batch.loss_mask[i].any():
                    assert sample not in counted
                    counted[sample] = float(batch.loss_mask[i].sum())
    total = len(dataset) if samples is None else samples
    assert sorted(counted) == list(range(total))
    assert sum(counted.values()) == (dataset.index.labels if samples is None else 8 * samples)
