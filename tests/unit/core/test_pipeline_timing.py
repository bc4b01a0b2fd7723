"""In what order ranks issue work and transfers, that no rank waits for ever, and how long a step takes under them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.core.pipeline.order import Exchange, Issue, assert_paired, issues, orders
from megalm.core.pipeline.schedule import (
    SCHEDULES,
    Action,
    Kind,
    ScheduleError,
    Shape,
    Tick,
    Transfer,
    forward_only,
    plan,
    splits_backward,
)
from megalm.core.pipeline.timing import Durations, bubble_fraction, replay

PP16 = Shape(16, 192)
V3 = Shape(16, 192, 3)


@st.composite
def setups(draw) -> tuple[str, Shape]:
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    stages = draw(st.integers(1, 4)) if name in ("gpipe", "interleaved_1f1b") else 1
    return name, Shape(draw(st.integers(1, 7)), draw(st.integers(1, 16)), stages)


durations = st.builds(Durations, *[st.floats(0.1, 4.0)] * 3)


def links_of(order: list[Issue]) -> list[Exchange]:
    return [issue for issue in order if isinstance(issue, Exchange)]


@given(setup=setups(), early=st.booleans())
@settings(deadline=None, max_examples=150)
def test_every_order_ends_and_each_rank_works_all_its_time_or_waits(setup, early: bool) -> None:
    name, shape = setup
    of_ranks = orders(plan(SCHEDULES[name], shape), early=early)
    found = replay(of_ranks, shape, transfer=0.3)
    # Each forward takes 1, each backward 2.
    assert found.busy == pytest.approx([3.0 * shape.virtual_stages * shape.micro_batches] * shape.degree)
    assert 0.0 <= found.bubble_fraction < 1.0
    for rank, order in enumerate(of_ranks):
        assert [i for i in order if isinstance(i, Action)] == SCHEDULES[name](rank, shape)
        for exchange in links_of(order):
            remote = [t for t in exchange.transfers if t.source != t.target]
            assert all(rank in (t.source, t.target) for t in remote)
            assert not early or all((t.source, t.target) == exchange.link for t in remote)


@given(setup=setups(), early=st.booleans())
@settings(deadline=None, max_examples=50)
def test_evaluation_ends_too(setup, early: bool) -> None:
    _, shape = setup
    replay(orders(plan(forward_only, shape), early=early), shape, transfer=0.1)


@given(setup=setups(), each=durations, transfer=st.floats(0.0, 0.5))
@settings(deadline=None, max_examples=150)
def test_early_receives_are_no_later_than_grouped_transfers_and_no_earlier_than_what_work_needs(
    setup, each: Durations, transfer: float
) -> None:
    name, shape = setup
    early, grouped = (
        bubble_fraction(SCHEDULES[name], shape, each, transfer=transfer, early=early) for early in (True, False)
    )
    least = _bubble_of_free_transfers(name, shape, each, transfer)
    assert least - 1e-9 <= early
    assert early <= grouped + 1e-9
    assert bubble_fraction(SCHEDULES[name], shape, each) == pytest.approx(
        _bubble_of_free_transfers(name, shape, each, 0.0)
    ), "where transfers take no time, work alone counts"


def _bubble_of_free_transfers(name: str, shape: Shape, each: Durations, transfer: float) -> float:
    """Every transfer begins when its tensor is there: no streams, no partner that is not ready. Worked out anew."""
    p, last = shape.degree, shape.num_stages - 1
    queues = [list(SCHEDULES[name](rank, shape)) for rank in range(p)]
    finished: dict[tuple[str, int, int], float] = {}
    clock = [0.0] * p
    time_of = {"F": each.forward, "I": each.input_gradient, "W": each.weight_gradient}
    time_of["B"] = time_of["I"] + time_of["W"]
    while any(queues):
        for rank, queue in enumerate(queues):
            while queue:
                kind, stage, b = queue[0].kind.value, queue[0].stage, queue[0].micro_batch
                start = clock[rank]
                if (kind == "F" and stage > 0) or (kind in "BI" and stage < last):
                    need = kind, stage + (-1 if kind == "F" else 1), b
                    if need not in finished:
                        break
                    start = max(start, finished[need] + (transfer if p > 1 else 0.0))
                clock[rank] = finished[kind, stage, b] = start + time_of[kind]
                queue.pop(0)
    kinds = "FIW" if splits_backward(name) else "FB"
    busy = sum(time_of[k] for k in kinds) * shape.virtual_stages * shape.micro_batches
    return 1.0 - busy / max(clock)


@pytest.mark.parametrize(
    ("name", "shape", "grouped", "early"),
    [
        ("interleaved_1f1b", V3, 0.0648, 0.0280),
        ("zb_h1", PP16, 0.0581, 0.0303),
        ("1f1b", PP16, 0.1021, 0.1006),
        ("gpipe", PP16, 0.1022, 0.0747),
    ],
)
def test_bubbles_of_16_stages_at_transfers_of_a_twentieth_of_a_forward(name, shape, grouped, early) -> None:
    for found, want in ((False, grouped), (True, early)):
        bubble = bubble_fraction(SCHEDULES[name], shape, transfer=0.05, early=found)
        assert bubble == pytest.approx(want, abs=1e-4)


def test_the_table_of_the_documentation_is_what_a_replay_gives() -> None:
    text = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    for name in SCHEDULES:
        shape = V3 if name == "interleaved_1f1b" else PP16
        (row,) = re.findall(rf"^\| `{name}` \| ([\d.| ]+) \|$", text, re.MULTILINE)
        found = [bubble_fraction(SCHEDULES[name], shape)]
        found += [
            bubble_fraction(SCHEDULES[name], shape, transfer=t, early=e)
            for e in (False, True)
            for t in (0.0, 0.05, 0.1)
        ]
        assert row.split(" | ") == [f"{100 * bubble:.1f}" for bubble in found], name


@pytest.mark.parametrize(("p", "m"), [(2, 3), (4, 16), (7, 5)])
def test_gpipe_pays_for_each_transfer_once_on_the_way_forth_and_once_on_the_way_back(p: int, m: int) -> None:
    """With receives posted early only the first micro-batch's transfers are waited for, and the last gradients'."""
    found = replay(orders(plan(SCHEDULES["gpipe"], Shape(p, m)), early=True), Shape(p, m), transfer=0.25)
    assert found.total == pytest.approx(3 * (m + p - 1) + 2 * (p - 1) * 0.25)


def test_stages_may_take_different_times() -> None:
    """Two stages, of which the second is slower: the first one's forward, then the second without a pause."""
    slow = Durations(3.0, 2.0, 1.0)
    shape = Shape(2, 4)
    found = replay(orders(plan(SCHEDULES["1f1b"], shape), early=True), shape, (Durations(), slow), transfer=0.5)
    assert found.busy == pytest.approx((4 * 3.0, 4 * 6.0))
    assert found.total == pytest.approx(1.0 + 0.5 + 4 * 6.0 + 0.5 + 2.0)
    with pytest.raises(ValueError, match="durations of 1 stages are given, the pipeline has 2"):
        replay(orders(plan(SCHEDULES["1f1b"], shape), early=True), shape, (slow,))


@given(setup=setups())
@settings(deadline=None, max_examples=100)
def test_early_receives_need_the_buffers_of_one_tick_more(setup) -> None:
    name, shape = setup
    for ticks in plan(SCHEDULES[name], shape):
        early, grouped = (_most_buffers(ticks, early=early) for early in (True, False))
        assert grouped <= early <= grouped + 2


def _most_buffers(ticks: tuple[Tick, ...], *, early: bool) -> int:
    """Receive buffers that exist at one time; work holds its own until it is done."""
    held: set[tuple[bool, int, int]] = set()
    most = 0
    for tick in ticks:
        for issue in issues(tick, early=early):
            if isinstance(issue, Exchange):
                arriving = [t for t in tick.receives if t in issue.transfers and t.source != t.target]
                held |= {(t.is_gradient, t.stage, t.micro_batch) for t in arriving}
                most = max(most, len(held))
            elif issue.kind is not Kind.WEIGHT_GRADIENT:
                held.discard((issue.kind.sends_gradient, issue.stage, issue.micro_batch))
    return most


# --- wrong orders -----------------------------------------------------------------------------------------------------

RING = Shape(4, 8, 2)


def _early() -> list[list[Issue]]:
    return orders(plan(SCHEDULES["interleaved_1f1b"], RING), early=True)


def _is_receive(issue: Issue, rank: int) -> bool:
    return isinstance(issue, Exchange) and issue.transfers[0].target == rank


def test_early_receives_on_one_communicator_deadlock_and_are_refused() -> None:
    """A ring: each rank's send queues behind a receive whose sender's send queues behind a receive, and so on."""
    shared = [
        [replace(issue, link=None) if isinstance(issue, Exchange) else issue for issue in order] for order in _early()
    ]
    with pytest.raises(ScheduleError, match=r"deadlocks: every rank waits \(pipeline rank 0: .*; pipeline rank 1: "):
        replay(shared, RING)


def test_one_communicator_for_both_directions_of_a_pair_deadlocks_and_is_refused() -> None:
    undirected = [
        [replace(i, link=tuple(sorted(i.link))) if isinstance(i, Exchange) and i.link else i for i in order]
        for order in orders(plan(SCHEDULES["1f1b"], Shape(2, 4)), early=True)
    ]
    with pytest.raises(ScheduleError, match="deadlocks"):
        replay(undirected, Shape(2, 4))


def test_receives_posted_in_another_order_than_sends_are_refused() -> None:
    of_ranks = _early()
    first, second = [i for i, issue in enumerate(of_ranks[1]) if _is_receive(issue, 1)][:2]
    order = of_ranks[1]
    order[first], order[second] = order[second], order[first]
    with pytest.raises(ScheduleError, match=r"transfer 0 from pipeline rank 0 to 1: the activation of micro-batch 0"):
        replay(of_ranks, RING)


def test_a_transfer_without_its_counterpart_is_refused() -> None:
    of_ranks = _early()
    last = max(i for i, issue in enumerate(of_ranks[1]) if _is_receive(issue, 1))
    del of_ranks[1][last]
    with pytest.raises(ScheduleError, match="is sent, nothing is received"):
        assert_paired(of_ranks)


def test_work_whose_input_is_received_later_is_refused() -> None:
    shape = Shape(2, 1)
    of_ranks = orders(plan(SCHEDULES["1f1b"], shape), early=True)
    receive = next(i for i, issue in enumerate(of_ranks[1]) if _is_receive(issue, 1))
    work = next(i for i, issue in enumerate(of_ranks[1]) if isinstance(issue, Action))
    assert receive < work
    of_ranks[1].insert(work, of_ranks[1].pop(receive))
    with pytest.raises(ScheduleError, match=r"pipeline rank 1 computes F1\.0 before it posts the receive of its input"):
        replay(of_ranks, shape)


def test_a_rank_that_waits_for_an_answer_to_what_it_has_not_sent_is_refused() -> None:
    """Rank 0 sends an activation after it has worked on the gradient that comes back."""
    shape = Shape(2, 1)
    of_ranks = orders(plan(SCHEDULES["1f1b"], shape), early=True)
    send = next(i for i, x in enumerate(of_ranks[0]) if isinstance(x, Exchange) and x.transfers[0].source == 0)
    of_ranks[0].append(of_ranks[0].pop(send))
    with pytest.raises(ScheduleError, match=r"pipeline rank 0: B0\.0; pipeline rank 1: F1\.0"):
        replay(of_ranks, shape)


def test_a_tick_is_issued_as_receives_then_work_then_sends() -> None:
    activation, gradient = Transfer(False, 1, 3, 0, 1), Transfer(True, 1, 2, 2, 1)
    result, work = Transfer(False, 2, 2, 1, 2), Action(Kind.FORWARD, 1, 2)
    tick = Tick(work, sends=(result,), receives=(activation, gradient))
    assert list(issues(tick, early=True)) == [
        Exchange((activation,), (0, 1)),
        Exchange((gradient,), (2, 1)),
        work,
        Exchange((result,), (1, 2)),
    ]
    assert list(issues(tick, early=False)) == [work, Exchange((result, activation, gradient))]


def test_what_stays_on_a_rank_is_handed_over_after_the_work() -> None:
    own, work = Transfer(False, 1, 0, 0, 0), Action(Kind.FORWARD, 0, 0)
    for early in (True, False):
        first, then = issues(Tick(work, (own,), (own,)), early=early)
        assert first == work
        assert isinstance(then, Exchange)
        assert then.transfers == (own,)
