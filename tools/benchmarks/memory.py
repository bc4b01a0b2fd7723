"""Activations that a layer keeps for backward, counted tensor by tensor, against the published equation.

Counted by saved-tensor hooks: every storage that autograd keeps, once, without parameters. A layer's share is the
difference between models of two and of four layers, so that embedding and head cancel.

Shapes: s sequence, b micro-batch, h hidden, t tensor-parallel degree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.cpu import bench_config
from benchmarks.table import Report, Row
from megalm.config.schema import Config, Model, Parallel
from megalm.launch.function_ranks import call_on_ranks

TOLERANCE = 0.10
BATCH = 2
MODEL = Model(num_layers=4, hidden_size=256, num_heads=4, sequence_length=128, vocab_size=512)
FEWER_LAYERS = 2


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        recompute: ``engine.recompute``.
        tp: tensor-parallel degree t.
        sequence_parallel: whether activations between tensor-parallel regions are split, too.
    """

    recompute: str
    tp: int = 1
    sequence_parallel: bool = False

    def __str__(self) -> str:
        return f"recompute={self.recompute}, tp={self.tp}{'+sp' * self.sequence_parallel}"

    @property
    def layer_bytes(self) -> int:
        """Korthikanti et al. 2022, equations 2 to 4 and 6, for 16-bit activations, less what is never stored here.

        Of 34 bytes per element of [s, b, h], two are masks of dropout, which is off here; the 5·a·s/h of scores,
        probabilities and their mask are never stored by fused attention. What is left: 4 (inputs of both norms) and 4
        (inputs of the first matrices of attention and MLP), which tensor parallelism alone replicates; and 24 that it
        splits: query, key, value (6), input of the projection (2), input and output of GELU (16). ``selective`` stores
        the same, as what it recomputes is inside fused attention. ``full`` keeps the layer's input.
        """
        whole, split = (2, 0) if self.recompute == "full" else (8, 24)
        elements = MODEL.sequence_length * BATCH * MODEL.hidden_size
        return elements * (whole // (self.tp if self.sequence_parallel else 1)) + elements * split // self.tp


def run() -> Report:
    """Count every case on one and on two ranks."""
    rows = []
    for ranks, splits in ((1, (False,)), (2, (False, True))):
        cases = [Case(recompute, ranks, sp) for recompute in ("none", "selective", "full") for sp in splits]
        counted = call_on_ranks(ranks, _count, cases)
        for index, case in enumerate(cases):
            largest = max(figures[index] for figures in counted)
            relative = abs(largest / case.layer_bytes - 1.0)
            has_target = case.recompute != "full"
            rows.append(Row(f"{case}: saved per layer and rank", largest, "bytes", note=f"equation {case.layer_bytes}"))
            rows.append(
                Row("  distance from the equation", 100 * relative, "%", 100 * TOLERANCE * has_target or None, True)
            )
    return Report("memory", rows)


def _count(cases: list[Case]) -> list[float]:
    """Bytes that one layer keeps on this rank, by case."""
    layers = MODEL.num_layers - FEWER_LAYERS
    return [(_saved(case, MODEL.num_layers) - _saved(case, FEWER_LAYERS)) / layers for case in cases]


def _saved(case: Case, num_layers: int) -> int:
    """Bytes that a forward pass of the model keeps on this rank."""
    from megalm.core.place import Place
    from megalm.mesh.groups import ParallelContext
    from megalm.mesh.topology import Topology
    from megalm.models.micro_batch import MicroBatch
    from megalm.models.transformer import build_transformer
    from megalm.objectives.registry import make_objective

    config = _config(case, num_layers)
    context = ParallelContext.create(Topology(tp=case.tp))
    stage = build_transformer(
        config, 512, context=context, dtype=torch.bfloat16, objective=make_objective(config.objective)
    ).train()
    parameters = {p.untyped_storage().data_ptr() for p in stage.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}  # by address; the tensor is held, so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes(), tensor.detach()
        return tensor

    tokens = torch.randint(0, 512, (BATCH, MODEL.sequence_length))
    weight = torch.full(tokens.shape, 1.0 / tokens.numel())
    micro_batch = MicroBatch(tokens, tokens, weight, Place(torch.arange(tokens.shape[1]), torch.arange(BATCH)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = stage.run(0, None, micro_batch)["loss"]
    total = sum(size for size, _ in kept.values())
    loss.sum().backward()
    return total


def _config(case: Case, num_layers: int) -> Config:
    model = replace(MODEL, num_layers=num_layers)
    config = bench_config(model, micro_batch_size=BATCH, global_batch_size=BATCH)
    return replace(
        config,
        engine=replace(config.engine, recompute=case.recompute),
        parallel=Parallel(tp=case.tp, sequence_parallel=case.sequence_parallel),
    )
