"""A rank's part of a model that is asked, in an initialised process group, whoever started the ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from megalm.config.job import topology_of
from megalm.errors import ExitCode
from megalm.generate.ranks import Board, TheseRanks, follow
from megalm.launch import RankInfo
from megalm.mesh.groups import ParallelContext
from megalm.runs.find import FoundModel
from megalm.runs.load import load_part


def lead_or_follow(found: FoundModel, rank: RankInfo, lead: Callable[[TheseRanks], ExitCode]) -> ExitCode:
    """Load this rank's part; rank 0 leads, the others call what it announces.

    Args:
        found: the model.
        rank: this rank.
        lead: what rank 0 does with the ranks.
    """
    context = ParallelContext.create(topology_of(found.config, found.world_size), rank.device)
    trained = load_part(found, context)
    board = None if rank.world_size == 1 else Board(dist.distributed_c10d._get_default_store())
    if rank.rank:
        assert board is not None
        follow(trained, board)
        return ExitCode.DONE
    ranks = TheseRanks(trained, board)
    try:
        return lead(ranks)
    finally:
        ranks.close()
