"""Checkpoints of GPT-3 175B as thousands of ranks would write them: their indexes, without tensors.

A rank of tp8·pp16·dpN with three virtual stages holds its ZeRO-1 piece of each bucket
(:func:`megalm.engine.resume.runs_of_rank`), as the engine of that rank would save it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from megalm.checkpoint.collect import INDEX_ENDING
from megalm.checkpoint.index import index_of
from megalm.checkpoint.pieces import rank_file, rank_folders
from megalm.config.schema import Engine
from megalm.engine.resume import runs_of_rank
from megalm.mesh.parameter import ParameterRecord, StateRun
from megalm.mesh.slices import ShardSpec, padded_range
from megalm.mesh.topology import Topology

BUCKET_MIB = Engine().bucket_mib
LAYERS, HIDDEN, VOCABULARY, LENGTH = 96, 12288, 50257, 2048


def topology_of(dp: int) -> Topology:
    """Of 175B: dp 8 is 1,024 ranks, dp 128 is 16,384."""
    return Topology(tp=8, pp=16, dp=dp, virtual_stages=3)


def records_of_rank(topology: Topology, rank: int) -> list[ParameterRecord]:
    """The parameters that a rank of 175B holds."""
    at = topology.coordinates(rank)
    return _records(topology, at.pp, at.tp)


@cache
def _records(topology: Topology, pp: int, tp: int) -> list[ParameterRecord]:
    found = []
    tied = (0, topology.num_stages - 1)
    words, padding = padded_range(VOCABULARY, tp, topology.tp)

    def add(stage: int, name: str, shard: ShardSpec, *, copies: tuple[int, ...] = ()) -> None:
        split = ("tp",) if shard.cuts else ()
        decays = len(shard.full_shape) > 1
        found.append(ParameterRecord(name, shard, split_over=split, stage=stage, copies=copies, decays=decays))

    embedding = ShardSpec.along((VOCABULARY, HIDDEN), 0, (words,), padding)
    for stage in topology.stages_of(pp):
        if stage == 0:
            add(stage, "embedding.weight", embedding, copies=tied)
            add(stage, "position.weight", ShardSpec.replicated(LENGTH, HIDDEN))
        share = LAYERS // topology.num_stages
        for layer in range(stage * share, (stage + 1) * share):
            for name, shard in _block(topology.tp, tp):
                add(stage, f"blocks.{layer}.{name}", shard)
        if stage == topology.num_stages - 1:
            for name in ("weight", "bias"):
                add(stage, f"final_norm.{name}", ShardSpec.replicated(HIDDEN))
            add(stage, "embedding.weight", embedding, copies=tied)
    return found


def _block(tp: int, rank: int) -> Iterator[tuple[str, ShardSpec]]:
    def part(size: int) -> tuple[int, int]:
        return rank * size // tp, (rank + 1) * size // tp

    low, high = part(HIDDEN)
    fused = tuple((number * HIDDEN + low, number * HIDDEN + high) for number in range(3))
    whole, inner = ShardSpec.replicated(HIDDEN), (part(4 * HIDDEN),)
    yield from (("attention_norm.weight", whole), ("attention_norm.bias", whole))
    yield "attention.qkv.weight", ShardSpec.along((3 * HIDDEN, HIDDEN), 0, fused)
    yield "attention.qkv.bias", ShardSpec.along((3 * HIDDEN,), 0, fused)
    yield "attention.projection.weight", ShardSpec.along((HIDDEN, HIDDEN), 1, ((low, high),))
    yield "attention.projection.bias", whole
    yield from (("mlp_norm.weight", whole), ("mlp_norm.bias", whole))
    yield "mlp.up.weight", ShardSpec.along((4 * HIDDEN, HIDDEN), 0, inner)
    yield "mlp.up.bias", ShardSpec.along((4 * HIDDEN,), 0, inner)
    yield "mlp.down.weight", ShardSpec.along((HIDDEN, 4 * HIDDEN), 1, inner)
    yield "mlp.down.bias", whole


def written_by(topology: Topology, rank: int) -> list[StateRun]:
    """What a rank saves: its ZeRO-1 pieces of what it stands for."""
    records = [r for r in records_of_rank(topology, rank) if r.is_owned_by(topology, rank, among_replicas=False)]
    # A tied embedding is a group of its own, whose pieces are those of any parameter without copies.
    alone = [ParameterRecord(r.name, r.shard, split_over=r.split_over) for r in records if r.copies]
    rest = [r for r in records if not r.copies]
    return [
        *runs_of_rank(alone, topology, rank, zero_stage=1, bucket_mib=BUCKET_MIB),
        *runs_of_rank(rest, topology, rank, zero_stage=1, bucket_mib=BUCKET_MIB),
    ]


def write_indexes(folder: Path, topology: Topology) -> int:
    """Write every rank's index, as ``write_rank`` would; returns the number of pieces."""
    for name, _ in rank_folders(topology.world_size):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pieces = 0
    for rank in range(topology.world_size):
        runs = written_by(topology, rank)
        pieces += len(runs)
        shares = [hash((rank, run.kind, run.name)) % (1 << 64) for run in runs]
        seal = hashlib.sha256(str(rank).encode()).hexdigest()
        (folder / rank_file(rank, INDEX_ENDING)).write_text(index_of(zip(runs, shares, strict=True), seal))
    return pieces
