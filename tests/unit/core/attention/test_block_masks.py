"""Block masks in closed form against all pairs, against torch's own, and attention with them against a dense mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from megalm.core.attention.block_masks import BLOCK, KEPT, WindowMasks, _pairs, block_mask

CPU = torch.device("cpu")


def numbers_of(rows: int, length: int, seed: int, share: float) -> torch.Tensor:
    starts = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < share
    starts[:, 0] = True
    return (starts.cumsum(dim=1) - 1).int()


def all_pairs(length: int, causal: bool, window: int, documents: torch.Tensor | None) -> torch.Tensor:
    """[B, S, S], written out."""
    at = torch.arange(length)
    distance = at[:, None] - at[None, :]
    seen = torch.ones(1, length, length, dtype=torch.bool)
    if causal:
        seen = seen & (distance >= 0)
    if window:
        seen = seen & (distance.abs() < window)
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    return seen


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 700),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 2, 100, 127, 128, 129, 256, 300]),
    share=st.sampled_from([None, 0.0, 0.002, 0.01, 0.3, 1.0]),
    seed=st.integers(0, 5),
)
def test_blocks_are_those_of_all_pairs(length, causal, window, share, seed) -> None:
    documents = None if share is None else numbers_of(2, length, seed, share)
    mask = block_mask(length, causal=causal, window=window, device=CPU, documents=documents)
    pairs = all_pairs(length, causal, window, documents)
    blocks = -(-length // BLOCK)
    room = blocks * BLOCK - length
    tiles = F.pad(pairs, (0, room, 0, room)).unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))  # [B, Q, b, K, b]
    some, every = tiles.any(dim=4).any(dim=2), tiles.all(dim=4).all(dim=2)
    assert mask.kv_num_blocks.shape == (len(pairs), 1, blocks)
    for row in range(len(pairs)):
        for query in range(blocks):
            full = set(mask.full_kv_indices[row, 0, query, : mask.full_kv_num_blocks[row, 0, query]].tolist())
            partly = set(mask.kv_indices[row, 0, query, : mask.kv_num_blocks[row, 0, query]].tolist())
            assert full == set(every[row, query].nonzero().flatten().tolist())
            assert partly == set((some & ~every)[row, query].nonzero().flatten().tolist())
    at = torch.arange(length)
    sees = _pairs(causal, window, documents)
    row = torch.arange(len(pairs))[:, None, None]
    assert torch.equal(sees(row, row, at[None, :, None], at[None, None, :]).expand_as(pairs), pairs)


@pytest.mark.parametrize("window", [0, 130])
@pytest.mark.parametrize("causal", [True, False])
def test_torch_finds_the_same_blocks(causal: bool, window: int) -> None:
    documents = numbers_of(2, 512, 1, 0.01)
    ours = block_mask(512, causal=causal, window=window, device=CPU, documents=documents)
    torchs = create_block_mask(_pairs(causal, window, documents), 2, None, 512, 512, device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(torchs, name)), name
    assert torch.equal(ours.to_dense(), torchs.to_dense())
    assert ours.shape == torchs.shape


@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, 70), (False, 0), (False, 130)])
@pytest.mark.parametrize("length", [128, 300])
def test_attention_with_them_is_attention_with_a_dense_mask(causal: bool, window: int, length: int) -> None:
    documents = numbers_of(2, length, 2, 0.02)
    query = torch.randn(2, 4, length, 16, generator=torch.Generator().manual_seed(3))
    key, value = torch.randn(2, 2, 2, length, 16, generator=torch.Generator().manual_seed(4))
    for numbers in (None, documents):
        mask = block_mask(length, causal=causal, window=window, device=CPU, documents=numbers)
        got = flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
        seen = all_pairs(length, causal, window, numbers)[:, None]
        want = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


def test_masks_of_windows_are_made_once_and_few_are_kept() -> None:
    masks = WindowMasks()
    first = masks.of(256, causal=True, window=64, device=CPU)
    assert masks.of(256, causal=True, window=64, device=CPU) is first
    for length in range(1, KEPT):
        masks.of(length, causal=True, window=64, device=CPU)
    assert masks.of(256, causal=True, window=64, device=CPU) is first
    for length in range(1, KEPT + 1):
        masks.of(length, causal=True, window=64, device=CPU)
    assert masks.of(256, causal=True, window=64, device=CPU) is not first
    assert len(masks._masks) == KEPT


def test_making_a_mask_waits_for_no_device() -> None:
    """Counted as a dry run counts: an operation that reads a value on the host is one of these."""
    from torch.utils._python_dispatch import TorchDispatchMode

    waits = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
                waits.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        block_mask(640, causal=True, window=0, device=CPU, documents=numbers_of(2, 640, 0, 0.01))
    assert waits == []
