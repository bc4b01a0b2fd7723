"""Block-wise causal attention against PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megalm.core.attention import cpu as cpu_attention
from megalm.core.attention.cpu import causal_attention


def run(attention, dtype, shape, kv_heads):
    generator = torch.Generator().manual_seed(3)
    batch, heads, length, head_dim = shape
    tensors = [
        torch.randn(batch, length, n, head_dim, generator=generator).to(dtype).transpose(1, 2)  # as a layer has them
        for n in (heads, kv_heads, kv_heads)
    ]
    tensors = [t.requires_grad_() for t in tensors]
    mixed = attention(*tensors)
    mixed.backward(torch.randn(mixed.shape, generator=generator).to(dtype))
    return [mixed.detach(), *(t.grad for t in tensors)]


def in_double(query, key, value):
    """Equation 1 of Vaswani et al. 2017, written out."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query.double() @ key.mT / query.shape[-1] ** 0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ value


@pytest.mark.parametrize("kv_heads", [6, 2, 1])
@pytest.mark.parametrize("length", [1, 7, 128, 300])
@pytest.mark.parametrize("block_scores", [1, 2**16, 2**30])
def test_fp32_is_exact(kv_heads: int, length: int, block_scores: int, monkeypatch) -> None:
    """Whatever the cut: a head at a time, some heads, or all; whole blocks of queries or a shorter last one."""
    monkeypatch.setattr(cpu_attention, "_BLOCK_SCORES", block_scores)
    shape = (2, 6, length, 16)
    for got, want in zip(
        run(causal_attention, torch.float32, shape, kv_heads),
        run(in_double, torch.float32, shape, kv_heads),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), want.double(), atol=1e-5, rtol=1e-5)


def test_bf16_is_as_accurate_as_explicit_attention_in_bf16() -> None:
    shape = (2, 4, 257, 64)

    def explicit(query, key, value):
        scores = query @ key.mT * query.shape[-1] ** -0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1) @ value

    truth = run(in_double, torch.bfloat16, shape, 4)
    ours, theirs = run(causal_attention, torch.bfloat16, shape, 4), run(explicit, torch.bfloat16, shape, 4)
    for got, plain, want in zip(ours, theirs, truth, strict=True):
        error, plain_error = ((x.double() - want.double()).norm() / want.double().norm() for x in (got, plain))
        assert got.dtype == torch.bfloat16
        assert error < max(1.2 * plain_error, 0.01)


def test_a_query_never_sees_the_future() -> None:
    query, key, value = (torch.randn(1, 2, 200, 8) for _ in range(3))
    before = causal_attention(query, key, value)
    key[:, :, 150:], value[:, :, 150:] = 1e4, torch.nan
    torch.testing.assert_close(causal_attention(query, key, value)[:, :, :128], before[:, :, :128], atol=0, rtol=0)


def test_backward_keeps_inputs_only() -> None:
    """What a layer stores for attention is what its projections gave, which share one storage there."""
    tensors = [torch.randn(1, 2, 64, 8, requires_grad=True) for _ in range(3)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()), lambda _: None):
        causal_attention(*tensors)
    assert kept == [t.data_ptr() for t in tensors]


def test_it_agrees_with_sdpa() -> None:
    def sdpa(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    shape = (1, 4, 200, 32)
    for got, want in zip(
        run(causal_attention, torch.float32, shape, 2), run(sdpa, torch.float32, shape, 2), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
