"""What data cost: preparing them, reading them, and starting on a very large index.

Speeds are tokens per second of CPU time, of all threads of one process, so that they mean the same on any number of
cores; files are in the page cache. Readers take turns, round by round, and each figure is the median.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.table import Report, Row
from megalm.config.schema import Data
from megalm.data.prepare.blocks import Work, texts_of_block, tokenise_block
from megalm.data.prepare.clean import Cleaning
from megalm.data.prepare.corpora import CORPORA, CorpusOptions
from megalm.data.shards.index import INDEX_FILE, Index
from megalm.data.shards.read import TokenShards, iterate_with_webdataset
from megalm.data.shards.write import ShardWriter
from megalm.data.stream.batch_size import BatchSize
from megalm.data.stream.loader import TrainLoader
from megalm.data.stream.sequences import Corpora
from megalm.data.tokenization.training import train_byte_level_bpe
from megalm.objectives.clm import next_tokens

LENGTH = 2048
CHUNK = 8192
TOKENS = 64 * 2**20
VOCABULARY = 50_257
HUGE_TOKENS = 15 * 10**12
_LOADER_TARGET = 40e6
_START_SECONDS, _START_MEGABYTES = 3.0, 400.0
_RESUME_RATIO = 1.5


@dataclass(frozen=True)
class Options:
    """How long to measure.

    Attributes:
        rounds: repetitions that a median is taken of.
    """

    rounds: int = 5


def run(options: Options) -> Report:
    """Measure everything in a temporary folder of about 300 MB."""
    with tempfile.TemporaryDirectory(prefix="megalm-bench-") as name:
        folder = Path(name)
        rows = [_prepare_row(folder / "prepare")]
        _write_dataset(folder / "train", folder / "flat.bin")
        readers: dict[str, Callable[[], int]] = {
            "loader, B=16": lambda: _read_batches(folder / "train", 16),
            "loader, B=128": lambda: _read_batches(folder / "train", 128),
            "stock webdataset, chunks": lambda: _read_webdataset(folder / "train"),
            "flat memmap, B=128": lambda: _read_flat(folder / "flat.bin", 128),
        }
        speeds = _in_turns(readers, options.rounds)
        for reader, speed in speeds.items():
            target = _LOADER_TARGET / 1e6 if reader == "loader, B=128" else None
            rows.append(Row(reader, speed / 1e6, "Mtok/core-s", target, note=_NOTES.get(reader, "")))
        rows += _start_rows(folder / "huge", options.rounds)
        rows.append(_resume_row(folder / "train", options.rounds))
    return Report("data", rows)


_NOTES = {
    "loader, B=16": "order, checksums, inputs, labels and mask as tensors",
    "loader, B=128": "the same",
    "stock webdataset, chunks": "arrays of a chunk in file order; no checks, labels or batches",
    "flat memmap, B=128": "random offsets of one array to int64 inputs and labels; no checks",
}


def _prepare_row(folder: Path) -> Row:
    """Reading, cleaning and tokenising Python's standard library in one process."""
    corpus = CORPORA["stdlib"](CorpusOptions())
    blocks = list(corpus.blocks(2**20))
    texts = [text for block in blocks for text in texts_of_block(_work(folder, None), block)]
    tokenizer = train_byte_level_bpe(texts, 4096)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.definition)
    work = _work(folder, str(folder / "tokenizer.json"))
    tokenise_block(work, 0, blocks[0])  # loads the tokenizer
    started, tokens = time.process_time(), 0
    for number, block in enumerate(blocks):
        tokens += tokenise_block(work, number, block)[2]
    return Row("prepare, per worker", tokens / (time.process_time() - started) / 1e6, "Mtok/core-s")


def _work(folder: Path, tokenizer: str | None) -> Work:
    return Work(Cleaning(), False, 0.02, tokenizer, None, str(folder / "blocks"))


def _write_dataset(folder: Path, flat: Path) -> None:
    """The same random tokens as shards and as one flat file; reading them back warms the page cache."""
    writer = ShardWriter(
        folder, tokenizer_sha256="", vocab_size=VOCABULARY, eos_id=0, chunk_tokens=CHUNK, chunks_per_shard=1024
    )
    rng = np.random.default_rng(0)
    with flat.open("wb") as file:
        for number in range(TOKENS // 2**20):
            tokens = rng.integers(0, VOCABULARY, 2**20, dtype=np.uint16)
            writer.add(tokens, [2**20], [str(number)])
            file.write(tokens.tobytes())
    writer.close()


def _in_turns(readers: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Median tokens per CPU second of each reader; the first round only warms up."""
    speeds: dict[str, list[float]] = {reader: [] for reader in readers}
    for round_number in range(rounds + 1):
        for name, read in readers.items():
            started = time.process_time()
            tokens = read()
            if round_number:
                speeds[name].append(tokens / (time.process_time() - started))
    return {name: median(values) for name, values in speeds.items()}


def _loader(folder: Path, batch: int) -> TrainLoader:
    return TrainLoader(
        Corpora((TokenShards(folder, LENGTH),)),
        Data(path=("bench",)),
        make_batch=next_tokens,
        batch_size=BatchSize(batch, batch, batch, 0, LENGTH),
        dp_rank=0,
        dp_size=1,
        seed=1,
    )


def _read_batches(folder: Path, batch: int) -> int:
    """Half of the dataset through a loader that has read nothing yet, so that every chunk is checked."""
    loader = _loader(folder, batch)
    steps = TOKENS // 2 // (batch * LENGTH)
    tokens = sum(loader.next().tokens.numel() for _ in range(steps))
    loader.close()
    return tokens


def _read_webdataset(folder: Path) -> int:
    return sum(chunk.size - 1 for chunk in islice(iterate_with_webdataset(folder), TOKENS // 2 // CHUNK))


def _read_flat(path: Path, batch: int) -> int:
    """As the simplest training loops read: rows at random offsets, stacked and widened."""
    data = np.memmap(path, dtype=np.uint16, mode="r")
    rng = np.random.default_rng(1)
    tokens = 0
    for _ in range(TOKENS // 2 // (batch * LENGTH)):
        starts = rng.integers(0, data.size - LENGTH - 1, batch).tolist()
        rows = torch.from_numpy(np.stack([data[i : i + LENGTH + 1].astype(np.int64) for i in starts]))
        tokens += rows[:, :-1].contiguous().numel()
        rows[:, 1:].contiguous()
    return tokens


def _start_rows(folder: Path, rounds: int) -> list[Row]:
    """A new process opens an index of 15 trillion tokens and says which sequences the first samples are."""
    _write_huge_index(folder)
    measured = [_measure_start(folder) for _ in range(rounds)]
    return [
        Row("start on 15 T tokens", median(s for s, _ in measured), "s", _START_SECONDS, True, "imports included"),
        Row("  its memory", median(m for _, m in measured), "MB", _START_MEGABYTES, True, "without torch"),
    ]


_START = """
import json, sys, time
started = time.perf_counter()
import numpy as np
from megalm.data.stream.order import BlendedOrder
from megalm.data.shards.read import TokenShards
shards = TokenShards(sys.argv[1], 2048)
order = BlendedOrder.of([len(shards)], seed=1)
order(np.arange(1024)), order(np.arange(10**9, 10**9 + 1024))
seconds = time.perf_counter() - started
# Not getrusage: Linux counts what the process was forked from.
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([seconds, int(peak) * 1024 / 1e6]))
"""


def _measure_start(folder: Path) -> tuple[float, float]:
    done = subprocess.run(
        [sys.executable, "-c", _START, str(folder)],
        capture_output=True,
        text=True,
        check=True,
        stdin=subprocess.DEVNULL,
    )
    seconds, megabytes = json.loads(done.stdout)
    return seconds, megabytes


def _write_huge_index(folder: Path) -> None:
    """An index of 223,518 shards, of which the two that a start looks at are there, as files with holes."""
    folder.mkdir()
    chunks_per_shard = 8192
    shards = -(-(HUGE_TOKENS - 1) // (CHUNK * chunks_per_shard))
    checks = tuple(f"{number:064x}" for number in range(shards))
    index = Index("uint32", CHUNK, chunks_per_shard, False, 0, "", 128_256, 0, 1, HUGE_TOKENS, HUGE_TOKENS, checks)
    (folder / INDEX_FILE).write_text(index.to_json())
    for number in (0, shards - 1):
        shard = index.shard(number)
        with (folder / shard.name).open("wb") as file:
            file.truncate(shard.bytes)
        (folder / shard.checks_name).write_text("{}")


def _resume_row(folder: Path, rounds: int) -> Row:
    """Time to the first batch of a loader that goes on at sample 10⁹, over that of one that begins."""

    def first_batch(samples: int) -> float:
        started = time.process_time()
        loader = _loader(folder, 128)
        loader.load_state_dict({**loader.state_dict(), "consumed_samples": samples})
        loader.next()
        loader.close()
        return time.process_time() - started

    pairs = [(first_batch(0), first_batch(10**9)) for _ in range(2 * rounds)]
    ratio = median(later / first for first, later in pairs[1:])
    return Row("first batch at sample 10^9 / at 0", ratio, "x", _RESUME_RATIO, True, "CPU time, median of pairs")
