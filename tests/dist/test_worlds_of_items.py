"""Functions on ranks: each item has a world of its own, of which nothing goes on after it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from harness import run_ranks_on_each

from megalm.mesh.communicators import local_group


def threads() -> list[str]:
    """Names of this process's threads."""
    return [(thread / "comm").read_text().strip() for thread in Path("/proc/self/task").iterdir()]


def use_groups(count: int) -> tuple[int, list[float]]:
    """Threads of gloo as the item begins, and a sum over each of its own groups."""
    before, sums = threads().count("gloo_tcp_loop"), []
    for number in range(count):
        total = torch.tensor([float(dist.get_rank() + number)])
        dist.all_reduce(total, group=local_group((0, 1)))
        sums.append(float(total))
    return before, sums


def test_no_group_of_an_item_is_left_to_the_next() -> None:
    """Names of groups come again, on other connections."""
    for count, ranks in zip((5, 7, 3), run_ranks_on_each(2, use_groups, [5, 7, 3]), strict=True):
        assert ranks == [(1, [2.0 * number + 1.0 for number in range(count)])] * 2, "one thread: the world's own"


def threads_of_a_group_of_one(world_size: int) -> int:
    assert dist.get_world_size() == world_size
    before = len(threads())
    local_group((dist.get_rank(),))
    return len(threads()) - before


def test_a_group_of_one_rank_has_no_threads() -> None:
    assert run_ranks_on_each(2, threads_of_a_group_of_one, [2]) == [[0, 0]]
