"""Slices over any dims: what is taken is put back, runs name the right elements, and holes are found."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalm.mesh.slices import Cut, ShardSpec, even_range, padded_range, uncovered


@st.composite
def slices(draw: st.DrawFn) -> ShardSpec:
    """Any slice of a tensor of up to four dims."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    cuts = []
    for dim, size in enumerate(shape):
        if draw(st.booleans()):
            ends = sorted(draw(st.lists(st.integers(0, size), max_size=6)))
            ranges = tuple(zip(ends[::2], ends[1::2], strict=False))
            cuts.append(Cut(dim, ranges, draw(st.integers(0, 2))))
    return ShardSpec(shape, tuple(cuts))


def numbered(shape: tuple[int, ...]) -> torch.Tensor:
    """Every element is its place plus 1, so that padding (0) is none of them."""
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape)


@given(slices())
def test_what_is_taken_is_put_back(shard: ShardSpec) -> None:
    full = numbered(shard.full_shape)
    local = shard.take(full)
    assert tuple(local.shape) == shard.local_shape
    assert int((local > 0).sum()) == shard.numel
    back = torch.zeros_like(full)
    shard.put(local, back)
    taken = local[local > 0]
    assert torch.equal(back[back > 0].sort().values, taken.sort().values.unique())
    assert torch.equal(back[back > 0], full[back > 0])


@given(slices(), st.data())
def test_runs_name_the_elements_of_any_stretch(shard: ShardSpec, data: st.DataObject) -> None:
    full = numbered(shard.full_shape)
    local = shard.take(full).flatten()
    start = data.draw(st.integers(0, local.numel()))
    length = data.draw(st.integers(0, local.numel() - start))
    stretch = local[start : start + length]
    found = torch.zeros_like(stretch)
    for rows in shard.runs(start, length):
        assert torch.equal(rows.of_local(stretch), rows.of_full(full.flatten()))
        assert rows.full_stop <= full.numel()
        place = rows.of_local(found)
        assert not place.any(), "each element once"
        place.copy_(rows.of_full(full.flatten()))
    assert torch.equal(found, stretch), "all of them but padding"


@given(slices(), slices())
def test_uncovered_is_none_exactly_where_every_element_is_held(first: ShardSpec, second: ShardSpec) -> None:
    second = ShardSpec(first.full_shape, tuple(c for c in second.cuts if _fits(c, first.full_shape)))
    for held in ([first], [second], [first, second], []):
        seen = torch.zeros(first.full_shape)
        for shard in held:
            shard.put(shard.take(torch.ones(first.full_shape)), seen) if _plain(shard) else _mark(shard, seen)
        assert (uncovered(first.full_shape, held) is None) == bool(seen.all())


def _fits(cut: Cut, shape: tuple[int, ...]) -> bool:
    return cut.dim < len(shape) and all(stop <= shape[cut.dim] for _, stop in cut.ranges)


def _plain(shard: ShardSpec) -> bool:
    return not shard.cuts


def _mark(shard: ShardSpec, seen: torch.Tensor) -> None:
    for place, _ in shard.blocks():
        seen[place] = 1.0


@pytest.mark.parametrize("experts, tp", [(1, 1), (2, 2), (4, 1), (2, 4)])
def test_a_grid_of_slices_over_two_axes_covers_a_tensor_once(experts: int, tp: int) -> None:
    shape, full = (4, 8, 3), numbered((4, 8, 3))
    grid = [
        ShardSpec(shape, (Cut(0, (even_range(4, e, experts),)), Cut(1, (even_range(8, t, tp),))))
        for e, t in product(range(experts), range(tp))
    ]
    assert uncovered(shape, grid) is None
    assert torch.equal(torch.cat([shard.take(full).flatten() for shard in grid]).sort().values, full.flatten())
    if len(grid) > 1:
        assert uncovered(shape, grid[1:]) is not None


def test_a_hole_is_named_by_its_place() -> None:
    shape = (4, 6)
    assert uncovered(shape, [ShardSpec.along(shape, 0, ((0, 2),))]) == "[2:4, :]"
    assert uncovered(shape, [ShardSpec(shape, (Cut(0, ((0, 2),)), Cut(1, ((3, 6),))))]) == "[0:2, 0:3]"


def test_slices_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="range 0:5 is outside 0:4"):
        ShardSpec.along((4, 2), 0, ((0, 5),))
    with pytest.raises(ValueError, match=r"dim=2: shape \(4, 2\) has 2 dims"):
        ShardSpec.along((4, 2), 2, ())
    with pytest.raises(ValueError, match=r"cuts along dims \[1, 0\]: one for each dim, in ascending order"):
        ShardSpec((4, 2), (Cut(1, ()), Cut(0, ())))
    with pytest.raises(ValueError, match="7 items do not split evenly over 2 ranks"):
        even_range(7, 0, 2)


@given(st.integers(1, 50), st.integers(1, 9))
def test_padded_ranges_are_equally_long_and_cover_all(size: int, degree: int) -> None:
    ranges = [padded_range(size, rank, degree) for rank in range(degree)]
    assert len({stop - start + padding for (start, stop), padding in ranges}) == 1
    assert [i for (start, stop), _ in ranges for i in range(start, stop)] == list(range(size))


@given(st.integers(1, 300), st.integers(1, 9), st.sampled_from([1, 8, 128]))
def test_padding_to_a_multiple_moves_no_item(size: int, degree: int, multiple: int) -> None:
    for rank in range(degree):
        plain, few = padded_range(size, rank, degree)
        padded, more = padded_range(size, rank, degree, multiple)
        held = padded[1] - padded[0] + more
        assert padded == plain
        assert held % multiple == 0
        assert 0 <= held - (plain[1] - plain[0] + few) < multiple


def test_padding_at_the_end_of_a_slice_is_not_saved() -> None:
    words, rows = Cut(0, ((3, 7),), 4), Cut(1, ((0, 2),), 1)
    assert ShardSpec((9, 5), (words,)).saved == ShardSpec((9, 5), (Cut(0, ((3, 7),)),))
    assert ShardSpec((9, 5), (words, rows)).saved == ShardSpec((9, 5), (Cut(0, ((3, 7),)), rows))
    for same in (ShardSpec((9, 5)), ShardSpec((9, 5), (rows,))):
        assert same.saved is same


@given(slices())
def test_a_whole_slice_is_the_full_tensor(shard: ShardSpec) -> None:
    full = numbered(shard.full_shape)
    assert shard.is_whole == torch.equal(shard.take(full), full)


def test_a_fused_weight_on_one_rank_is_whole() -> None:
    assert ShardSpec((6, 2), (Cut(0, ((0, 2), (2, 4), (4, 6))),)).is_whole
    assert not ShardSpec((6, 2), (Cut(0, ((2, 4), (0, 2), (4, 6))),)).is_whole
    assert not ShardSpec((6, 2), (Cut(0, ((0, 6),), 1),)).is_whole
