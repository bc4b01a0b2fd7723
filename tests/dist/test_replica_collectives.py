"""Collectives over replicas: how many a step takes, what they compute, and that none is waited for too late."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from communication import Collective, record
from harness import run_ranks, run_ranks_on_each
from parity import MODEL, Layout, train_on_ranks

from megalm.verify.parity import Trace

REPLICAS = (8, 64, 1024, 16384)
COUNTED = [
    Layout(),
    Layout(zero_stage=2),
    Layout(zero_stage=0),
    Layout(tp=2, sp=True),
    Layout(reduce_dtype="bf16", dtype="bf16"),
]


def count_on_rank(layout: Layout, replicas: int) -> tuple[int, Counter[str]]:
    """One rank of a world of so many replicas, in which collectives return at once: (buckets, calls over replicas)."""
    import numpy as np
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megalm.data.stream.batch import Batch
    from megalm.engine.micro_batches import training_micro_batches
    from megalm.mesh.groups import ParallelContext
    from megalm.verify.parity import Task, build_engine

    layout = replace(layout, dp=replicas)
    config = layout.config()
    config = replace(config, train=replace(config.train, global_batch_size=2 * replicas, micro_batch_size=1))
    dist.destroy_process_group()
    world = layout.topology.world_size
    dist.init_process_group("fake", store=FakeStore(), rank=world // 2, world_size=world)
    context = replace(ParallelContext.create(layout.topology), transport="nccl")
    engine = build_engine(config, context, Task.of(config))
    tokens = np.zeros((2, config.model.sequence_length), dtype=np.int64)
    batch = Batch(tokens, tokens, np.ones(tokens.shape, dtype=np.float32), np.arange(2))
    micro_batches, _ = training_micro_batches(batch, 1, context, engine.model.context_parallel)
    assert len(micro_batches) == 2
    with record() as events:
        engine.train_step(micro_batches, 1e-4)
    calls = Counter(
        event.operation
        for event in events
        if isinstance(event, Collective) and event.group_name == context.replica_group.handle.group_name
    )
    return len(engine._optimizer.buckets.owned()), calls


@cache
def counted(index: int, replicas: int) -> tuple[int, Counter[str]]:
    ((buckets, calls),) = run_ranks(1, count_on_rank, COUNTED[index], replicas)
    return buckets, calls


@pytest.mark.parametrize("index", range(len(COUNTED)), ids=map(str, COUNTED))
def test_a_step_takes_one_collective_per_bucket_however_many_replicas(index: int) -> None:
    layout, found = COUNTED[index], []
    for replicas in REPLICAS:
        buckets, calls = counted(index, replicas)
        reductions = Counter({name: n for name, n in calls.items() if not name.startswith("all_gather")})
        way = {0: "all_reduce"}.get(layout.zero_stage, "reduce_scatter_single")
        way = "all_to_all_single" if layout.reduce_dtype == "bf16" else way
        way = way if way in calls else way.replace("_single", "_tensor")  # its name before torch 2.13
        if layout.zero_stage == 2:  # in each of two backwards
            assert reductions == {way: 2 * buckets}
        else:
            assert reductions == {way: buckets}
        gathers = sum(n for name, n in calls.items() if name.startswith("all_gather"))
        assert gathers == (buckets if layout.zero_stage else 0)
        found.append(buckets)
    assert found[0] == found[1] >= found[2] >= found[3] >= 1
    assert found[0] >= 4, "there are several"


BITS = [
    Layout(dp=2),
    Layout(dp=2, transport="nccl"),
    Layout(dp=2, zero_stage=2, transport="nccl"),
    Layout(dp=2, zero_stage=2),
]


@cache
def bits() -> list[list[Trace]]:
    return run_ranks_on_each(2, train_on_ranks, BITS)


@pytest.mark.parametrize("index", range(1, len(BITS)), ids=map(str, BITS[1:]))
def test_sums_of_two_are_the_same_bits_in_every_way(index: int) -> None:
    # ZeRO-2 adds the replicas' gradients of each micro-batch, ZeRO-1 the sums over micro-batches.
    reference = bits()[3 if BITS[index].zero_stage == 2 else 0]
    for trace, want in zip(bits()[index], reference, strict=True):
        assert trace.losses == want.losses
        assert trace.grad_norms == want.grad_norms
        for name, weight in want.final.items():
            assert torch.equal(trace.final[name].nan_to_num(), weight.nan_to_num()), name


def reduce_on_rank() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By way: this replica's piece of the sum, and what each replica's values were before."""
    import torch.distributed as dist

    from megalm.engine.reduction import AllReduce, Exchange16Bit, ReduceScatter, ToOwners
    from megalm.mesh.groups import Group

    size, rank = dist.get_world_size(), dist.get_rank()
    replicas = Group(tuple(range(size)), rank, dist.group.WORLD)
    values = torch.randn(size * 1000, generator=torch.Generator().manual_seed(rank))
    found = {}
    for way in (ReduceScatter(), ToOwners(), Exchange16Bit(), AllReduce()):
        held = values.clone()
        piece = way.start(held, replicas).wait()
        assert piece.data_ptr() == held[rank * 1000 if len(piece) == 1000 else 0 :].data_ptr(), "a view of the bucket"
        found[type(way).__name__] = piece.clone(), values
    return found


def test_every_way_gives_each_replica_the_sum_of_its_piece() -> None:
    per_rank = run_ranks(4, reduce_on_rank)
    everyones = torch.stack([found["AllReduce"][1] for found in per_rank]).double()
    for rank, found in enumerate(per_rank):
        piece = slice(rank * 1000, (rank + 1) * 1000)
        exact = everyones[:, piece].sum(0)
        for way in ("ReduceScatter", "ToOwners"):
            torch.testing.assert_close(found[way][0].double(), exact, rtol=0, atol=2e-6)
        torch.testing.assert_close(found["AllReduce"][0].double(), everyones.sum(0), rtol=0, atol=2e-6)
        others = torch.cat((everyones[:rank, piece], everyones[rank + 1 :, piece]))
        error = (found["Exchange16Bit"][0].double() - exact).abs()
        assert bool((error <= others.abs().sum(0) * 2.0**-8 + 2e-6).all()), "each other one's is rounded once"
        assert float(error.max()) > 1e-4, "they travel in 16 bits"
        rounded = others.float().bfloat16().double().sum(0) + everyones[rank, piece]
        torch.testing.assert_close(found["Exchange16Bit"][0].double(), rounded, rtol=0, atol=2e-6)


def follow_gathers(layout: Layout) -> dict[str, list]:
    """What is under way after a step and before each part of the next forward, and who waits for it."""
    from megalm.mesh.groups import ParallelContext
    from megalm.models.transformer import without_training
    from megalm.verify.parity import Task, build_engine, micro_batches_of_rank

    config = layout.config()
    context = ParallelContext.create(layout.topology)
    task = Task.of(config)
    engine = build_engine(config, context, task)
    weights = engine._optimizer._weights
    micro_batches = micro_batches_of_rank(config, 0, context, engine.model.context_parallel, task)
    buckets = len(weights._shards)
    seen: list[tuple[int, bool]] = []

    def step() -> None:
        engine.train_step(micro_batches, 1e-3)

    step()
    after_step = len(weights._under_way)
    original = engine.model.before_use

    def before_use(part):
        original(part)
        parameters = {p for module, found in engine.model.parts() if module is part for p in found}
        missing = [
            number
            for number in weights._under_way
            if parameters & {parameter for parameter, _ in weights._shards[number].layout.places()}
        ]
        seen.append((len(weights._under_way), not missing))

    def ask_view() -> None:
        model, vocab_size = engine.model, config.model.vocab_size
        view = without_training(model, config, vocab_size, context=context, objective=task.objective)
        view.through(0, torch.zeros(1, 4, dtype=torch.long), None)

    engine.model.before_use = before_use
    step()
    forward = seen[: len(list(engine.model.parts()))]
    engine.model.before_use = original
    found = {"buckets": [buckets], "after_step": [after_step], "forward": forward}
    for name, read in {
        "evaluate": lambda: engine.evaluate(micro_batches),
        "state_pieces": engine.state_pieces,
        "full_weight": lambda: engine.full_weight(engine.tensors[0]),
        "model_pieces": engine.model_pieces,
        "settle_weights": engine.settle_weights,
        "view": ask_view,
    }.items():
        step()
        pending = len(weights._under_way)
        read()
        found[name] = [pending, len(weights._under_way)]
    return found


def publish_on_rank(layout: Layout) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Masters that every replica changed in the piece that it owns, and the weights that are made of them."""
    from megalm.mesh.groups import ParallelContext
    from megalm.verify.parity import Task, build_engine

    config = layout.config()
    engine = build_engine(config, ParallelContext.create(layout.topology), Task.of(config))
    want = {}
    for number, t in enumerate(engine.tensors):
        want[t.name] = torch.randn(
            t.parameter.numel() if layout.zero_stage < 3 else t.parameter.ds_numel,
            generator=torch.Generator().manual_seed(number),
        )
        for kind, start, values in engine._optimizer.fragments(t.parameter):
            assert kind == "weight"
            with torch.no_grad():
                values.copy_(want[t.name][start : start + len(values)])
    engine._optimizer.publish_weights()
    return [(t.name, engine.full_weight(t).flatten().clone(), want[t.name]) for t in engine.tensors]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=4),
        Layout(dp=4, zero_stage=2, dtype="bf16"),
        Layout(dp=4, zero_stage=0),
        Layout(dp=4, zero_stage=3, dtype="bf16"),
        Layout(dp=4, offload=True, dtype="bf16"),
    ],
    ids=str,
)
def test_weights_are_made_of_the_pieces_that_replicas_own(layout: Layout) -> None:
    for found in run_ranks(4, publish_on_rank, layout):
        assert len(found) > 10
        for name, weight, want in found:
            assert torch.equal(weight, want.to(weight.dtype)), name


def test_gathers_are_hidden_behind_forward_and_awaited_by_whoever_reads_weights() -> None:
    for found in run_ranks(2, follow_gathers, Layout(dp=2, dtype="bf16")):
        (buckets,), forward = found["buckets"], found["forward"]
        assert buckets >= 4
        assert found["after_step"] == [buckets], "nobody waits at the end of a step"
        assert all(is_there for _, is_there in forward), "a part's own weights are there when it computes"
        left = [number for number, _ in forward]
        assert 0 < left[0] < buckets and left == sorted(left, reverse=True), "one after the other, as forward comes"
        assert sum(number > 0 for number in left) >= MODEL.num_layers // 2
        assert left[-1] == 0
        for name in ("evaluate", "state_pieces", "full_weight", "model_pieces", "settle_weights", "view"):
            assert found[name] == [buckets, 0], name
