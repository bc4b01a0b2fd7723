"""The process groups of one rank, made once and passed explicitly; there is no global parallel state.

Every layer takes the :class:`Group` it communicates over as an argument, so a layer can be built and tested with any
degree, and a reader sees from a constructor call which axis it works on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megalm.mesh.parameter import ParameterRecord
from megalm.mesh.topology import OUTER_REPLICAS, REPLICAS, Coordinates, Topology


@dataclass(frozen=True)
class Group:
    """Ranks that communicate with each other along one or more axes of the mesh.

    Attributes:
        ranks: global ranks of the members, ascending.
        index: position of this rank among them.
        handle: the torch process group; None outside ``torch.distributed``, where every group has one member.
    """

    ranks: tuple[int, ...]
    index: int
    handle: dist.ProcessGroup | None = None

    @property
    def size(self) -> int:
        """Number of members: the parallel degree."""
        return len(self.ranks)

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> torch.Tensor:
        """Reduce ``tensor`` over the members, in place; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor, op=op, group=self.handle)
        return tensor


ALONE = Group(ranks=(0,), index=0)
"""The group of a process that has no peers."""


@dataclass(frozen=True)
class ParallelContext:
    """This rank's place on the mesh, its device and its groups.

    Attributes:
        topology: the degrees.
        rank: global rank.
        device: where parameters and activations live.
        tp_group: tensor-parallel group.
        pp_group: pipeline group; its index is the pipeline rank.
        cp_group: context-parallel group; its index says which part of each sequence this rank holds.
        replica_group: data-parallel group (dp × cp): ranks that hold the same weights and see different tokens.
        model_group: tp × pp: ranks that together hold one copy of the weights.
        world_group: all ranks.
        tied_group: every holder of this rank's slice of a tied embedding (first and last stage, all of dp × cp); this
            rank alone where no other stage holds a copy.
        inner_groups: groups along inner axes, by axes: along each alone, and for each the ranks over which a parameter
            is replicated that is split along it.
        transport: whose rules the collectives of tensors on ``device`` follow: ``gloo`` or ``nccl``. A dry run has the
            rules of the transport that it stands for.
        links: groups of two, by (source, target) pipeline rank, for transfers in that direction between this rank and a
            neighbour in the ring of stages; none where the pipeline's group serves (gloo).
    """

    topology: Topology
    rank: int
    device: torch.device
    tp_group: Group
    pp_group: Group
    cp_group: Group
    replica_group: Group
    model_group: Group
    world_group: Group
    tied_group: Group
    inner_groups: Mapping[tuple[str, ...], Group] = field(default_factory=dict)
    transport: str = "gloo"
    links: Mapping[tuple[int, int], Group] = field(default_factory=dict)

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> ParallelContext:
        """One process that holds the whole model."""
        return cls(
            topology=Topology(),
            rank=0,
            device=torch.device(device),
            tp_group=ALONE,
            pp_group=ALONE,
            cp_group=ALONE,
            replica_group=ALONE,
            model_group=ALONE,
            world_group=ALONE,
            tied_group=ALONE,
        )

    @classmethod
    def create(cls, topology: Topology, device: torch.device | str = "cpu") -> ParallelContext:
        """Make this rank's groups; collective over all ranks of an initialised ``torch.distributed``."""
        rank = dist.get_rank()
        if dist.get_world_size() != topology.world_size:
            raise ValueError(f"{dist.get_world_size()} ranks started, the layout needs {topology.world_size}")

        def along(*axes: str) -> Group:
            return _make_group(topology.group_of(rank, *axes), rank)

        # Every rank makes the same number of groups in the same order: torch names a locally synchronised group by the
        # number that its members made before. A rank without a tied copy is therefore alone in a group of its own.
        tp, pp, cp = along("tp"), along("pp"), along("cp")
        data, model = along("dp", "cp"), along("pp", "tp")
        holders = [ranks for ranks in topology.tied_groups() if rank in ranks and topology.pp > 1]
        tied = _make_group(holders[0] if holders else (rank,), rank)
        inner = {axes: along(*axes) for axes in inner_group_axes(topology)}
        for group in (pp, cp):
            # NCCL wants every member in the first call on a group, and a pipeline's or a ring's first transfers are
            # between two of them.
            group.all_reduce(torch.zeros(1, device=device))
        world = Group(tuple(range(topology.world_size)), rank, dist.group.WORLD)
        return cls(
            topology=topology,
            rank=rank,
            device=torch.device(device),
            tp_group=tp,
            pp_group=pp,
            cp_group=cp,
            replica_group=data,
            model_group=model,
            world_group=world,
            tied_group=tied,
            inner_groups=inner,
            transport="nccl" if torch.device(device).type == "cuda" else "gloo",
        )

    def replicas_of(self, record: ParameterRecord) -> Group:
        """The ranks over which a parameter's slice is replicated: its gradients are added there."""
        return self.replica_group if record.replicated_over == REPLICAS else self.inner_groups[record.replicated_over]

    def link(self, source: int, target: int) -> Group:
        """What carries transfers from one pipeline rank to its neighbour, one of which this rank is."""
        return self.links.get((source, target), self.pp_group)

    def owns(self, record: ParameterRecord, *, among_replicas: bool = True) -> bool:
        """Whether this rank stands for its slice; see :meth:`megalm.mesh.parameter.ParameterRecord.is_owned_by`."""
        return record.is_owned_by(self.topology, self.rank, among_replicas=among_replicas)

    @property
    def coordinates(self) -> Coordinates:
        """Place on the mesh."""
        return self.topology.coordinates(self.rank)

    @property
    def stages(self) -> tuple[int, ...]:
        """Stages that this rank runs."""
        return self.topology.stages_of(self.coordinates.pp)


def inner_group_axes(topology: Topology) -> list[tuple[str, ...]]:
    """The groups that inner axes need: along each, and along what is left of the replicas beside it."""
    names = [name for name, _ in topology.inner_axes]
    besides = [(OUTER_REPLICAS, *(other for other in names if other != name)) for name in names]
    return [*((name,) for name in names), *besides]


def _make_group(ranks: tuple[int, ...], rank: int) -> Group:
    """A group of its own for ``ranks``; only the members take part, which keeps start-up flat in the world size."""
    handle = dist.new_group(list(ranks), use_local_synchronization=True)
    return Group(ranks=ranks, index=ranks.index(rank), handle=handle)
