"""A dry run sends and receives what a real run does, message by message."""

from __future__ import annotations

import pytest
from harness import run_ranks, run_ranks_on_each
from parity import Layout

LAYOUTS = [
    Layout(batch=8, dp=4),
    Layout(batch=8, dp=4, zero_stage=0),
    Layout(batch=8, dp=4, zero_stage=2),
    Layout(batch=8, dp=4, zero_stage=3),
    Layout(batch=8, tp=2, pp=2),
    Layout(batch=8, tp=2, dp=2, sp=True),
    Layout(batch=8, pp=2, v=2, dp=2, schedule="interleaved_1f1b"),
    Layout(batch=8, pp=2, dp=2, schedule="zb_h1"),
    Layout(batch=8, cp=2, dp=2),
    Layout(batch=8, cp=2, dp=2, cp_attention="ring"),
]


def log_real(layout: Layout) -> list:
    """Runs on every rank: the messages of a step."""
    from megalm.dryrun.run import message_log
    from megalm.mesh.groups import ParallelContext

    return message_log(layout.config(), ParallelContext.create(layout.topology))


def log_fake(layouts: list[Layout]) -> list[list]:
    """The same of a rank that is not there, in a process that has left the others."""
    import torch.distributed as dist

    from megalm.dryrun.fake_rank import fake_rank
    from megalm.dryrun.run import message_log

    rank, world_size = dist.get_rank(), dist.get_world_size()
    store = dist.PrefixStore("afterwards", dist.distributed_c10d._get_default_store())
    dist.destroy_process_group()
    logs = []
    for layout in layouts:
        with fake_rank(layout.config(), rank, layout.topology.world_size, device="cpu") as fake:
            logs.append(message_log(layout.config(), fake.context))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)  # ranks end together
    return logs


@pytest.fixture(scope="module")
def real() -> list[list[list]]:
    """By layout, then by rank."""
    return run_ranks_on_each(4, log_real, LAYOUTS, timeout_seconds=250)


@pytest.fixture(scope="module")
def fake() -> list[list[list]]:
    """By rank, then by layout."""
    return run_ranks(4, log_fake, LAYOUTS, timeout_seconds=250)


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=map(str, LAYOUTS))
def test_a_dry_run_sends_what_a_real_run_sends(real: list[list[list]], fake: list[list[list]], index: int) -> None:
    for of_real, of_fake in zip(real[index], fake, strict=True):
        assert of_real, "nothing was sent"
        assert of_real == of_fake[index]
