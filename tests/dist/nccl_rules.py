"""Ranks of gloo that follow NCCL's rules, with a communicator per directed pair of neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch.distributed as dist

from megalm.mesh.groups import Group, ParallelContext
from megalm.mesh.topology import Topology


@contextmanager
def nccl_rules() -> Iterator[None]:
    """Contexts that are made inside say that their transport is NCCL's."""
    create = ParallelContext.create

    def make(topology: Topology, device: str = "cpu") -> ParallelContext:
        context = create(topology, device)
        return replace(context, transport="nccl", links=_links(context))

    ParallelContext.create = make
    try:
        yield
    finally:
        ParallelContext.create = create


def _links(context: ParallelContext) -> dict[tuple[int, int], Group]:
    """A gloo group for each direction between neighbours in the ring of stages; made by all ranks together."""
    topology, found = context.topology, {}
    pairs = {(p, (p + step) % topology.pp) for p in range(topology.pp) for step in (1, -1)}
    for pipeline in topology.groups("pp"):
        for source, target in sorted(pairs):
            if source == target:
                continue
            ranks = tuple(sorted((pipeline[source], pipeline[target])))
            handle = dist.new_group(list(ranks))
            if context.rank in ranks:
                found[source, target] = Group(ranks, ranks.index(context.rank), handle)
    return found
