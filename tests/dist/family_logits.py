"""What ranks do to compute the logits of converted runs: each loads its own part, of whatever layout it is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.checkpoint.pieces import WEIGHT
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.store import locate
from megalm.config.compose import load_run_config
from megalm.config.schema import Parallel
from megalm.mesh.groups import ParallelContext
from megalm.mesh.topology import Topology
from megalm.models.micro_batch import MicroBatch
from megalm.models.transformer import Transformer, build_transformer
from megalm.objectives.registry import make_objective


def logits_on_ranks(runs: dict[str, Path], tokens: dict[str, Tensor], layouts: list[tuple[int, int]]) -> list[dict]:
    """By layout (tp, pp), then by run: logits [B, S, V] as this rank has them after the last stage; else None."""
    found = []
    for tp, pp in layouts:
        context = ParallelContext.create(Topology(tp=tp, pp=pp, dp=dist.get_world_size() // (tp * pp)))
        found.append({name: _logits(run, tokens[name], context) for name, run in runs.items()})
    return found


@torch.inference_mode()
def _logits(run: Path, tokens: Tensor, context: ParallelContext) -> Tensor | None:
    model, vocab_size = _load(run, context)
    micro_batch = MicroBatch(tokens, tokens, tokens)
    hidden = None
    for stage in range(context.topology.pp):
        mine = stage in model.part.stages
        x = (
            model._blocks(stage, hidden, None, micro_batch)[0]
            if mine
            else torch.zeros(*tokens.shape, model.hidden_size)
        )
        hidden = context.pp_group.all_reduce(x) if context.topology.pp > 1 else x
    if model.output is None:
        return None
    part = model.output_embedding.logits(model.output(hidden), model.output.bias)  # [B, S, ceil(V/T)]
    parts = [torch.empty_like(part) for _ in context.tp_group.ranks]
    if context.tp_group.size == 1:
        return part
    dist.all_gather(parts, part, group=context.tp_group.handle)
    return torch.cat(parts, -1)[..., :vocab_size]


def _load(run: Path, context: ParallelContext) -> tuple[Transformer, int]:
    """This rank's part of a run's model, and its vocabulary, filled from the checkpoint slice by slice."""
    config = load_run_config(run, [])
    topology = context.topology
    config = replace(config, parallel=Parallel(tp=topology.tp, pp=topology.pp))
    model = build_transformer(
        config,
        config.model.vocab_size or 0,
        context=context,
        dtype=torch.float32,
        objective=make_objective(config.objective),
    ).eval()
    reader = CheckpointReader(locate(run).path)
    for tensor in model.tensors():
        tensor.tensor.copy_(reader.read_local(tensor.name, WEIGHT, tensor.shard))
    return model, config.model.vocab_size or 0
