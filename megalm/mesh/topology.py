"""Rank arithmetic: parallel degrees ▶ coordinates, groups and stage ownership. Pure Python, no torch.

A *mesh* of ``pp × dp × cp × tp`` ranks, tensor parallelism innermost so that its all-reduces stay inside a node:

    rank = ((pp_rank · dp + dp_rank) · cp + cp_rank) · tp + tp_rank

Some parameters are split over ranks that others take for replicas, such as experts (Lepikhin et al. 2021, GShard). The
``dp × cp`` replicas are divided by *inner axes* for them; the same ranks are then also a mesh of
``pp × outer_dp × (inner axes) × tp``.

*Axis* always means an axis of this mesh; *dim* means a dimension of a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

AXES = ("pp", "dp", "cp", "tp")
"""Axes of the mesh, outermost first."""
REPLICAS = ("dp", "cp")
"""Axes along which ranks hold the same weights of dense layers and see different tokens."""
OUTER_REPLICAS = "outer_dp"
"""What inner axes leave of the replicas: ranks along it hold the same weights of layers that are split over all of
them."""


@dataclass(frozen=True)
class Coordinates:
    """Where one rank sits on the mesh."""

    pp: int
    dp: int
    cp: int
    tp: int


@dataclass(frozen=True)
class Topology:
    """The degrees of a run and everything that follows from them.

    Attributes:
        tp: tensor-parallel degree; a layer's weights are split over ``tp`` ranks.
        pp: pipeline-parallel degree; layers are split over ``pp`` ranks.
        cp: context-parallel degree; the sequence is split over ``cp`` ranks.
        dp: data-parallel degree; the batch is split over ``dp`` replicas.
        virtual_stages: model chunks per pipeline rank (Narayanan et al. 2021, interleaved schedule).
        inner_axes: (name, degree) of each further axis that divides the replicas, outermost first.
    """

    tp: int = 1
    pp: int = 1
    cp: int = 1
    dp: int = 1
    virtual_stages: int = 1
    inner_axes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        degrees = {**{name: getattr(self, name) for name in (*AXES, "virtual_stages")}, **dict(self.inner_axes)}
        for name, degree in degrees.items():
            if degree < 1:
                raise ValueError(f"{name}={degree}: a degree is at least 1")
        names = [*AXES, OUTER_REPLICAS, *(name for name, _ in self.inner_axes)]
        if len(set(names)) < len(names):
            raise ValueError(f"inner_axes={self.inner_axes}: each axis has a name of its own")
        divisor = prod(degree for _, degree in self.inner_axes)
        if self.dp * self.cp % divisor:
            raise ValueError(f"inner_axes={self.inner_axes}: dp·cp = {self.dp * self.cp} is no multiple of {divisor}")

    @classmethod
    def from_world_size(
        cls, world_size: int, *, tp: int = 1, pp: int = 1, cp: int = 1, virtual_stages: int = 1
    ) -> Topology:
        """The topology whose data-parallel degree fills ``world_size`` ranks."""
        model_ranks = tp * pp * cp
        if world_size < 1 or world_size % model_ranks:
            raise ValueError(f"world_size={world_size} is no multiple of tp·pp·cp = {tp}·{pp}·{cp} = {model_ranks}")
        return cls(tp=tp, pp=pp, cp=cp, dp=world_size // model_ranks, virtual_stages=virtual_stages)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.cp * self.dp

    @property
    def num_stages(self) -> int:
        """Number of pipeline stages, virtual ones included."""
        return self.pp * self.virtual_stages

    def degree(self, axis: str) -> int:
        """The degree along one axis."""
        return self._view(axis)[axis]

    def rank_at(self, *, pp: int = 0, dp: int = 0, cp: int = 0, tp: int = 0) -> int:
        """The rank at the given coordinates."""
        return ((pp * self.dp + dp) * self.cp + cp) * self.tp + tp

    def coordinates(self, rank: int) -> Coordinates:
        """The coordinates of one rank."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank={rank}: ranks are 0 to {self.world_size - 1}")
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Coordinates(pp=pp, dp=dp, cp=cp, tp=tp)

    def groups(self, *axes: str) -> list[tuple[int, ...]]:
        """All groups whose members differ only along ``axes``; their union is every rank, each exactly once.

        The order of groups and of members follows the ranks, so every rank that builds process groups from this list
        builds them in the same order.

        Raises:
            ValueError: there is no such axis, or the axes are not of one mesh (``dp`` and an inner axis).
        """
        view = self._view(*axes)
        fixed = _points({axis: degree for axis, degree in view.items() if axis not in axes})
        return [self.group_of(_rank(view, {**dict.fromkeys(axes, 0), **at}), *axes) for at in fixed]

    def group_of(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The one group along ``axes`` that ``rank`` belongs to; errors as for :meth:`groups`."""
        view = self._view(*axes)
        here = _coordinates(view, rank)
        moving = _points({axis: degree for axis, degree in view.items() if axis in axes})
        return tuple(_rank(view, {**here, **along}) for along in moving)

    def first_of_group(self, rank: int, *axes: str) -> int:
        """The lowest rank of :meth:`group_of`, without the others."""
        view = self._view(*axes)
        return _rank(view, {**_coordinates(view, rank), **dict.fromkeys(axes, 0)})

    def coordinate(self, rank: int, axis: str) -> int:
        """Where a rank sits along one axis."""
        return _coordinates(self._view(axis), rank)[axis]

    def stage_owner(self, stage: int) -> int:
        """The pipeline rank that runs a stage: stages are dealt round, so stage ``s`` lives on ``s mod pp``."""
        return stage % self.pp

    def stages_of(self, pp_rank: int) -> tuple[int, ...]:
        """The stages of one pipeline rank, in the order in which an input meets them."""
        return tuple(range(pp_rank, self.num_stages, self.pp))

    @cached_property
    def first_and_last_pp_ranks(self) -> tuple[int, ...]:
        """Pipeline ranks that hold the embedding and the head; one rank when they coincide."""
        return tuple(sorted({self.stage_owner(0), self.stage_owner(self.num_stages - 1)}))

    def tied_groups(self) -> list[tuple[int, ...]]:
        """Groups that share a tied embedding: every copy over first and last stage, cp and dp, for one tp rank.

        One all-reduce over such a group gives every copy the same bits; two successive ones (over stages, then over dp)
        would not, since the order in which a ring adds depends on where an element lies in its buffer.
        """
        return [self._tied_group(tp) for tp in range(self.tp)]

    def tied_group_of(self, rank: int) -> tuple[int, ...] | None:
        """The one of :meth:`tied_groups` that ``rank`` belongs to; None: its stages are neither first nor last."""
        here = self.coordinates(rank)
        return self._tied_group(here.tp) if here.pp in self.first_and_last_pp_ranks else None

    def first_of_tied_group(self, rank: int) -> int | None:
        """The lowest rank of :meth:`tied_group_of`."""
        here = self.coordinates(rank)
        stages = self.first_and_last_pp_ranks
        return self.rank_at(pp=stages[0], tp=here.tp) if here.pp in stages else None

    def _tied_group(self, tp: int) -> tuple[int, ...]:
        return tuple(
            self.rank_at(pp=p, dp=d, cp=c, tp=tp)
            for p in self.first_and_last_pp_ranks
            for d in range(self.dp)
            for c in range(self.cp)
        )

    def describe(self) -> str:
        """One line for logs: only the degrees above 1, and the number of ranks."""
        axes = ("tp", "pp", "cp", "dp", *(name for name, _ in self.inner_axes))
        degrees = [f"{axis}{self.degree(axis)}" for axis in axes if self.degree(axis) > 1]
        if self.virtual_stages > 1:
            degrees.append(f"v{self.virtual_stages}")
        return f"{'·'.join(degrees) or 'one rank'} ({self.world_size} rank{'s' if self.world_size > 1 else ''})"

    @cached_property
    def _views(self) -> tuple[dict[str, int], ...]:
        """The meshes that the ranks are, as degrees by axis, outermost first."""
        main = {axis: int(getattr(self, axis)) for axis in AXES}
        inner = dict(self.inner_axes)
        outer = self.dp * self.cp // prod(inner.values())
        return main, {"pp": self.pp, OUTER_REPLICAS: outer, **inner, "tp": self.tp}

    def _view(self, *axes: str) -> dict[str, int]:
        """The mesh that has all of some axes."""
        for view in self._views:
            if view.keys() >= set(axes):
                return view
        known = " or of ".join(", ".join(view) for view in self._views)
        raise ValueError(f"axes {', '.join(axes)}: they must be of {known}")


def _points(degrees: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Every combination of coordinates along some axes."""
    for point in product(*(range(degree) for degree in degrees.values())):
        yield dict(zip(degrees, point, strict=True))


def _rank(view: Mapping[str, int], at: Mapping[str, int]) -> int:
    rank = 0
    for axis, degree in view.items():
        rank = rank * degree + at[axis]
    return rank


def _coordinates(view: Mapping[str, int], rank: int) -> dict[str, int]:
    at = {}
    for axis in reversed([*view]):
        rank, at[axis] = divmod(rank, view[axis])
    return at
