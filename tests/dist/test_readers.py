"""``data.readers``: who reads changes neither a number nor a checkpoint; ranks that do not read open no file."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cli_runs import TINY
from harness import run_ranks

from megalm.checkpoint.manifest import read_manifest
from megalm.data.shards.index import read_index
from megalm.data.shards.read import ChunkReader
from megalm.data.shards.store import LocalStore
from megalm.data.shards.write import ShardWriter
from megalm.engine import feed
from megalm.launch.discovery import LOCAL, RankInfo
from megalm.launch.signals import StopRequest
from megalm.mesh.topology import Topology
from megalm.plan.plan import Plan
from megalm.plan.preflight import make_plan
from megalm.runs.record import read_metrics
from tests.file_counts import counted_files

pytestmark = pytest.mark.slow

STEPS = 3
LAYOUTS = {
    "tp2·pp2": (Topology(tp=2, pp=2), ["parallel.tp=2", "parallel.pp=2"]),
    "pp4·documents": (
        Topology(pp=4, virtual_stages=1),
        ["parallel.tp=1", "parallel.pp=4", "model.num_layers=4", "data.reset_at_documents=true"],
    ),
    "tp2·cp2": (Topology(tp=2, cp=2), ["parallel.tp=2", "parallel.pp=1", "parallel.cp=2"]),
    "pp2·dp2·ramp": (
        Topology(pp=2, dp=2),
        [
            "parallel.tp=1",
            "parallel.pp=2",
            "train.batch_ramp_start=4",
            "train.batch_ramp_increment=4",
            "train.batch_ramp_tokens=200",
            "train.global_batch_size=12",
        ],
    ),
}
FEW, MANY = 2, 48
"""Chunks per shard that give many shards, and few."""


def resharded(dataset: Path, folder: Path, chunks_per_shard: int) -> int:
    """The same tokens in shards of another size; returns how many shards the training split has."""
    folder.mkdir()
    for path in dataset.glob("*.json"):
        shutil.copy(path, folder)
    shards = {}
    for split in ("train", "val"):
        store = LocalStore(dataset / split)
        index = read_index(store)
        chunks = ChunkReader(store, index)
        parts = [chunks.chunk(number).tokens[: index.chunk_tokens] for number in range(index.num_chunks)]
        tokens = np.concatenate(parts)[: index.tokens]
        writer = ShardWriter(
            folder / split,
            tokenizer_sha256=index.tokenizer_sha256,
            vocab_size=index.vocab_size,
            eos_id=index.eos_id,
            document_start=index.document_start,
            chunk_tokens=index.chunk_tokens,
            chunks_per_shard=chunks_per_shard,
        )
        writer.add(tokens, [tokens.size], ["all"])
        writer.close()
        shards[split] = read_index(LocalStore(folder / split)).num_shards
    return shards["train"]


def train(plan_text: str, dataset: Path) -> dict[str, Any]:
    """One rank of a run: what it opened of the data, before its first step and in all."""
    from megalm.training.setup import build_trainer

    plan = Plan.from_json(plan_text)
    rank, size = dist.get_rank(), dist.get_world_size()
    info = RankInfo(
        rank=rank,
        world_size=size,
        local_rank=rank,
        local_world_size=size,
        launcher=LOCAL,
        master_addr="127.0.0.1",
        master_port=0,
    )
    messages = []

    def broadcast(buffer: torch.Tensor, **arguments: Any) -> None:
        messages.append(buffer.nbytes)
        dist.broadcast(buffer, **arguments)

    feed.dist = SimpleNamespace(broadcast=broadcast)
    with counted_files(dataset) as counts:
        trainer, callbacks = build_trainer(plan.config, info, StopRequest(), plan.start, plan.claim, plan.indexes)
        at_start = (counts.indexes(), *counts.shards())
        in_all = sum(counts.opened.values()), sum(counts.asked.values())
        trainer.fit()
        callbacks.close()
        return {
            "at_start": at_start,
            "files_at_start": in_all,
            "in_all": (counts.indexes(), *counts.shards()),
            "messages": messages,
        }


def run_with(folder: Path, dataset: Path, layout: str, readers: str) -> list[dict[str, Any]]:
    topology, overrides = LAYOUTS[layout]
    common = [*TINY, "model.dropout=0.1", f"train.steps={STEPS}", "checkpoint.every=0", "train.validate_every=2"]
    common += ["train.validation_samples=8", f"data.path={dataset}", f"run.dir={folder}", f"run.name={readers}"]
    plan = make_plan([*common, *overrides, f"data.readers={readers}"], topology.world_size)
    return run_ranks(topology.world_size, train, plan.to_json(), dataset)


def validated_sequences(dataset: Path) -> int:
    """Of the whole validation split, at TINY's length."""
    return read_index(LocalStore(dataset / "val")).num_sequences(32)


def numbers_of(folder: Path) -> list[Any]:
    kept = ("step", "loss", "grad_norm", "loss_tokens", "samples", "val_loss", "val_tokens", "val_accuracy")
    return [{key: row[key] for key in kept if key in row} for row in read_metrics(folder / "metrics.jsonl")]


def saved_of(folder: Path) -> Any:
    (path,) = sorted((folder / "checkpoints").glob("step*"))
    manifest = read_manifest(path)
    return {name: tuple(record.pieces) for name, record in manifest.tensors.items()}, manifest.data, manifest.training


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_reader_per_replica_trains_to_the_same_bits_and_the_others_open_nothing(
    tiny_dataset: Path, tmp_path: Path, layout: str
) -> None:
    dataset = tmp_path / "data"
    assert resharded(tiny_dataset, dataset, 2) > 8
    every = run_with(tmp_path, dataset, layout, "every_rank")
    one = run_with(tmp_path, dataset, layout, "one_per_replica")
    assert numbers_of(tmp_path / "every_rank") == numbers_of(tmp_path / "one_per_replica")
    assert saved_of(tmp_path / "every_rank") == saved_of(tmp_path / "one_per_replica")

    topology, _ = LAYOUTS[layout]
    per_copy = topology.tp * topology.pp
    assert all(rank["at_start"] == (0, 0, 0) for rank in [*every, *one]), "no shard and no index before the first step"
    assert all(rank["in_all"][0] == 2 for rank in every), "of both splits"
    reading = [rank for rank in one if rank["in_all"] != (0, 0, 0)]
    assert len(reading) == topology.world_size // per_copy, "one of each replica and context-parallel position"
    assert not any(rank["messages"] for rank in every)
    assert len({tuple(rank["messages"]) for rank in one}) == 1, "every rank takes part in each"
    validation_batches = sum(1 for _ in one[0]["messages"]) - STEPS
    rows = read_metrics(tmp_path / "one_per_replica" / "metrics.jsonl")
    whole_split = -(-validated_sequences(dataset) // (2 * topology.dp))
    assert len([row for row in rows if "val_loss" in row]) == 2
    assert validation_batches == 8 // (2 * topology.dp) + whole_split, "one message per batch, and no other"
    for rank in reading:
        assert rank["in_all"] in [other["in_all"] for other in every], "as much as it would have read anyway"


def test_what_a_rank_opens_at_its_start_does_not_depend_on_the_number_of_shards(
    tiny_dataset: Path, tmp_path: Path
) -> None:
    found = []
    for number, chunks in enumerate((FEW, MANY)):
        dataset = tmp_path / f"data{number}"
        shards = resharded(tiny_dataset, dataset, chunks)
        found.append((shards, run_with(tmp_path / f"runs{number}", dataset, "tp2·pp2", "one_per_replica")))
    (many, first), (few, second) = found
    assert many > 4 * few
    files = {rank["files_at_start"] for rank in [*first, *second]}
    assert len(files) == 1, "the same on every rank and for any number of shards"
    opened, asked = files.pop()
    assert opened <= 6, "the tokenizer and what lies beside it"
    assert asked <= 6
