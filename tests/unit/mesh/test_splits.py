"""The communicators of NCCL: what each layout makes, in which order, with which colours, at up to 65,536 ranks."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megalm.mesh.communicators import FakeSplits, NcclSplits, split_maker, split_options
from megalm.mesh.groups import ParallelContext
from megalm.mesh.splits import MOST_SPLITS, LinkSplit, Split, neighbour_pairs, splits_of
from megalm.mesh.topology import Topology

LAYOUTS = [
    Topology(dp=2),
    Topology(tp=2),
    Topology(cp=2),
    Topology(pp=2),
    Topology(pp=2, virtual_stages=2),
    Topology(pp=3),
    Topology(pp=3, virtual_stages=2),
    Topology(pp=4),
    Topology(pp=4, virtual_stages=3),
    Topology(pp=5, virtual_stages=2, dp=2),
    Topology(tp=2, pp=2, dp=2),
    Topology(tp=2, pp=3, cp=2, dp=2, virtual_stages=2),
    Topology(dp=8, inner_axes=(("ep", 8),)),
    Topology(tp=2, dp=8, inner_axes=(("ep", 4),)),
    Topology(tp=2, pp=2, cp=2, dp=4, inner_axes=(("ep", 4),)),
    Topology(tp=2, pp=3, cp=2, dp=2, virtual_stages=2, inner_axes=(("ep", 2),)),
    Topology(tp=8, dp=16),
    Topology(tp=8, pp=16),
    Topology(dp=1024),
    Topology(tp=8, pp=16, dp=8, virtual_stages=3),
    Topology(tp=8, pp=15, dp=9, virtual_stages=2),
    Topology(tp=8, pp=7, cp=2, dp=16),
    Topology(tp=4, pp=8, cp=4, dp=32, virtual_stages=2),
    Topology(tp=8, pp=16, dp=128, virtual_stages=3),
    Topology(tp=8, pp=16, cp=4, dp=32),
    Topology(dp=16384),
    Topology(pp=16, dp=1024, inner_axes=(("ep", 64),)),
    Topology(tp=8, pp=16, dp=512, virtual_stages=2),
    Topology(pp=64, dp=1024, virtual_stages=2),
    Topology(tp=8, pp=33, cp=4, dp=62, virtual_stages=2, inner_axes=(("ep", 8),)),
]
"""The last three have 65,536 ranks, or 65,472."""

NAMES = [layout.describe() for layout in LAYOUTS]


@pytest.mark.parametrize("topology", LAYOUTS, ids=NAMES)
def test_colours_do_not_collide_and_no_group_has_one_member(topology: Topology) -> None:
    """All colours of all ranks: those of one colour are exactly the members that each of them names."""
    by_name: dict[str, dict[int, int]] = {}
    for split in splits_of(topology):
        groups: dict[tuple[int | None, int], list[int]] = defaultdict(list)
        parents = {} if split.parent is None else by_name[split.parent]
        colours = by_name[split.name] = {}
        for rank in range(topology.world_size):
            colour = split.colour(rank)
            if colour is not None:
                assert 0 <= colour < 2**31, "a C int"
                colours[rank] = colour
                groups[parents.get(rank), colour].append(rank)
        assert groups, split
        for members in groups.values():
            assert len(members) > 1, split
            for rank in {members[0], members[-1]}:
                assert split.members(rank) == tuple(members), split
        for rank in range(0, topology.world_size, max(1, topology.world_size // 100)):
            assert (split.members(rank) is None) == (rank not in colours), "a member has a colour, and nobody else"


def test_there_are_thirty_layouts_and_the_largest_have_65536_ranks() -> None:
    assert len(LAYOUTS) == 30
    assert sorted(topology.world_size for topology in LAYOUTS)[-3:] == [65_472, 65_536, 65_536]


@pytest.mark.parametrize("topology", LAYOUTS, ids=NAMES)
def test_every_neighbour_pair_has_a_link_of_its_own_and_no_rank_two_in_a_split(topology: Topology) -> None:
    splits = splits_of(topology)
    links = [split for split in splits if isinstance(split, LinkSplit)]
    assert len(splits) <= MOST_SPLITS
    for split in links:
        ends = [end for pair in split.pairs for end in pair]
        assert len(ends) == len(set(ends))
    linked = [pair for split in links for pair in split.pairs]
    assert len(linked) == len(set(linked))
    if links:
        assert set(linked) == set(neighbour_pairs(topology))
    classes = 0 if topology.pp == 1 else 2 if topology.pp == 2 else 4
    if topology.virtual_stages > 1 and topology.pp > 1 and topology.pp % 2:
        classes = 6
    assert len(links) in (0, classes)
    if not links:
        assert topology.pp == 1 or len(splits) + classes > MOST_SPLITS, "left out only where they would be too many"


def test_neighbours() -> None:
    assert neighbour_pairs(Topology(tp=8)) == ()
    assert neighbour_pairs(Topology(pp=2)) == ((0, 1), (1, 0))
    assert neighbour_pairs(Topology(pp=2, virtual_stages=2)) == ((0, 1), (1, 0))
    assert neighbour_pairs(Topology(pp=3)) == ((0, 1), (1, 2), (1, 0), (2, 1))
    assert neighbour_pairs(Topology(pp=3, virtual_stages=2)) == ((0, 1), (1, 2), (2, 0), (1, 0), (2, 1), (0, 2))


class Recorder(FakeSplits):
    """Notes each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str | None, int | None]] = []

    def split(self, split: Split, rank: int, parent: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
        assert (parent is None) == (split.parent is None)
        assert parent is None or rank in dist.get_process_group_ranks(parent), "a rank of the communicator it divides"
        self.calls.append((split.name, split.parent, split.colour(rank)))
        return super().split(split, rank, parent)


@contextmanager
def one_rank_of(world_size: int, rank: int) -> Iterator[None]:
    """A rank among others that are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def ranks_to_try(topology: Topology) -> list[int]:
    """All of a small mesh; of a large one both ends, those beside them, and some at random."""
    last = topology.world_size - 1
    if last < 64:
        return list(range(last + 1))
    return sorted({0, 1, last // 2, last - 1, last, *random.Random(0).sample(range(last), 3)})


@pytest.mark.parametrize("topology", LAYOUTS, ids=NAMES)
def test_every_rank_makes_the_same_calls_in_the_same_order(topology: Topology) -> None:
    orders = set()
    for rank in ranks_to_try(topology):
        recorder = Recorder()
        with one_rank_of(topology.world_size, rank):
            context = ParallelContext.create(topology, "cpu", transport="nccl", maker=recorder)
            assert_is_whole(context)
        orders.add(tuple((name, parent) for name, parent, _ in recorder.calls))
        assert [colour for *_, colour in recorder.calls] == [split.colour(rank) for split in splits_of(topology)]
    assert len(orders) == 1
    assert len(orders.pop()) <= MOST_SPLITS


def assert_is_whole(context: ParallelContext) -> None:
    """Every group that a layer asks for is there, with a handle, and every transfer has its link."""
    topology, rank = context.topology, context.rank
    assert context.transport == "nccl"
    expected = {
        "tp_group": topology.group_of(rank, "tp"),
        "pp_group": topology.group_of(rank, "pp"),
        "cp_group": topology.group_of(rank, "cp"),
        "replica_group": topology.group_of(rank, "dp", "cp"),
        "model_group": topology.group_of(rank, "pp", "tp"),
        "tied_group": (topology.tied_group_of(rank) if topology.pp > 1 else None) or (rank,),
    }
    for name, ranks in expected.items():
        group = getattr(context, name)
        assert group.ranks == ranks, name
        assert group.ranks[group.index] == rank
        assert dist.get_process_group_ranks(group.handle) == list(ranks), "a library never falls back on the world"
    for axes, group in context.inner_groups.items():
        assert group.ranks == topology.group_of(rank, *axes)
    here = context.coordinates.pp
    for pair in neighbour_pairs(topology):
        if here in pair:
            link = context.link(*pair)
            assert rank in link.ranks
            assert set(link.ranks) <= set(context.pp_group.ranks)
            assert not context.links or link.size == 2


def test_links_are_separate_for_each_direction() -> None:
    with one_rank_of(8, 5):
        context = ParallelContext.create(Topology(tp=2, pp=4, virtual_stages=2), "cpu", transport="nccl")
        assert sorted(context.links) == [(1, 2), (2, 1), (2, 3), (3, 2)]
        assert {pair: link.ranks for pair, link in context.links.items()} == {
            (1, 2): (3, 5),
            (2, 1): (3, 5),
            (2, 3): (5, 7),
            (3, 2): (5, 7),
        }
        assert len({id(link.handle) for link in context.links.values()}) == 4
        assert isinstance(split_maker(), FakeSplits)


def test_gloo_has_no_links_and_makes_its_groups_as_before() -> None:
    with one_rank_of(8, 5):
        before = len(dist.distributed_c10d._world.pg_map)
        context = ParallelContext.create(Topology(tp=2, pp=4), "cpu")
        assert (context.transport, context.links) == ("gloo", {})
        assert len(dist.distributed_c10d._world.pg_map) == before + 6
        assert context.link(1, 2) is context.pp_group


class Options:
    """As NCCL's: two fields that torch sets before it makes a communicator."""

    def __init__(self) -> None:
        self._fields: dict[str, object] = {}

    split_from = property(lambda self: self._fields["from"], lambda self, v: self._fields.update({"from": v}))
    split_color = property(lambda self: self._fields["color"], lambda self, v: self._fields.update({"color": v}))


def test_torch_cannot_change_the_colour_or_the_parent() -> None:
    options = split_options(Options, "the pipeline", 7)
    assert isinstance(options, Options)
    options.split_from, options.split_color = "the world", 1234
    assert (options.split_from, options.split_color) == ("the pipeline", 7)
    assert options._fields == {"from": "the pipeline", "color": 7}, "what C++ reads"


def test_a_field_of_torchs_own_options_can_be_kept_so() -> None:
    """NCCL's options are bound to Python as gloo's are; torch for CPUs has gloo's alone."""
    base = dist.ProcessGroupGloo._Options

    class Kept(base):
        group_name = property(base.group_name.__get__, lambda self, value: None)

    options = Kept()
    base.group_name.__set__(options, "mine")
    options.group_name = "torch's"
    assert base.group_name.__get__(options) == "mine"


class Backend:
    """What of NCCL's backend a split asks for."""

    def __init__(self, *, splits: bool = True) -> None:
        self.supports_splitting = splits
        self.nocolour: list[torch.device] = []

    def perform_nocolor_split(self, device: torch.device) -> None:
        self.nocolour.append(device)


class World:
    def __init__(self, backend: Backend, device: torch.device | None) -> None:
        self.backend, self.bound_device_id = backend, device

    def _get_backend(self, device: torch.device) -> Backend:
        return self.backend


def test_a_rank_without_a_group_takes_part_in_the_split_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda:0")
    world, pipeline = World(Backend(), device), World(Backend(), device)
    monkeypatch.setattr(type(dist.group), "WORLD", world, raising=False)
    tied, *_, link = [split for split in splits_of(Topology(pp=3)) if split.name == "tied" or split.parent]
    assert NcclSplits().split(tied, 1, None) is None
    assert world.backend.nocolour == [device]
    outside = next(rank for rank in range(3) if link.members(rank) is None)
    assert NcclSplits().split(link, outside, pipeline) is None
    assert pipeline.backend.nocolour == [device]
    assert len(world.backend.nocolour) == 1


def test_a_communicator_that_cannot_be_split_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    (split, *_) = splits_of(Topology(tp=2))
    device = torch.device("cuda:0")
    for world, problem in ((World(Backend(), None), "device_id"), (World(Backend(splits=False), device), "2.18")):
        monkeypatch.setattr(type(dist.group), "WORLD", world, raising=False)
        with pytest.raises(RuntimeError, match=problem):
            NcclSplits().split(split, 0, None)
