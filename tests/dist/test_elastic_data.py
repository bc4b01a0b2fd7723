"""The stream of samples across real processes that are killed, and come back as another number of them.

Every rank writes down what it was given, as the trainer would take it; after each step rank 0 saves the loader's state,
as a checkpoint would. Ranks are killed at a random moment, and the run goes on from the last state with other ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from megalm.config.schema import Data
from megalm.data.shards.read import TokenShards
from megalm.data.shards.write import ShardWriter
from megalm.data.stream.batch_size import BatchSize
from megalm.data.stream.loader import TrainLoader
from megalm.data.stream.sequences import Corpora
from megalm.objectives.clm import next_tokens

LENGTH, GLOBAL_BATCH = 16, 24
STEPS_PER_LIFE = 12
DEGREES = (1, 4, 3, 8, 2)
SETTINGS = Data(path=("unused",), weights=(1.0, 2.0), lanes=3, block_sequences=2, window_blocks=4)


def make_loader(folder: Path, rank: int, degree: int) -> TrainLoader:
    return TrainLoader(
        Corpora((TokenShards(folder / "a", LENGTH), TokenShards(folder / "b", LENGTH))),
        SETTINGS,
        make_batch=next_tokens,
        batch_size=BatchSize(GLOBAL_BATCH, GLOBAL_BATCH, GLOBAL_BATCH, 0, LENGTH),
        dp_rank=rank,
        dp_size=degree,
        seed=5,
    )


def live(folder: Path, life: int, rank: int, degree: int, barrier) -> None:
    """One rank of one life: it goes on until it is killed."""
    loader = make_loader(folder, rank, degree)
    state = folder / "state.json"
    if state.exists():
        loader.load_state_dict(json.loads(state.read_text()))
    with (folder / f"log-{life}-{rank}").open("a") as log, contextlib.suppress(threading.BrokenBarrierError):
        while True:
            batch = loader.next()
            for sample, tokens, labels in zip(batch.samples.tolist(), batch.tokens, batch.labels, strict=True):
                digest = hashlib.sha256(tokens.tobytes() + labels.tobytes()).hexdigest()
                log.write(f"{sample} {digest}\n")
            log.flush()
            barrier.wait(timeout=60)  # all have taken the step before it counts
            if rank == 0:
                temporary = folder / "state.tmp"
                temporary.write_text(json.dumps(loader.state_dict()))
                temporary.replace(state)
            barrier.wait(timeout=60)
            time.sleep(0.002)


def consumed(folder: Path) -> int:
    path = folder / "state.json"
    return json.loads(path.read_text())["consumed_samples"] if path.exists() else 0


@pytest.mark.slow
def test_killed_and_resumed_on_any_number_of_ranks_it_is_the_stream_of_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for name, tokens in (("a", 3000), ("b", 20_000)):
        writer = ShardWriter(
            tmp_path / name, tokenizer_sha256="x", vocab_size=999, eos_id=0, chunk_tokens=64, chunks_per_shard=8
        )
        writer.add(rng.integers(0, 999, tokens), [tokens], [name])
        writer.close()
    context = multiprocessing.get_context("spawn")
    os.environ["OMP_NUM_THREADS"] = "1"
    moments = random.Random(7)
    for life, degree in enumerate(DEGREES):
        barrier = context.Barrier(degree)
        before = consumed(tmp_path)
        ranks = [context.Process(target=live, args=(tmp_path, life, r, degree, barrier)) for r in range(degree)]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + 120
        while consumed(tmp_path) < before + STEPS_PER_LIFE * GLOBAL_BATCH:
            assert time.monotonic() < deadline, "the ranks do not get on"
            assert all(process.is_alive() for process in ranks)
            time.sleep(0.01)
        time.sleep(moments.random() * 0.05)
        for process in moments.sample(ranks, len(ranks)):
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
        for process in ranks:
            process.join(30)

    total = consumed(tmp_path)
    assert total >= len(DEGREES) * STEPS_PER_LIFE * GLOBAL_BATCH
    alone = make_loader(tmp_path, 0, 1)
    expected: dict[int, str] = {}
    while len(expected) < total + GLOBAL_BATCH:
        batch = alone.next()
        for sample, tokens, labels in zip(batch.samples.tolist(), batch.tokens, batch.labels, strict=True):
            expected[sample] = hashlib.sha256(tokens.tobytes() + labels.tobytes()).hexdigest()
    alone.close()

    seen: dict[int, set[str]] = {}
    for path in tmp_path.glob("log-*"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # the last line of a killed process may be torn
                sample, digest = line.split()
                seen.setdefault(int(sample), set()).add(digest)
    assert set(range(total)) <= seen.keys(), "no sample was left out"
    assert max(seen) < total + GLOBAL_BATCH, "at most the step that was not saved was taken too early"
    assert all(digests == {expected[sample]} for sample, digests in seen.items()), "token for token"
