"""The groups of NCCL's plan, made on gloo: the links of a pipeline, and groups of one without a communicator."""

from __future__ import annotations

import torch.distributed as dist

from megalm.mesh.communicators import FakeSplits, local_group
from megalm.mesh.splits import Split


class LocalSplits(FakeSplits):
    """A rank that becomes a member of no group makes one of its own: gloo's groups are named by how many there are."""

    def split(self, split: Split, rank: int, parent: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        members = split.members(rank)
        group = local_group(members or (rank,))
        return None if members is None else group
