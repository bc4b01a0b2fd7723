"""Schedules as data: legal, deadlock-free, with the published bubble and memory; how they are run; the split of layers.

What is asserted of a schedule is worked out here anew, from the list of actions and the definition of a pipeline, and
not with the functions under test.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from megalm.core.pipeline.p2p import Tensors, TensorSpec
from megalm.core.pipeline.partition import partition_layers
from megalm.core.pipeline.runner import PipelineRunner
from megalm.core.pipeline.schedule import (
    SCHEDULES,
    Action,
    Kind,
    ScheduleError,
    Shape,
    Tick,
    forward_only,
    gpipe,
    peak_live_activations,
    plan,
    splits_backward,
)
from megalm.core.pipeline.timing import bubble_fraction
from megalm.core.weight_gradients import WeightGradients
from megalm.mesh.groups import ParallelContext
from megalm.mesh.topology import Topology

VIRTUAL = {"gpipe": (1, 2, 3, 4), "1f1b": (1,), "interleaved_1f1b": (1, 2, 3, 4), "zb_h1": (1,)}
SETUPS = [(name, p, v) for name in SCHEDULES for p in range(1, 9) for v in VIRTUAL[name]]
"""Every schedule, on 1 to 8 ranks and as many virtual stages as it runs."""


def micro_batches_for(p: int) -> list[int]:
    """Less than a round, whole rounds, and rounds with a remainder, up to four rounds."""
    return sorted({1, 2, p - 1, p, p + 1, 2 * p, 3 * p - 1, 4 * p} - {0})


@cache
def ticks_of(name: str, shape: Shape) -> list[tuple[Tick, ...]]:
    return plan(SCHEDULES[name], shape)


def shapes(p: int, v: int) -> list[Shape]:
    return [Shape(p, m, v) for m in micro_batches_for(p)]


setups = pytest.mark.parametrize(("name", "p", "v"), SETUPS)


@setups
def test_every_rank_does_its_work_once_and_nothing_before_what_it_needs(name: str, p: int, v: int) -> None:
    for shape in shapes(p, v):
        when: dict[tuple[str, int, int], int] = {}
        for rank, rank_ticks in enumerate(ticks_of(name, shape)):
            for time, tick in enumerate(rank_ticks):
                if tick.action:
                    key = tick.action.kind.value, tick.action.stage, tick.action.micro_batch
                    assert tick.action.stage % p == rank
                    assert key not in when
                    when[key] = time
        last = p * v - 1
        kinds = "FIW" if splits_backward(name) else "FB"
        assert when.keys() == {(k, s, b) for k in kinds for s in range(last + 1) for b in range(shape.micro_batches)}
        for (kind, stage, b), time in when.items():
            if kind == "F":
                assert stage == 0 or when["F", stage - 1, b] < time
            elif kind == "W":
                assert when["I", stage, b] < time
            else:
                assert when["F", stage, b] < time
                assert stage == last or when[kind, stage + 1, b] < time


@setups
def test_every_send_meets_its_receive_in_the_same_tick(name: str, p: int, v: int) -> None:
    for shape in shapes(p, v):
        ticks, transferred = ticks_of(name, shape), 0
        assert len({len(rank_ticks) for rank_ticks in ticks}) == 1
        for together in zip(*ticks, strict=True):
            sends = Counter(t for tick in together for t in tick.sends)
            assert sends == Counter(t for tick in together for t in tick.receives)
            transferred += sends.total()
            for rank, tick in enumerate(together):
                assert all(t.source == rank for t in tick.sends)
                assert all(t.target == rank for t in tick.receives)
                for t in tick.sends:
                    action = tick.action
                    assert action is not None
                    assert t.micro_batch == action.micro_batch
                    assert t.is_gradient == (action.kind is not Kind.FORWARD)
                    assert t.stage == action.stage + (-1 if t.is_gradient else 1)
        assert transferred == 2 * (p * v - 1) * shape.micro_batches


@setups
def test_no_deadlock_if_each_group_of_transfers_blocks_until_all_its_partners_come(name: str, p: int, v: int) -> None:
    """Rendezvous of whole groups: no transfer of a group completes before every partner has entered its own."""
    for shape in shapes(p, v):
        queues = [
            [group for tick in rank_ticks if (group := {t for t in tick.sends + tick.receives if t.source != t.target})]
            for rank_ticks in ticks_of(name, shape)
        ]
        position = [0] * p
        while any(position[r] < len(queues[r]) for r in range(p)):
            current = [queues[r][position[r]] if position[r] < len(queues[r]) else set() for r in range(p)]
            released = [
                r
                for r in range(p)
                if current[r] and all(t in current[t.source] and t in current[t.target] for t in current[r])
            ]
            # Partners leave together, so a group of three must be free as a whole.
            blocked = set(range(p)) - set(released)
            while grown := [
                r for r in released if r not in blocked and any({t.source, t.target} & blocked for t in current[r])
            ]:
                blocked.update(grown)
            free = [r for r in released if r not in blocked]
            assert free, f"{name} {shape} deadlocks at {current}"
            for r in free:
                position[r] += 1


@setups
def test_memory_is_the_published_one(name: str, p: int, v: int) -> None:
    for shape in shapes(p, v):
        m = shape.micro_batches
        for rank in range(p):
            peak = peak_live_activations(SCHEDULES[name](rank, shape))
            if name == "gpipe":
                assert peak == m * v
            elif name == "1f1b":
                assert peak == min(p - rank, m)
            elif name == "zb_h1":
                assert peak <= p
                assert peak == min(p, m)
            elif m % p == 0:
                # Megatron-LM: 2(p - r - 1) + (v - 1)p warm-up forwards, and one more before the first backward.
                assert peak == min(2 * (p - rank - 1) + (v - 1) * p + 1, m * v)


@setups
def test_bubble_is_the_published_one(name: str, p: int, v: int) -> None:
    for m in (p, 2 * p, 4 * p):
        bubble = bubble_fraction(SCHEDULES[name], Shape(p, m, v))
        idle = {"zb_h1": (p - 1) / 3}.get(name, (p - 1) / v)
        assert bubble == pytest.approx(idle / (m + idle))


@pytest.mark.parametrize("p", range(2, 9))
def test_zero_bubble_idles_less_than_1f1b(p: int) -> None:
    for m in micro_batches_for(p):
        if m > 1:
            shape = Shape(p, m)
            assert bubble_fraction(SCHEDULES["zb_h1"], shape) < bubble_fraction(SCHEDULES["1f1b"], shape)


@pytest.mark.parametrize("v", [1, 2])
def test_evaluation_runs_forward_alone(v: int) -> None:
    for rank_ticks in plan(forward_only, Shape(3, 5, v)):
        assert [t.action.kind for t in rank_ticks if t.action] == [Kind.FORWARD] * 5 * v


def test_a_schedule_that_deadlocks_is_found() -> None:
    def backward_first(rank: int, shape: Shape) -> list[Action]:
        return list(reversed(gpipe(rank, shape)))

    with pytest.raises(ScheduleError, match="deadlocks"):
        plan(backward_first, Shape(2, 2))
    with pytest.raises(ScheduleError, match="deadlocks"):
        bubble_fraction(backward_first, Shape(2, 2))


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        (lambda r, s: gpipe(r, s) * 2, "pipeline rank 0 repeats an action"),
        (lambda r, s: gpipe(r, s)[:-1], "pipeline rank 0 leaves out backwards"),
        (lambda r, s: gpipe(r, s)[1:], "pipeline rank 0 does not do each of its work"),
        (lambda r, s: [*gpipe(r, s), Action(Kind.WEIGHT_GRADIENT, r, 0)], "pipeline rank 0 does not do each"),
        (lambda r, s: gpipe(1 - r, s), "pipeline rank 0 does not do each of its work"),
    ],
    ids=["twice", "no backward", "no forward", "half a backward", "another rank's stage"],
)
def test_a_schedule_that_does_other_work_is_found(faulty, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        plan(faulty, Shape(2, 2))


@pytest.mark.parametrize("name", ["1f1b", "zb_h1"])
def test_schedules_of_one_stage_per_rank_refuse_more(name: str) -> None:
    with pytest.raises(ScheduleError, match=f"{name} runs one stage per rank, not 2"):
        plan(SCHEDULES[name], Shape(2, 2, 2))


class _PostponedProduct:
    """∂L/∂W of one linear layer for one micro-batch, not yet multiplied."""

    def __init__(self, gradient: torch.Tensor, inputs: torch.Tensor) -> None:
        self._gradient, self._inputs = gradient, inputs

    def start(self) -> None:
        """No communication."""

    def __call__(self) -> torch.Tensor:
        return self._gradient.flatten(0, -2).T @ self._inputs.flatten(0, -2)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs, weight, weight_gradients):
        ctx.save_for_backward(inputs, weight)
        ctx.weight_gradients, ctx.weight = weight_gradients, weight
        return inputs @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        inputs, weight = ctx.saved_tensors
        product = _PostponedProduct(gradient, inputs)
        if ctx.weight_gradients is not None and ctx.weight_gradients.postpones:
            ctx.weight_gradients.postpone(ctx.weight, product)
            return gradient @ weight, None, None
        return gradient @ weight, product(), None


class _Stages(nn.Module):
    """Stages of one linear layer each; the last one gives the objective."""

    def __init__(self, stages: int, weight_gradients: WeightGradients | None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weights = nn.ParameterList(torch.randn(4, 4, generator=generator) for _ in range(stages))
        self.weight_gradients = weight_gradients
        self.outputs: dict[tuple[int, int], weakref.ref] = {}
        self.alive: list[int] = []

    def forward(self, stage: int, received: Tensors | None, micro_batch: torch.Tensor) -> Tensors:
        self.alive.append(sum(output() is not None for output in self.outputs.values()))
        hidden = micro_batch if received is None else received["hidden"]
        sums = torch.zeros(2) if received is None else received["sums"]
        output = _Linear.apply(hidden, self.weights[stage], self.weight_gradients)
        sums = sums + torch.stack([output.mean(), output.sum()])
        if stage == len(self.weights) - 1:
            return {"loss": output.square().mean(), "mean": sums[0], "sum": sums[1].detach()}
        self.outputs[stage, len(self.outputs)] = weakref.ref(output)
        return {"hidden": output, "sums": sums}


def _runner(name: str, v: int) -> tuple[_Stages, PipelineRunner]:
    weight_gradients = WeightGradients() if splits_backward(name) else None
    stages = _Stages(v, weight_gradients)
    context = replace(ParallelContext.single(), topology=Topology(virtual_stages=v))
    return stages, PipelineRunner(
        stages,
        context,
        schedule=name,
        between_stages={"hidden": TensorSpec((2, 3, 4), torch.float32), "sums": TensorSpec((2,), torch.float32)},
        weight_gradients=weight_gradients,
    )


RUNS = [(name, v) for name in SCHEDULES for v in VIRTUAL[name] if v < 3]


@pytest.mark.parametrize(("name", "v"), RUNS)
def test_a_run_gives_the_losses_and_gradients_of_autograd(name: str, v: int) -> None:
    stages, runner = _runner(name, v)
    micro_batches = list(torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(1)))
    result = runner.train(micro_batches, loss_scale=2.0)
    weights = [w.detach().clone().requires_grad_() for w in stages.weights]
    losses, means, sums = [], [], []
    for micro_batch in micro_batches:
        hidden, mean, total = micro_batch, torch.zeros(()), torch.zeros(())
        for weight in weights:
            hidden = F.linear(hidden, weight)
            mean, total = mean + hidden.mean(), total + hidden.sum()
        losses.append(hidden.square().mean())
        means.append(mean)
        sums.append(total)
    (torch.stack(losses + means).sum() * 2.0).backward()
    terms = {"loss": losses, "mean": means, "sum": sums}
    _assert_terms(result.terms, terms)
    for got, want in zip(stages.weights, weights, strict=True):
        torch.testing.assert_close(got.grad, want.grad)
    _assert_terms(runner.evaluate(micro_batches).terms, terms)


def _assert_terms(found: list[Tensors], want: dict[str, list[torch.Tensor]]) -> None:
    for name, values in want.items():
        torch.testing.assert_close(torch.stack([terms[name] for terms in found]), torch.stack(values).detach())


def test_the_output_that_autograd_made_is_freed_once_it_is_handed_on() -> None:
    """gpipe holds every graph to the end; none of them holds the stage output with it."""
    stages, runner = _runner("gpipe", 2)
    runner.train([torch.randn(2, 3, 4) for _ in range(5)])
    gc.collect()
    assert len(stages.outputs) == 5
    assert max(stages.alive) == 0


@given(stages=st.integers(1, 6), extra=st.integers(0, 12), head=st.floats(0, 6), embedding=st.floats(0, 3))
def test_partition_loses_no_layer_and_none_balances_better(stages, extra, head, embedding) -> None:
    layers = stages + extra
    parts = partition_layers(layers, stages, embedding_cost=embedding, head_cost=head)
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert len(parts) == stages
    assert all(len(part) >= 1 for part in parts)

    def largest(sizes: list[int]) -> float:
        return max(s + embedding * (i == 0) + head * (i == stages - 1) for i, s in enumerate(sizes))

    sizes = [len(part) for part in parts]
    for source in range(stages):
        for target in range(stages):
            if sizes[source] > 1 and source != target:
                moved = [s - (i == source) + (i == target) for i, s in enumerate(sizes)]
                assert largest(sizes) <= largest(moved) + 1e-9


def test_an_even_model_splits_evenly_and_a_heavy_head_takes_fewer_layers() -> None:
    assert [len(p) for p in partition_layers(96, 16)] == [6] * 16
    assert [len(p) for p in partition_layers(6, 2, head_cost=1.8)] == [4, 2]


def test_fewer_layers_than_stages_are_refused() -> None:
    with pytest.raises(ValueError, match="5 layers cannot fill 8 stages"):
        partition_layers(5, 8)


def test_given_sizes_are_taken_as_they_are() -> None:
    parts = partition_layers(7, 3, sizes=(1, 4, 2), head_cost=50.0)
    assert parts == [range(0, 1), range(1, 5), range(5, 7)]


@pytest.mark.parametrize("sizes", [(3, 4), (1, 4, 3), (0, 5, 2), (1, 1, 1)])
def test_given_sizes_that_are_no_split_are_refused(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="are no split of 7 layers into 3 stages"):
        partition_layers(7, 3, sizes=sizes)
