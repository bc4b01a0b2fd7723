"""Checkpoints of GPT-3 175B as thousands of ranks would write them: their indexes, without tensors.

A rank of tp8·pp16·dpN with three virtual stages holds its ZeRO-1 range of each flat group of parameters
(:func:`megalm.engine.resume.runs_of_rank`), as the engine of that rank would save it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from megalm.checkpoint.collect import INDEX_ENDING
from megalm.checkpoint.columns import CutTable, cuts_to_fields
from megalm.checkpoint.pieces import rank_file, rank_folders
from megalm.engine.resume import runs_of_rank
from megalm.mesh.parameter import ParameterRecord, StateRun
from megalm.mesh.slices import ShardSpec, padded_range
from megalm.mesh.topology import Topology

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

    def add(name: str, shard: ShardSpec, *, copies: tuple[int, ...] = ()) -> None:
        split = ("tp",) if shard.cuts else ()
        decays = len(shard.full_shape) > 1
        found.append(ParameterRecord(name, shard, split_over=split, copies=copies, decays=decays))

    embedding = ShardSpec.along((VOCABULARY, HIDDEN), 0, (words,), padding)
    for stage in topology.stages_of(pp):
        if stage == 0:
            add("embedding.weight", embedding, copies=tied)
            add("position.weight", ShardSpec.replicated(LENGTH, HIDDEN))
        share = LAYERS // topology.num_stages
        for layer in range(stage * share, (stage + 1) * share):
            for name, shard in _block(topology.tp, tp):
                add(f"blocks.{layer}.{name}", shard)
        if stage == topology.num_stages - 1:
            for name in ("weight", "bias"):
                add(f"final_norm.{name}", ShardSpec.replicated(HIDDEN))
            add("embedding.weight", embedding, copies=tied)
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
    """What a rank saves: its ZeRO-1 range of what it stands for."""
    records = [r for r in records_of_rank(topology, rank) if r.is_owned_by(topology, rank, among_replicas=False)]
    # A tied embedding is a group of its own, whose range is that of any parameter without copies.
    alone = [ParameterRecord(r.name, r.shard, split_over=r.split_over) for r in records if r.copies]
    rest = [r for r in records if not r.copies]
    return [
        *runs_of_rank(alone, topology, rank, zero_stage=1),
        *runs_of_rank(rest, topology, rank, zero_stage=1),
    ]


def write_indexes(folder: Path, topology: Topology) -> int:
    """Write every rank's index, as ``write_rank`` would; returns the number of pieces."""
    for name, _ in rank_folders(topology.world_size):
        (folder / name).mkdir(parents=True, exist_ok=True)
    pieces = 0
    for rank in range(topology.world_size):
        runs = written_by(topology, rank)
        pieces += len(runs)
        (folder / rank_file(rank, INDEX_ENDING)).write_text(_index(rank, runs))
    return pieces


def _index(rank: int, runs: list[StateRun]) -> str:
    table = CutTable()
    tensors: dict[str, list] = {}
    places: dict[tuple, dict[str, list]] = {}
    for run in runs:
        _, _, own = tensors.setdefault(run.name, [list(run.shard.full_shape), True, []])
        place = (table.number(cuts_to_fields(run.shard.cuts)), run.flat_start, run.length)
        if (run.name, *place) not in places:
            own.append([*place, places.setdefault((run.name, *place), {})])
        digest = hashlib.sha256(f"{rank} {run.kind} {run.name}".encode()).hexdigest()
        places[(run.name, *place)][run.kind] = [digest, int(digest[:16], 16)]
    return json.dumps({"cuts": table.fields, "tensors": tensors}, separators=(",", ":"))
