"""All ranks hear of an error that some of them have: the lowest rank's, in a reduction and a broadcast of tensors."""

from __future__ import annotations

import torch
from harness import run_ranks

from megalm.mesh.groups import ParallelContext
from megalm.mesh.topology import Topology


def agree(errors: list[list[str | None]]) -> list[str | None]:
    from megalm.training.saving import first_error

    context = ParallelContext.create(Topology(dp=3))
    return [first_error(each[context.rank], context.world_group, torch.device("cpu")) for each in errors]


def test_the_lowest_ranks_error_reaches_all() -> None:
    cases: list[list[str | None]] = [
        [None, None, None],
        [None, "No space left on device: » /ä «", "another"],
        ["first", None, "last"],
        [None, None, "x" * 5000],
    ]
    for heard in run_ranks(3, agree, cases):
        assert heard == [None, cases[1][1], "first", "x" * 4096]
