"""Rank arithmetic."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.mesh.topology import AXES, Topology

degree = st.integers(1, 4)
topologies = st.builds(Topology, tp=degree, pp=degree, cp=st.integers(1, 2), dp=degree)


@given(topologies)
def test_coordinates_and_ranks_are_inverse(topology: Topology) -> None:
    for rank in range(topology.world_size):
        at = topology.coordinates(rank)
        assert topology.rank_at(pp=at.pp, dp=at.dp, cp=at.cp, tp=at.tp) == rank


@given(topologies, st.sets(st.sampled_from(AXES), min_size=1))
def test_groups_partition_the_ranks_and_hold_their_members(topology: Topology, axes: set[str]) -> None:
    groups = topology.groups(*axes)
    assert sorted(rank for group in groups for rank in group) == list(range(topology.world_size))
    for group in groups:
        assert list(group) == sorted(group)
        for rank in group:
            assert topology.group_of(rank, *axes) == group
            for axis in set(AXES) - axes:
                assert getattr(topology.coordinates(rank), axis) == getattr(topology.coordinates(group[0]), axis)


def test_tensor_parallel_ranks_are_neighbours() -> None:
    assert Topology(tp=2, pp=2, dp=2).groups("tp") == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert Topology(tp=2, pp=2, dp=2).groups("dp") == [(0, 2), (1, 3), (4, 6), (5, 7)]
    assert Topology(tp=2, pp=2, dp=2).groups("pp") == [(0, 4), (1, 5), (2, 6), (3, 7)]


def test_tied_embeddings_are_shared_by_first_and_last_stage_over_all_replicas() -> None:
    assert Topology(tp=2, pp=3, dp=2).tied_groups() == [(0, 2, 8, 10), (1, 3, 9, 11)]


@given(st.integers(1, 8), st.integers(1, 4))
def test_every_stage_has_one_owner(pp: int, virtual_stages: int) -> None:
    topology = Topology(pp=pp, virtual_stages=virtual_stages)
    owned = [stage for rank in range(pp) for stage in topology.stages_of(rank)]
    assert sorted(owned) == list(range(topology.num_stages))
    assert all(topology.stage_owner(stage) == rank for rank in range(pp) for stage in topology.stages_of(rank))


def test_bad_degrees_are_named() -> None:
    with pytest.raises(ValueError, match="tp=0: a degree is at least 1"):
        Topology(tp=0)
    with pytest.raises(ValueError, match=r"world_size=6 is no multiple of tp·pp·cp = 2·2·1 = 4"):
        Topology.from_world_size(6, tp=2, pp=2)
    with pytest.raises(ValueError, match="rank=4: ranks are 0 to 3"):
        Topology(tp=4).coordinates(4)


def test_described_in_one_line() -> None:
    assert Topology(tp=2, pp=2, dp=2).describe() == "tp2·pp2·dp2 (8 ranks)"
    assert Topology().describe() == "one rank (1 rank)"
