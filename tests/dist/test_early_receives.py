"""Receives posted before the work of their tick, on a communicator per directed pair of neighbours: the same numbers.

Ranks of gloo follow NCCL's rules here. They post early on groups of two where ``parallel.early_receives`` says so, and
group the transfers of a tick on the pipeline's group by default. Neither changes a bit of what gloo's own way gives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from harness import run_ranks, run_ranks_on_each
from parity import Layout

from megalm.core.pipeline.p2p import posts_receives_early
from megalm.core.pipeline.schedule import SCHEDULES, Shape, plan
from megalm.errors import ConfigError
from megalm.mesh.groups import ParallelContext
from megalm.mesh.topology import Topology
from megalm.verify.parity import Trace

LAYOUTS = [
    *(Layout(pp=4, schedule=schedule) for schedule in ("gpipe", "zb_h1")),
    Layout(pp=2, v=2, dp=2, schedule="interleaved_1f1b"),
    Layout(tp=2, pp=2, dtype="bf16"),
]
RULES = ("gloo", "links", "grouped")


def train_by_each_rule(layout: Layout) -> dict[str, Trace]:
    """Runs on every rank."""
    return {rule: _train(layout, rule) for rule in RULES}


def _train(layout: Layout, rule: str) -> Trace:
    from nccl_rules import nccl_rules

    from megalm.verify.parity import train_on_layout

    if rule == "gloo":
        return train_on_layout(layout.config(), layout.topology)
    config = layout.config()
    if rule == "links":
        config = replace(config, parallel=replace(config.parallel, early_receives=True))
    with nccl_rules():
        return train_on_layout(config, layout.topology)


@pytest.fixture(scope="module")
def traces() -> list[list[dict[str, Trace]]]:
    """By layout, then by rank."""
    return run_ranks_on_each(4, train_by_each_rule, LAYOUTS, timeout_seconds=280)


@pytest.mark.parametrize("rule", ["links", "grouped"])
@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=map(str, LAYOUTS))
def test_six_steps_are_the_same_to_the_bit(index: int, rule: str, traces) -> None:
    for by_rule in traces[index]:
        want, found = by_rule["gloo"], by_rule[rule]
        assert (found.losses, found.grad_norms) == (want.losses, want.grad_norms)
        assert found.final.keys() == want.final.keys()
        for name, weight in want.final.items():
            assert torch.equal(found.final[name].nan_to_num(), weight.nan_to_num()), name


@dataclass
class _Counts:
    """What the mailbox of one rank did in one pass."""

    most_buffers: int = 0
    groups: tuple[tuple[int, ...], ...] = ()
    order: tuple[str, ...] = ()


def count_in_a_pass(cases: list[tuple[str, int, bool]]) -> list[_Counts]:
    """Runs on every rank: (schedule, virtual stages, early) ▶ counts."""
    return [_count(*case) for case in cases]


def _count(schedule: str, v: int, early: bool) -> _Counts:
    """A pass over six micro-batches of a stage that multiplies by its weight, with two tensors per transfer."""
    import torch.distributed as dist
    from nccl_rules import nccl_rules

    from megalm.core.pipeline.p2p import Mailbox, TensorSpec
    from megalm.core.pipeline.runner import PipelineRunner

    with nccl_rules():
        context = ParallelContext.create(Topology(pp=4, virtual_stages=v))
    weight = torch.ones((), requires_grad=True)
    last = context.topology.num_stages - 1
    counts, alive, groups = _Counts(), set(), set()
    order: list[str] = []

    def stages(stage, received, micro_batch):
        order.append("work")
        x = micro_batch if received is None else received["hidden"]
        side = torch.zeros(3) if received is None else received["side"]
        assert torch.equal(x.detach(), micro_batch), "of this micro-batch"
        assert (side == stage).all(), "of the stage before, and after the other tensor of its transfer"
        return {"loss": (x * weight).sum()} if stage == last else {"hidden": x * weight, "side": side + 1}

    empty, take, batch = Mailbox._empty, Mailbox.take, dist.batch_isend_irecv

    def counting_empty(self):
        buffers = empty(self)
        alive.add(id(buffers["hidden"]))
        counts.most_buffers = max(counts.most_buffers, len(alive))
        return buffers

    def counting_take(self, **key):
        tensors = take(self, **key)
        alive.discard(id(tensors["hidden"]))
        return tensors

    def noting(operations):
        groups.add(tuple(dist.get_process_group_ranks(operations[0].group)))
        order.append("+".join("send" if o.op is dist.isend else "receive" for o in operations))
        assert len({o.group for o in operations}) == 1
        return batch(operations)

    Mailbox._empty, Mailbox.take, dist.batch_isend_irecv = counting_empty, counting_take, noting
    try:
        runner = PipelineRunner(
            stages,
            context,
            schedule=schedule,
            early_receives=early,
            between_stages={
                "hidden": TensorSpec((2, 3), torch.float32),
                "side": TensorSpec((3,), torch.float32),
            },
        )
        micro_batches = [torch.full((2, 3), float(m + 1)) for m in range(6)]
        runner.train(micro_batches)
    finally:
        Mailbox._empty, Mailbox.take, dist.batch_isend_irecv = empty, take, batch
    return replace(counts, groups=tuple(sorted(groups)), order=tuple(order))


CASES = [
    (schedule, v, early)
    for schedule, v in (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2))
    for early in (False, True)
]


@pytest.fixture(scope="module")
def counts() -> dict[tuple[str, int, bool], list[_Counts]]:
    by_rank = run_ranks(4, count_in_a_pass, CASES)
    return {case: [found[i] for found in by_rank] for i, case in enumerate(CASES)}


@pytest.mark.parametrize(("schedule", "v"), [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2)])
def test_early_receives_hold_at_most_two_buffers_more(schedule: str, v: int, counts) -> None:
    for rank in range(4):
        early, grouped = (counts[schedule, v, e][rank].most_buffers for e in (True, False))
        assert grouped <= early <= grouped + 2


@pytest.mark.parametrize(("schedule", "v"), [("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2)])
def test_each_transfer_is_one_batch_on_the_link_of_its_direction(schedule: str, v: int, counts) -> None:
    for rank, found in enumerate(counts[schedule, v, True]):
        neighbours = {(rank, (rank + 1) % 4), (rank, (rank - 1) % 4)}
        around = {tuple(sorted(pair)) for pair in neighbours}
        assert set(found.groups) <= around
        assert v == 1 or set(found.groups) == around
        transfers = [what for what in found.order if what != "work"]
        assert set(transfers) <= {"send+send", "receive+receive"}
        ticks = plan(SCHEDULES[schedule], Shape(4, 6, v))[rank]
        assert len(transfers) == sum(len(tick.sends) + len(tick.receives) for tick in ticks)
    for rank, found in enumerate(counts[schedule, v, False]):
        assert set(found.groups) == {(0, 1, 2, 3)}, rank


def test_on_nccl_they_are_opt_in_and_need_links() -> None:
    context = ParallelContext.single()
    assert posts_receives_early(context, None)
    assert not posts_receives_early(context, False)
    on_nccl = replace(context, transport="nccl")
    assert [posts_receives_early(on_nccl, wanted) for wanted in (None, False, True)] == [False, False, True]
    without_links = replace(on_nccl, topology=Topology(pp=2))
    with pytest.raises(ConfigError, match=r"parallel\.early_receives=true"):
        posts_receives_early(without_links, True)


def test_the_receives_of_a_tick_are_posted_before_its_work(counts) -> None:
    """The last rank of GPipe receives the next activation while it works on one; its first work waits for the first."""
    order = counts["gpipe", 1, True][3].order
    assert order[:5] == ("receive+receive", "receive+receive", "work", "receive+receive", "work")
    grouped = counts["gpipe", 1, False][3].order
    assert grouped[:4] == ("receive+receive", "work", "receive+receive", "work")
