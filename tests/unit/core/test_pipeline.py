"""Schedules as data: legal, deadlock-free, with the published bubble and memory; and the split of layers."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.core.pipeline.partition import partition_layers
from megalm.core.pipeline.schedule import (
    SCHEDULES,
    Action,
    Kind,
    ScheduleError,
    bubble_fraction,
    forward_only,
    gpipe,
    one_forward_one_backward,
    peak_live_activations,
    plan,
)

degrees = st.integers(1, 8)


@given(name=st.sampled_from(sorted(SCHEDULES)), degree=degrees, micro_batches=st.integers(1, 32))
def test_every_rank_does_its_work_once_and_every_send_meets_its_receive(name, degree, micro_batches) -> None:
    ticks = plan(SCHEDULES[name], degree, micro_batches)
    for rank, rank_ticks in enumerate(ticks):
        actions = [tick.action for tick in rank_ticks if tick.action]
        want = {Action(kind, rank, m) for kind in Kind for m in range(micro_batches)}
        assert len(actions) == len(want)
        assert set(actions) == want
    for together in zip(*ticks, strict=True):
        sends = Counter(t for tick in together for t in tick.sends)
        assert sends == Counter(t for tick in together for t in tick.receives)
        for rank, tick in enumerate(together):
            assert all(t.source == rank for t in tick.sends)
            assert all(t.target == rank for t in tick.receives)


@given(name=st.sampled_from(sorted(SCHEDULES)), degree=degrees, micro_batches=st.integers(1, 32))
def test_no_action_runs_before_what_it_needs_was_received(name, degree, micro_batches) -> None:
    for rank_ticks in plan(SCHEDULES[name], degree, micro_batches):
        arrived, computed = set(), set()
        for tick in rank_ticks:
            if action := tick.action:
                first, last = action.stage == 0, action.stage == degree - 1
                if action.kind is Kind.FORWARD:
                    assert first or (action.kind, action.micro_batch) in arrived
                else:
                    assert last or (action.kind, action.micro_batch) in arrived
                    assert Action(Kind.FORWARD, action.stage, action.micro_batch) in computed
                computed.add(action)
            arrived |= {(t.kind, t.micro_batch) for t in tick.receives}


@given(name=st.sampled_from(sorted(SCHEDULES)), degree=degrees, micro_batches=st.integers(1, 32))
def test_bubble_is_the_published_one(name, degree, micro_batches) -> None:
    published = (degree - 1) / (micro_batches + degree - 1)
    assert bubble_fraction(SCHEDULES[name], degree, micro_batches) == pytest.approx(published)


@given(degree=degrees, micro_batches=st.integers(1, 32))
def test_peak_live_activations(degree, micro_batches) -> None:
    for rank in range(degree):
        eager = one_forward_one_backward(rank, degree, micro_batches)
        assert peak_live_activations(eager) == min(degree - rank, micro_batches)
        assert peak_live_activations(gpipe(rank, degree, micro_batches)) == micro_batches


def test_evaluation_runs_forward_alone() -> None:
    for rank_ticks in plan(forward_only, 3, 5):
        assert [t.action.kind for t in rank_ticks if t.action] == [Kind.FORWARD] * 5


def test_a_schedule_that_deadlocks_is_found() -> None:
    def backward_first(rank: int, degree: int, micro_batches: int) -> list[Action]:
        return list(reversed(gpipe(rank, degree, micro_batches)))

    with pytest.raises(ScheduleError, match="deadlocks"):
        plan(backward_first, 2, 2)


def test_a_schedule_that_repeats_work_is_found() -> None:
    with pytest.raises(ScheduleError, match="pipeline rank 0 repeats an action"):
        plan(lambda r, p, m: gpipe(r, p, m) * 2, 2, 2)


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
