"""What a parameter's record says is what is done with it: on an axis that is new, and where nothing is to be trained.

The mesh gains the axis ``ep`` here and nowhere else. A parameter that is split over it and over tp starts, trains,
counts in the norm, is clipped, saved and read on another layout as in one process. A frozen parameter has no gradient
buffer and no moments, stays as it is, and is saved once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from expert_layer import task_of
from harness import run_ranks_on_each
from parity import CLIP, MODEL, Layout

from megalm.checkpoint.manifest import read_manifest
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.save import save_checkpoint
from megalm.checkpoint.store import locate
from megalm.checkpoint.writer import Header, PieceToWrite
from megalm.core.parameters import freeze
from megalm.engine.deepspeed_engine import DeepSpeedEngine
from megalm.mesh.groups import ParallelContext
from megalm.mesh.slices import ShardSpec
from megalm.models.transformer import Transformer
from megalm.verify.differences import Differences, differences
from megalm.verify.parity import Task, Trace, build_engine, train, train_plainly

SAVED_AT = 3


@dataclass(frozen=True)
class Expert:
    """A layout with the degree of the new axis."""

    layout: Layout
    ep: int

    def __str__(self) -> str:
        return f"{self.layout}·ep{self.ep}"

    @property
    def topology(self):
        return replace(self.layout.topology, inner_axes=(("ep", self.ep),))


UNTIED = replace(MODEL, tie_embeddings=False)
EXPERTS = [
    Expert(Layout(tp=2, dp=2), 2),
    Expert(Layout(tp=2, dp=2, zero_stage=0), 2),
    Expert(Layout(tp=2, dp=2, zero_stage=2, model=UNTIED, name="untied"), 2),
    Expert(Layout(dp=4, zero_stage=0), 2),
    Expert(Layout(dp=4), 2),
    Expert(Layout(dp=4, zero_stage=2), 4),
    Expert(Layout(cp=2, dp=2), 4),
    Expert(Layout(cp=2, dp=2, cp_attention="ring"), 2),
    Expert(Layout(pp=2, dp=2), 2),
    Expert(Layout(pp=2, tp=2), 1),
]
RESHARDED = [
    tuple(replace(expert, layout=replace(expert.layout, batch=16)) for expert in (EXPERTS[saved], EXPERTS[continued]))
    for saved, continued in ((0, 4), (5, 1), (4, 9), (3, 7))
]


def train_expert(case: Expert) -> Trace:
    return _train(case, None, None)


def save_and_continue(item: tuple[Path, Expert, Expert]) -> Trace:
    folder, saved, continued = item
    _train(saved, None, folder)
    return _train(continued, folder, None)


def _train(case: Expert, source: Path | None, target: Path | None) -> Trace:
    context = ParallelContext.create(case.topology)
    config, task = case.layout.config(), task_of(context)
    engine = build_engine(config, context, task)
    if target is not None:
        trace = train(engine, config, task, steps=SAVED_AT)
        save_state(engine, target)
        return trace
    if source is not None:
        reader = CheckpointReader(locate(source).path)
        engine.load_state(reader, scalars=reader.manifest.training["engine"])
        return train(engine, config, task, first=SAVED_AT, steps=config.train.steps - SAVED_AT)
    return train(engine, config, task)


def save_state(engine: DeepSpeedEngine, folder: Path) -> None:
    """A checkpoint of what an engine holds, after ``SAVED_AT`` steps; collective over all ranks."""
    context = engine.context

    def agree(error: str | None) -> str | None:
        errors: list[str | None] = [None] * context.topology.world_size
        dist.all_gather_object(errors, error)
        return next((found for found in errors if found is not None), None)

    header = Header(SAVED_AT, {}, {}, {}, {"progress": {}, "engine": engine.scalar_state()})
    pieces = [PieceToWrite.of(piece) for piece in engine.state_pieces()]
    save_checkpoint(folder, header, pieces, rank=context.rank, world_size=context.topology.world_size, agree=agree)


@cache
def expert_traces() -> list[list[Trace]]:
    return run_ranks_on_each(4, train_expert, EXPERTS)


@cache
def expert_reference(layout: Layout) -> Trace:
    return train_plainly(layout.config(), task=task_of(None))


@pytest.mark.parametrize("index", range(len(EXPERTS)), ids=map(str, EXPERTS))
def test_a_parameter_on_a_new_axis_trains_as_in_one_process(index: int) -> None:
    want, ranks = expert_reference(EXPERTS[index].layout.reference), expert_traces()[index]
    assert min(want.grad_norms) > CLIP, "clipping is active in every step"
    _assert_equal(differences(_without_buffers(want), [_without_buffers(trace) for trace in ranks]))


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[Trace]]]:
    folder = tmp_path_factory.mktemp("experts")
    items = [(folder / str(index), *pair) for index, pair in enumerate(RESHARDED)]
    return folder, run_ranks_on_each(4, save_and_continue, items)


@pytest.mark.parametrize("index", range(len(RESHARDED)), ids=[f"{one}-to-{other}" for one, other in RESHARDED])
def test_it_is_saved_once_and_continues_on_another_layout(
    continued: tuple[Path, list[list[Trace]]], index: int
) -> None:
    folder, traces = continued
    want = expert_reference(RESHARDED[index][1].layout.reference)
    rest = replace(want, losses=want.losses[SAVED_AT:], grad_norms=want.grad_norms[SAVED_AT:])
    for trace in traces[index]:
        assert trace.losses == pytest.approx(rest.losses, abs=1e-5)
        assert trace.grad_norms == pytest.approx(rest.grad_norms, rel=1e-5)
    found = differences(
        _without_buffers(replace(rest, initial=want.initial)), [_without_buffers(t) for t in traces[index]]
    )
    assert found.weights < 1e-5
    assert found.copies == 0.0
    assert found.missing == 0
    record = read_manifest(locate(folder / str(index)).path).tensors
    for name, expected in want.initial.items():
        if name.startswith("output.") or "embedding" in name:  # padded rows are no elements of the full tensor
            continue
        for kind in {piece.kind for piece in record[name].pieces}:
            saved = sum(piece.length for piece in record[name].pieces if piece.kind == kind)
            assert saved == prod(expected.shape), f"{name}: every element of {kind} is saved once"
    buffer = record["heads.experts.steps"]
    assert not buffer.trainable and {piece.kind for piece in buffer.pieces} == {"buffer"}
    final = {name: value for trace in traces[index] for name, value in trace.initial.items()}
    micro_batches = float(final["heads.experts.steps"])
    assert micro_batches > 0, "state that is no parameter was read back"


def _without_buffers(trace: Trace) -> Trace:
    """The reference does not count its micro-batches."""
    kept = {name: value for name, value in trace.final.items() if not name.endswith("steps")}
    return replace(trace, initial={name: trace.initial[name] for name in kept}, final=kept)


def _assert_equal(found: Differences) -> None:
    assert found.initial_weights == 0.0
    assert found.missing == 0
    assert found.untrained == ()
    assert max(found.loss, found.grad_norm) < 1e-5
    assert found.weights < 1e-5
    assert found.copies == 0.0


FROZEN = [
    Layout(tp=2, pp=2),
    Layout(tp=2, sp=True, pp=2, schedule="zb_h1"),
    Layout(tp=2, dp=2, zero_stage=0),
    Layout(dp=4),
    Layout(dp=4, zero_stage=2),
    Layout(dp=4, zero_stage=3),
    Layout(pp=2, dp=2, dtype="bf16"),
    Layout(cp=2, dp=2, cp_attention="ring", recompute="full"),
    Layout(tp=2, sp=True, pp=2, schedule="zb_h1", fusion=True),
    Layout(dp=4, zero_stage=2, fusion=True),
]


def freeze_parts(model: Transformer) -> None:
    """The words (tied: on two stages), the first block whole, of the second the attention."""
    parts = [
        model.input and model.input.embedding,
        model.output and model.output.embedding,
        *(block for layer, block in model.blocks.items() if layer == "0"),
        *(block.attention for layer, block in model.blocks.items() if layer == "1"),
    ]
    for part in parts:
        if part is not None:
            freeze(part)


def _is_frozen(name: str) -> bool:
    return name.startswith(("embedding.weight", "blocks.0.", "blocks.1.attention."))


def train_frozen(item: tuple[Path, Layout]) -> tuple[Trace, int, int]:
    """With the trace the elements of this rank's trained slices, and of its gradient buffers."""
    folder, layout = item
    config = layout.config()
    task = replace(Task.of(config), prepare=freeze_parts)
    engine = build_engine(config, ParallelContext.create(layout.topology), task)
    trace = train(engine, config, task)
    save_state(engine, folder)
    trained = sum(t.tensor.numel() for t in engine.tensors if t.record.trainable)
    gradients = engine._optimizer.buckets
    buffered = sum(values.numel() for values in gradients.owned()) if layout.zero_stage < 3 else 0
    return trace, trained, buffered


@pytest.fixture(scope="module")
def frozen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[tuple[Trace, int, int]]]]:
    folder = tmp_path_factory.mktemp("frozen")
    return folder, run_ranks_on_each(4, train_frozen, [(folder / str(i), layout) for i, layout in enumerate(FROZEN)])


@cache
def frozen_reference(layout: Layout) -> Trace:
    config = layout.config()
    return train_plainly(config, task=replace(Task.of(config), prepare=freeze_parts))


@pytest.mark.parametrize("index", range(len(FROZEN)), ids=map(str, FROZEN))
def test_what_is_frozen_stays_costs_nothing_and_is_saved_once(
    frozen: tuple[Path, list[list[tuple[Trace, int, int]]]], index: int
) -> None:
    folder, results = frozen
    layout, ranks = FROZEN[index], [trace for trace, _, _ in results[index]]
    want = frozen_reference(layout.reference)
    bound = 1e-5 if layout.dtype == "fp32" else 3e-2
    assert min(want.grad_norms) > CLIP, "clipping is active in every step"
    found = differences(want, ranks)
    assert (found.initial_weights, found.missing, found.untrained) == (0.0, 0, ())
    assert max(found.loss, found.grad_norm, found.weights) < bound
    assert found.copies == 0.0
    for trace in ranks:
        for name, before in trace.initial.items():
            same = torch.equal(before.nan_to_num(), trace.final[name].nan_to_num())
            assert same == _is_frozen(name), name
    for _, trained, buffered in results[index]:
        if layout.zero_stage < 3:
            # A replica owns its part of each flat buffer, whose end is padded.
            replicas = 1 if layout.zero_stage == 0 else layout.dp * layout.cp
            assert trained <= buffered * replicas < trained + 64 * replicas, "gradients of what is trained alone"
    manifest = read_manifest(locate(folder / str(index)).path)
    for name, record in manifest.tensors.items():
        assert record.trainable != _is_frozen(name)
        kinds = {piece.kind for piece in record.pieces}
        assert kinds == ({"weight"} if _is_frozen(name) else {"weight", "exp_avg", "exp_avg_sq"})
        assert record.holes("weight") is None
        if _is_frozen(name) and name != "embedding.weight":
            assert sum(piece.length for piece in record.pieces) == prod(record.shape), f"{name} is saved once"


def test_a_frozen_model_is_read_back_as_it_was(frozen: tuple[Path, list[list[tuple[Trace, int, int]]]]) -> None:
    folder, _ = frozen
    reader = CheckpointReader(locate(folder / "0").path)
    initial = frozen_reference(FROZEN[0].reference).initial
    for name, record in reader.manifest.tensors.items():
        if _is_frozen(name):
            assert torch.equal(reader.read_local(name, "weight", ShardSpec.replicated(*record.shape)), initial[name])
