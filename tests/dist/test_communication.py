"""No layout asks its ranks for communication that could hang where calls block, as NCCL's may.

Every layout trains one step and evaluates once through the engine, with every call to ``torch.distributed`` recorded,
DeepSpeed's included; :func:`communication.check` then replays what all ranks asked for, each call blocking.
"""

from __future__ import annotations

from functools import cache

import pytest
from communication import (
    Collective,
    Event,
    Payload,
    Transfer,
    Transfers,
    UnsafeCommunicationError,
    Wait,
    check,
    record,
)
from harness import run_ranks_on_each
from parity import Layout

WORLDS: dict[int, list[Layout]] = {
    4: [
        *(Layout(pp=4, schedule=schedule) for schedule in ("gpipe", "1f1b", "zb_h1")),
        *(Layout(tp=2, sp=sp, pp=2, schedule=s) for sp in (False, True) for s in ("gpipe", "1f1b", "zb_h1")),
        *(Layout(pp=2, dp=2, schedule=schedule) for schedule in ("gpipe", "1f1b", "zb_h1")),
        *(Layout(cp=2, pp=2, cp_attention=a, schedule=s) for a in ("ulysses", "ring") for s in ("1f1b", "zb_h1")),
        Layout(tp=2, sp=True, pp=2, v=2, schedule="interleaved_1f1b"),
        Layout(pp=2, v=2, dp=2, schedule="interleaved_1f1b"),
        Layout(cp=2, pp=2, v=2, cp_attention="ring", schedule="interleaved_1f1b"),
        Layout(tp=2, sp=True, cp=2, cp_attention="ring"),
        Layout(tp=2, sp=True, dp=2, zero_stage=2),
        Layout(pp=2, dp=2, dtype="bf16"),
    ],
    8: [
        *(Layout(tp=2, sp=True, pp=2, dp=2, schedule=schedule) for schedule in ("gpipe", "1f1b", "zb_h1")),
        Layout(tp=2, sp=True, pp=2, v=2, dp=2, schedule="interleaved_1f1b", dtype="bf16"),
        Layout(tp=2, sp=True, pp=2, cp=2, cp_attention="ring", schedule="zb_h1"),
    ],
}
CASES = [(world, index) for world, layouts in WORLDS.items() for index in range(len(layouts))]


def record_on_ranks(layout: Layout) -> list[Event]:
    """Runs on every rank: what a layout asks for, from the making of its engine on."""
    from megalm.engine.deepspeed_engine import DeepSpeedEngine
    from megalm.mesh.groups import ParallelContext
    from megalm.models.transformer import build_transformer
    from megalm.objectives.registry import make_objective
    from megalm.verify.parity import DTYPES, micro_batches_of_rank

    config = layout.config()
    context = ParallelContext.create(layout.topology)
    with record() as events:
        objective = make_objective(config.objective)
        model = build_transformer(
            config, config.model.vocab_size, context=context, dtype=DTYPES[layout.dtype], objective=objective
        )
        engine = DeepSpeedEngine(model, context, config)
        batch = micro_batches_of_rank(config, 0, context, model.context_parallel)
        engine.train_step(batch, config.optim.lr)
        engine.evaluate(batch)
    return events


@cache
def recorded(world_size: int) -> list[list[list[Event]]] | AssertionError:
    """By layout, then by rank; one spawn for all layouts of a world size, which is not tried again if it fails."""
    try:
        return run_ranks_on_each(world_size, record_on_ranks, WORLDS[world_size], timeout_seconds=280)
    except AssertionError as error:
        return error


@pytest.mark.parametrize(("world_size", "index"), CASES, ids=[str(WORLDS[w][i]) for w, i in CASES])
def test_a_step_is_safe_where_every_call_blocks(world_size: int, index: int) -> None:
    layout, runs = WORLDS[world_size][index], recorded(world_size)
    if isinstance(runs, AssertionError):
        raise runs
    traces = runs[index]
    assert check(traces) > 0
    # The recorder saw what this layout is bound to do.
    groups = {frozenset(e.group) for trace in traces for e in trace if isinstance(e, Collective)}
    assert layout.tp == 1 or frozenset(range(layout.tp)) in groups
    sent = sum(
        t.source == rank
        for rank, trace in enumerate(traces)
        for e in trace
        if isinstance(e, Transfers)
        for t in e.transfers
        if t.payload.shape[-1] == layout.model.hidden_size and len(t.payload.shape) == 3
    )
    replicas = layout.topology.world_size // layout.pp
    rounds = layout.global_batch // layout.dp // 2 * 3  # micro-batches: forth and back, and forth in evaluation
    assert layout.pp == 1 or sent >= replicas * (layout.pp * layout.v - 1) * rounds


X = Payload((2, 3), "float32")
Y = Payload((4,), "float32")


def reduce(*group: int, payload: Payload = X, detail: str = "op=sum", name: str = "") -> Collective:
    return Collective(group, "all_reduce", (payload,), detail, name)


def move(*ends: tuple[int, int], payload: Payload = X) -> Transfers:
    return Transfers((0, 1, 2, 3), tuple(Transfer(*pair, payload) for pair in ends))


def post(source: int, target: int, payload: Payload = X, name: str = "") -> Transfers:
    return Transfers((0, 1, 2, 3), (Transfer(source, target, payload),), name, posted=True)


GOOD: dict[str, list[list[Event]]] = {
    "nothing": [[], []],
    "a collective": [[reduce(0, 1)], [reduce(0, 1)]],
    "both directions in one group, in any order": [[move((0, 1), (1, 0))], [move((1, 0), (0, 1))]],
    "a group that ends in parts": [
        [move((0, 1)), move((0, 1))],
        [move((0, 1), (1, 2)), move((0, 1))],
        [move((1, 2))],
    ],
    "collectives between transfers": [
        [reduce(0, 1), move((0, 2))],
        [reduce(0, 1), move((1, 3))],
        [move((0, 2)), reduce(2, 3)],
        [move((1, 3)), reduce(2, 3)],
    ],
    "receives posted before what they wait for": [
        [post(1, 0), reduce(0, 1), post(0, 1), Wait(0)],
        [post(0, 1), reduce(0, 1), post(1, 0), Wait(0)],
    ],
    "a ring of receives posted before sends": [
        [post(2, 0), post(0, 1), Wait(0)],
        [post(0, 1), post(1, 2), Wait(0)],
        [post(1, 2), post(2, 0), Wait(0)],
    ],
}
BAD: dict[str, tuple[list[list[Event]], str]] = {
    "another order on a group": (
        [[reduce(0, 1), reduce(0, 1, payload=Y)], [reduce(0, 1, payload=Y), reduce(0, 1)]],
        "members of a group differ",
    ),
    "another dtype": ([[reduce(0, 1)], [reduce(0, 1, payload=Payload((2, 3), "bfloat16"))]], "members of a group"),
    "another reduction": ([[reduce(0, 1)], [reduce(0, 1, detail="op=max")]], "members of a group differ"),
    "a member that does not come": ([[reduce(0, 1)], []], "every rank waits"),
    "two groups of the same members, crosswise": (
        [[reduce(0, 1, name="a"), reduce(0, 1, name="b")], [reduce(0, 1, name="b"), reduce(0, 1, name="a")]],
        "every rank waits",
    ),
    "a missing receive": ([[move((0, 1))], []], "every rank waits"),
    "a receive of another shape": ([[move((0, 1))], [move((0, 1), payload=Payload((3, 2), "float32"))]], "from 0 to 1"),
    "one receive for two sends": ([[move((0, 1), (0, 1))], [move((0, 1))]], "what goes from 0 to 1 differs"),
    "both send first": ([[move((0, 1)), move((1, 0))], [move((1, 0)), move((0, 1))]], "differs on its ends"),
    "a circle of sends": (
        [[move((0, 1)), move((2, 0))], [move((1, 2)), move((0, 1))], [move((2, 0)), move((1, 2))]],
        "every rank waits",
    ),
    "a collective against a transfer": (
        [[reduce(0, 1), move((0, 1))], [move((0, 1)), reduce(0, 1)]],
        "every rank waits",
    ),
    "a second send that meets no second receive": (
        [[move((0, 1)), move((0, 1))], [move((0, 1), (1, 2))], [move((1, 2))]],
        "every rank waits",
    ),
    "a posted receive waited for before the send that its sender waits for": (
        [[post(1, 0), Wait(0), post(0, 1)], [post(0, 1), Wait(0), post(1, 0)]],
        "every rank waits",
    ),
    "posted in another order": (
        [[post(0, 1), post(0, 1, Y)], [post(0, 1, Y), Wait(0), post(0, 1), Wait(2)]],
        "what goes from 0 to 1 differs",
    ),
    "a posted send that is never received": ([[post(0, 1)], []], "has no counterpart"),
    "posted on another communicator": ([[post(0, 1, name="a")], [post(0, 1, name="b"), Wait(0)]], "every rank waits"),
    "a third send on a stream whose second one is received after what waits for the sender": (
        [[post(0, 1), post(0, 1), post(0, 1), reduce(0, 1)], [post(0, 1), reduce(0, 1), post(0, 1), post(0, 1)]],
        "every rank waits",
    ),
    "a partner held up by a third": ([[move((0, 1)), move((0, 1))], [move((0, 1), (1, 2)), move((0, 1))], []], "waits"),
}


@pytest.mark.parametrize("name", GOOD)
def test_safe_traces_pass(name: str) -> None:
    check(GOOD[name])


@pytest.mark.parametrize("name", BAD)
def test_unsafe_traces_are_refused(name: str) -> None:
    traces, message = BAD[name]
    with pytest.raises(UnsafeCommunicationError, match=message):
        check(traces)


def test_a_refusal_shows_where_every_rank_stands() -> None:
    with pytest.raises(UnsafeCommunicationError) as refused:
        check([[reduce(0, 1), move((0, 1))], [reduce(0, 1)]])
    assert "rank 0, call 1 of 2:" in str(refused.value)
    assert "▶ transfers of [0, 1, 2, 3]: 0▶1 [2, 3]:float32" in str(refused.value)
    assert "▶ has ended" in str(refused.value)
