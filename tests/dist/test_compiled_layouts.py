"""Graphs of a compiled block over tensor-parallel ranks: what lies between its collectives, and nothing less."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness import run_ranks
from parity import MODEL

from megalm.config.schema import Model

LLAMA = replace(MODEL, position="rotary", norm="rmsnorm", activation="swiglu", bias=False, num_kv_heads=2)


def graphs_of(model: Model, sequence_parallel: bool) -> tuple[int, list[str]]:
    """Runs on every rank: graphs of one block, and why they end."""
    from megalm.config.schema import Engine
    from megalm.core.attention.context_parallel import ContextParallel
    from megalm.core.place import Place
    from megalm.core.tensor_parallel import TensorParallel
    from megalm.mesh.groups import ParallelContext
    from megalm.mesh.topology import Topology
    from megalm.models.transformer import Part, Transformer

    context = ParallelContext.create(Topology(tp=2))
    made = Transformer(
        model,
        61,
        part=Part({0: range(model.num_layers)}, 1),
        tensor_parallel=TensorParallel(context.tp_group, sequence_parallel),
        context_parallel=ContextParallel(),
        engine=Engine(),
        objective=None,
        seed=0,
        device=torch.device("cpu"),
    )
    length = model.sequence_length // (2 if sequence_parallel else 1)
    x = torch.randn(2, length, model.hidden_size, requires_grad=True)
    place = Place(torch.arange(model.sequence_length), torch.arange(2))
    found = torch._dynamo.explain(made.blocks["0"])(x, place)
    return found.graph_count, [str(reason.reason).splitlines()[0] for reason in found.break_reasons]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("model", [MODEL, LLAMA], ids=["gpt2", "llama"])
def test_a_block_breaks_at_its_four_products_alone(model: Model, sequence_parallel: bool) -> None:
    for graphs, reasons in run_ranks(2, graphs_of, model, sequence_parallel):
        assert len(reasons) == 4, reasons
        assert all("disable" in reason for reason in reasons), reasons
        assert graphs == 5
