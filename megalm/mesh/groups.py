"""The process groups of one rank, made once and passed explicitly; there is no global parallel state.

Every layer takes the :class:`Group` it communicates over as an argument, so a layer can be built and tested with any
degree, and a reader sees from a constructor call which axis it works on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from megalm.mesh.communicators import SplitMaker, local_group, split_maker
from megalm.mesh.parameter import ParameterRecord
from megalm.mesh.splits import (
    CP,
    MODEL,
    PP,
    REPLICA,
    TIED,
    TP,
    LinkSplit,
    Pair,
    inner_group_axes,
    inner_name,
    splits_of,
)
from megalm.mesh.topology import REPLICAS, Coordinates, Topology
from megalm.mesh.transport import GLOO, NCCL, transport_of


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
    transport: str = GLOO
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
    def create(
        cls,
        topology: Topology,
        device: torch.device | str = "cpu",
        *,
        transport: str | None = None,
        maker: SplitMaker | None = None,
    ) -> ParallelContext:
        """Make this rank's groups, all that it will ever have; collective over all ranks of ``torch.distributed``.

        Args:
            topology: the degrees.
            device: of this rank.
            transport: ``gloo`` or ``nccl``; None: NCCL where the device is a GPU.
            maker: makes the communicators of NCCL; None: the one for the process group that is initialised.
        """
        rank, device = dist.get_rank(), torch.device(device)
        if dist.get_world_size() != topology.world_size:
            raise ValueError(f"{dist.get_world_size()} ranks started, the layout needs {topology.world_size}")
        transport = transport or transport_of(device.type)
        if transport == NCCL:
            groups, links = _split_groups(topology, rank, maker or split_maker())
        else:
            groups, links = _local_groups(topology, rank), {}
        for name in (PP, CP):
            # NCCL may connect the members of a group in the first call on it, which all of them must make: a pipeline's
            # or a ring's first transfers are between two of them.
            groups[name].all_reduce(torch.zeros(1, device=device))
        return cls(
            topology=topology,
            rank=rank,
            device=device,
            tp_group=groups[TP],
            pp_group=groups[PP],
            cp_group=groups[CP],
            replica_group=groups[REPLICA],
            model_group=groups[MODEL],
            world_group=Group(tuple(range(topology.world_size)), rank, dist.group.WORLD),
            tied_group=groups[TIED],
            inner_groups={axes: groups[inner_name(axes)] for axes in inner_group_axes(topology)},
            transport=transport,
            links=links,
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


def _axes_of_groups(topology: Topology) -> dict[str, tuple[str, ...]]:
    """Along which axes the members of each group differ; of all groups but those of tied embeddings and links."""
    plain = {TP: ("tp",), PP: ("pp",), CP: ("cp",), REPLICA: REPLICAS, MODEL: ("pp", "tp")}
    return plain | {inner_name(axes): axes for axes in inner_group_axes(topology)}


def _local_groups(topology: Topology, rank: int) -> dict[str, Group]:
    """Every group by name, on gloo.

    Every rank makes the same number of groups in the same order: torch names a locally synchronised group by the number
    that its members made before. A rank without a tied copy is therefore alone in a group of its own.
    """
    axes_of = _axes_of_groups(topology)
    members = {name: topology.group_of(rank, *axes) for name, axes in axes_of.items()}
    tied = topology.tied_group_of(rank) if topology.pp > 1 else None
    members[TIED] = tied or (rank,)
    return {name: Group(ranks, ranks.index(rank), local_group(ranks)) for name, ranks in members.items()}


def _split_groups(topology: Topology, rank: int, maker: SplitMaker) -> tuple[dict[str, Group], dict[Pair, Group]]:
    """Every group by name, and this rank's links, on NCCL: one call per split of ``splits_of``."""
    alone = Group((rank,), 0, maker.alone(rank) if topology.world_size > 1 else dist.group.WORLD)
    groups: dict[str, Group] = {}
    links: dict[Pair, Group] = {}
    for split in splits_of(topology):
        parent = None if split.parent is None else groups[split.parent].handle
        handle = maker.split(split, rank, parent)
        members = split.members(rank) or (rank,)
        group = alone if handle is None else Group(members, members.index(rank), handle)
        if not isinstance(split, LinkSplit):
            groups[split.name] = group
        elif (pair := split.pair_of(rank)) is not None:
            links[pair] = group
    for name in (*_axes_of_groups(topology), TIED):
        groups.setdefault(name, alone)
    if topology.tp == 1 or topology.pp == 1:  # one of the two holds the model
        groups[MODEL] = groups[TP] if topology.pp == 1 else groups[PP]
    return groups, links
