"""Who stands for a parameter, and over which ranks it is replicated, counted at the sizes of real runs."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.mesh.parameter import ParameterRecord
from megalm.mesh.slices import ShardSpec
from megalm.mesh.splits import inner_group_axes
from megalm.mesh.topology import OUTER_REPLICAS, Topology

SHARD = ShardSpec.replicated(4, 4)
REPLICATED = ParameterRecord("norm.weight", SHARD)
SPLIT = ParameterRecord("linear.weight", SHARD, split_over=("tp",))
EXPERT = ParameterRecord("expert.weight", SHARD, split_over=("ep", "tp"), replicated_over=(OUTER_REPLICAS,))

degree = st.integers(1, 3)
topologies = st.builds(
    lambda tp, pp, cp, outer, ep: Topology(tp=tp, pp=pp, cp=cp, dp=outer * ep, inner_axes=(("ep", ep),)),
    degree,
    degree,
    st.integers(1, 2),
    degree,
    degree,
)


def _slice_of(record: ParameterRecord, topology: Topology, rank: int) -> tuple[int, ...]:
    """Coordinates that tell different slices apart."""
    return tuple(topology.coordinate(rank, axis) for axis in ("pp", *record.split_over))


@given(topologies, st.sampled_from([REPLICATED, SPLIT, EXPERT]))
def test_every_slice_has_one_owner(topology: Topology, record: ParameterRecord) -> None:
    owners = Counter(
        _slice_of(record, topology, rank) for rank in range(topology.world_size) if record.is_owned_by(topology, rank)
    )
    assert owners.keys() == {_slice_of(record, topology, rank) for rank in range(topology.world_size)}
    assert set(owners.values()) == {1}


@given(topologies, st.sampled_from([REPLICATED, SPLIT, EXPERT]))
def test_where_state_is_split_over_replicas_each_of_them_stands_for_its_part(
    topology: Topology, record: ParameterRecord
) -> None:
    for rank in range(topology.world_size):
        replicas = topology.group_of(rank, *record.replicated_over)
        standing = [record.is_owned_by(topology, other, among_replicas=False) for other in replicas]
        assert len(set(standing)) == 1, "all of them or none"
        assert standing[0] == any(record.is_owned_by(topology, other) for other in replicas)


def test_of_tied_copies_the_first_stage_is_the_owner() -> None:
    topology = Topology(tp=2, pp=4, dp=2)
    tied = ParameterRecord("embedding.weight", SHARD, split_over=("tp",), copies=(0, 3))
    holders = [rank for rank in range(topology.world_size) if topology.coordinates(rank).pp in (0, 3)]
    assert [rank for rank in holders if tied.is_owned_by(topology, rank)] == [0, 1]


@pytest.mark.parametrize("ranks", [8, 1024, 16384])
def test_groups_of_a_new_axis_are_as_many_at_any_size(ranks: int) -> None:
    topology = Topology(tp=2, pp=2, dp=ranks // 4, inner_axes=(("ep", 2),))
    assert inner_group_axes(topology) == [("ep",), (OUTER_REPLICAS,)], "two groups per rank"
    assert topology.group_of(0, "ep") == (0, 2), "neighbours, inside a node"
    assert len(topology.group_of(0, OUTER_REPLICAS)) == ranks // 8
    assert topology.group_of(ranks - 1, *REPLICATED.replicated_over) == tuple(range(ranks // 2, ranks))[1::2]


def test_bad_inner_axes_are_named() -> None:
    with pytest.raises(ValueError, match=r"dp·cp = 4 is no multiple of 3"):
        Topology(dp=4, inner_axes=(("ep", 3),))
    with pytest.raises(ValueError, match="ep=0: a degree is at least 1"):
        Topology(dp=4, inner_axes=(("ep", 0),))
    with pytest.raises(ValueError, match="each axis has a name of its own"):
        Topology(dp=4, inner_axes=(("tp", 2),))
    with pytest.raises(ValueError, match="axes dp, ep: they must be of pp, dp, cp, tp or of pp, outer_dp, ep, tp"):
        Topology(dp=4, inner_axes=(("ep", 2),)).groups("dp", "ep")
