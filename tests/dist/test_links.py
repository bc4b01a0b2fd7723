"""A context with NCCL's groups, on real ranks: links carry both directions at once, and an engine makes no group."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks
from local_splits import LocalSplits
from parity import Layout

from megalm.mesh.groups import ParallelContext
from megalm.mesh.splits import neighbour_pairs
from megalm.mesh.topology import Topology


def nccls(topology: Topology) -> ParallelContext:
    return ParallelContext.create(topology, "cpu", transport="nccl", maker=LocalSplits())


def transfer(topology: Topology) -> dict[tuple[int, int], float]:
    """Every receive of this rank posted before any send, which one communicator of a ring could not do."""
    context = nccls(topology)
    here, pipeline = context.coordinates.pp, context.pp_group.ranks
    arriving = {pair: torch.zeros(1) for pair in neighbour_pairs(topology) if pair[1] == here}
    works = [dist.irecv(x, pipeline[pair[0]], group=context.link(*pair).handle) for pair, x in arriving.items()]
    for source, target in neighbour_pairs(topology):
        if source == here:
            x = torch.tensor([100.0 * context.rank + target])
            dist.send(x, pipeline[target], group=context.link(source, target).handle)
    for work in works:
        work.wait()
    return {pair: x.item() for pair, x in arriving.items()}


@pytest.mark.parametrize(
    "topology", [Topology(pp=2, tp=2, virtual_stages=2), Topology(pp=3, virtual_stages=2), Topology(pp=4)], ids=str
)
def test_receives_may_be_posted_before_any_send(topology: Topology) -> None:
    results = run_ranks(topology.world_size, transfer, topology)
    for rank, arrived in enumerate(results):
        pipeline = topology.group_of(rank, "pp")
        here = topology.coordinates(rank).pp
        expected = {pair: 100.0 * pipeline[pair[0]] + here for pair in neighbour_pairs(topology) if pair[1] == here}
        assert arrived == expected
    assert any(results)


def groups_made_by(layout: Layout) -> tuple[int, int]:
    """(groups that a context makes, groups that an engine and a step make after that)."""
    from megalm.engine.deepspeed_engine import DeepSpeedEngine
    from megalm.models.transformer import build_transformer
    from megalm.objectives.registry import make_objective
    from megalm.verify.parity import micro_batches_of_rank

    config, groups = layout.config(), dist.distributed_c10d._world.pg_map
    at_first = len(groups)
    context = nccls(layout.topology)
    before = len(groups)
    model = build_transformer(
        config,
        config.model.vocab_size,
        context=context,
        dtype=torch.float32,
        objective=make_objective(config.objective),
    )
    engine = DeepSpeedEngine(model, context, config)
    engine.train_step(micro_batches_of_rank(config, 0, context, model.context_parallel), 1e-3)
    return before - at_first, len(groups) - before


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2, zero_stage=0),
        Layout(dp=2, zero_stage=1),
        Layout(dp=2, zero_stage=2),
        Layout(dp=2, zero_stage=3),
        Layout(tp=2, zero_stage=1),
        Layout(pp=2, zero_stage=1),
    ],
    ids=str,
)
def test_an_engine_makes_no_group_of_its_own(layout: Layout) -> None:
    for made, later in run_ranks(2, groups_made_by, layout):
        assert made > 1
        assert later == 0, "neither at its start nor in a step; DeepSpeed takes those that it is given"
