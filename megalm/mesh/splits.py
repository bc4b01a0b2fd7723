"""Which communicators a mesh needs on NCCL, as a list of coloured splits: a pure function of the topology. No torch.

A split is one call that all ranks of a communicator make together (``ncclCommSplit``): ranks that give the same colour
become a new communicator, and those that give none get none. All groups along an axis are therefore one call, at any
number of ranks, where one call per group would be 131,072 of them for the neighbour pairs of 65,536 ranks.

Rules that NCCL and megalm set, each of which ``tests/unit/mesh/test_splits.py`` proves for layouts of up to 65,536
ranks: every rank makes the same calls in the same order; two groups of one split never have the same colour; no group
has one member; there are at most :data:`MOST_SPLITS` calls, all of them at the start.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from megalm.mesh.topology import OUTER_REPLICAS, REPLICAS, Topology

MOST_SPLITS = 12
"""Most calls that any rank of any topology makes."""

TP, PP, CP, REPLICA, MODEL, TIED = "tp", "pp", "cp", "replica", "model", "tied"
"""Names of splits: those of the groups of a ``ParallelContext`` that they make."""

Pair = tuple[int, int]
"""(source, target): pipeline ranks of a transfer between neighbours."""


@dataclass(frozen=True)
class Split(ABC):
    """One collective call, made by every rank of the communicator that it divides.

    Attributes:
        name: of the groups that it makes, the same on every rank.
        topology: the mesh.
    """

    name: str
    topology: Topology

    @property
    def parent(self) -> str | None:
        """The split whose groups this one divides, each for itself; None: it divides the world."""
        return None

    @abstractmethod
    def members(self, rank: int) -> tuple[int, ...] | None:
        """The group that a rank becomes a member of, as ascending global ranks; None: of none."""

    @abstractmethod
    def colour(self, rank: int) -> int | None:
        """What a rank passes for the group that it joins: its lowest rank; None: it joins none.

        The groups of a split have no member in common, so no two have the same colour. torch would hash the members
        instead: of thousands of groups two may have the same hash, and NCCL would make one communicator of both.
        """


@dataclass(frozen=True)
class AxesSplit(Split):
    """Groups whose members differ along some axes only; every rank is in one.

    Attributes:
        axes: of the mesh.
    """

    axes: tuple[str, ...]

    def members(self, rank: int) -> tuple[int, ...]:
        """See the base class."""
        return self.topology.group_of(rank, *self.axes)

    def colour(self, rank: int) -> int:
        """See the base class."""
        return self.topology.first_of_group(rank, *self.axes)


@dataclass(frozen=True)
class TiedSplit(Split):
    """Groups that hold copies of a tied embedding: first and last stage, for each tp rank; other stages are in none."""

    def members(self, rank: int) -> tuple[int, ...] | None:
        """See the base class."""
        return self.topology.tied_group_of(rank)

    def colour(self, rank: int) -> int | None:
        """See the base class."""
        return self.topology.first_of_tied_group(rank)


@dataclass(frozen=True)
class LinkSplit(Split):
    """Groups of two: neighbours of each pipeline, for transfers in one direction.

    Attributes:
        pairs: (source, target) pipeline ranks, no rank in two of them.
    """

    pairs: tuple[Pair, ...]

    @property
    def parent(self) -> str:
        """The pipeline: a split takes longer the more ranks take part."""
        return PP

    def members(self, rank: int) -> tuple[int, ...] | None:
        """See the base class."""
        pair, here = self.pair_of(rank), self.topology.coordinates(rank)
        if pair is None:
            return None
        return tuple(self.topology.rank_at(pp=end, dp=here.dp, cp=here.cp, tp=here.tp) for end in sorted(pair))

    def colour(self, rank: int) -> int | None:
        """See the base class."""
        members = self.members(rank)
        return None if members is None else members[0]

    def pair_of(self, rank: int) -> Pair | None:
        """The transfers that a rank's group of this split is for; None: it is in none."""
        return self._by_end.get(self.topology.coordinates(rank).pp)

    @cached_property
    def _by_end(self) -> dict[int, Pair]:
        return {end: pair for pair in self.pairs for end in pair}


def splits_of(topology: Topology) -> tuple[Split, ...]:
    """All splits of a topology, in the order in which every rank makes them.

    A group of one member needs no communicator, so a degree of 1 needs no split. Where tensor or pipeline parallelism
    alone holds the model, its group is the model's too.
    """
    along: list[tuple[str, tuple[str, ...]]] = [(TP, (TP,)), (PP, (PP,)), (CP, (CP,)), (REPLICA, REPLICAS)]
    if topology.tp > 1 and topology.pp > 1:
        along.append((MODEL, (PP, TP)))
    along += [(inner_name(axes), axes) for axes in inner_group_axes(topology)]
    splits: list[Split] = [
        AxesSplit(name, topology, axes) for name, axes in along if len(topology.group_of(0, *axes)) > 1
    ]
    if topology.pp > 1:
        splits.append(TiedSplit(TIED, topology))
    links = [LinkSplit(f"link {number}", topology, pairs) for number, pairs in enumerate(_link_classes(topology))]
    # An odd ring needs two more classes than an even one. With every other axis there, too, that is more than NCCL is
    # to be asked for, and transfers of such a pipeline share its own communicator, as on gloo.
    return (*splits, *links) if len(splits) + len(links) <= MOST_SPLITS else tuple(splits)


def inner_group_axes(topology: Topology) -> list[tuple[str, ...]]:
    """The groups that inner axes need: along each, and along what is left of the replicas beside it."""
    names = [name for name, _ in topology.inner_axes]
    besides = [(OUTER_REPLICAS, *(other for other in names if other != name)) for name in names]
    return [*((name,) for name in names), *besides]


def inner_name(axes: Iterable[str]) -> str:
    """The name of the split along inner axes."""
    return "inner " + "·".join(axes)


def neighbour_pairs(topology: Topology) -> tuple[Pair, ...]:
    """Every (source, target) between which a pipeline transfers: activations forwards, gradients backwards.

    With several stages per rank the last rank hands on to the first, and gets gradients from it. Of two ranks each is
    the other's neighbour on both sides, which makes no further pairs.
    """
    forwards = _forward_pairs(topology)
    return tuple(dict.fromkeys([*forwards, *map(_reversed, forwards)]))


def _forward_pairs(topology: Topology) -> list[Pair]:
    if topology.pp == 1:
        return []
    is_ring = topology.virtual_stages > 1
    return [(source, (source + 1) % topology.pp) for source in range(topology.pp if is_ring else topology.pp - 1)]


def _link_classes(topology: Topology) -> list[tuple[Pair, ...]]:
    """Neighbour pairs, divided so that no rank is in two pairs of a class: each class is one split.

    For each direction, pairs whose first rank is even are one class and those whose first rank is odd another. In a
    ring of an odd number of ranks the pair of the last and the first meets both: a third class.
    """
    if topology.pp == 2:
        return [(pair,) for pair in neighbour_pairs(topology)]
    forwards = _forward_pairs(topology)
    last = topology.pp - 1
    classes = [
        [pair for pair in forwards if pair[0] % 2 == 0 and pair != (last, 0)],
        [pair for pair in forwards if pair[0] % 2 == 1],
        [pair for pair in forwards if pair == (last, 0) and last % 2 == 0],
    ]
    found = [tuple(pairs) for pairs in classes if pairs]
    return [*found, *(tuple(map(_reversed, pairs)) for pairs in found)]


def _reversed(pair: Pair) -> Pair:
    source, target = pair
    return target, source
