"""What ranks do to generate with converted models: each loads its own part, of whatever layout it is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from megalm.generate.asked import GENERATE, SCORE
from megalm.generate.ranks import Board, TheseRanks, follow
from megalm.generate.requests import Asked
from megalm.mesh.groups import ParallelContext
from megalm.mesh.topology import Topology
from megalm.runs.find import find_model
from megalm.runs.load import load_part

Layout = tuple[int, int]
"""Tensor- and pipeline-parallel degree; replicas fill the ranks."""


def answers_on_ranks(runs: dict[str, Path], asked: dict[str, list[Asked]], layouts: list[Layout]) -> list[Any]:
    """By layout, then by run: what rank 0 is told of each list of requests; None on other ranks."""
    found = []
    board = Board(dist.distributed_c10d._get_default_store())
    for tp, pp in layouts:
        world = dist.get_world_size()
        context = ParallelContext.create(Topology(tp=tp, pp=pp, dp=world // (tp * pp)))
        of_layout = {}
        for name, run in runs.items():
            overrides = [f"parallel.tp={tp}", f"parallel.pp={pp}", "engine.dtype=fp32"]
            trained = load_part(find_model(run, overrides, world), context)
            if context.rank:
                follow(trained, board)
                continue
            ranks = TheseRanks(trained, board)
            of_layout[name] = [ranks.call(_function(each), each) for each in asked[name]]
            ranks.close()
        found.append(of_layout if context.rank == 0 else None)
    return found


def _function(asked: Asked) -> str:
    return SCORE if hasattr(asked.requests[0], "continuation") else GENERATE
