"""Any layout, same numbers: losses, gradient norms and weights of six clipped steps against one plain process.

What a failure tells: initial weights differ ▶ ShardSpec or initialisation; the first loss differs ▶ forward or loss
weights; the first gradient norm ▶ backward, a missing reduction, or a parameter counted twice; the second loss only ▶
clipping or the optimizer; copies that differ between ranks ▶ replicated or tied gradients are not reduced alike.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from harness import run_ranks
from parity import CLIP, MODEL, Layout, Trace, assemble, digest, reference, train_on_ranks

ROTARY = replace(
    MODEL,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    num_kv_heads=2,
    tie_embeddings=False,
    ffn_hidden_size=48,
    num_layers=5,
)
"""The Llama family's choices, on layers that two stages cannot share evenly."""

WORLDS: dict[int, list[Layout]] = {
    1: [Layout(), Layout(zero_stage=0)],
    4: [
        Layout(tp=4),
        Layout(pp=4),
        Layout(dp=4),
        Layout(tp=2, dp=2),
        Layout(tp=2, pp=2),
        Layout(pp=2, dp=2, schedule="gpipe"),
        Layout(tp=2, pp=2, zero_stage=0),
        Layout(tp=2, pp=2, model=ROTARY),
        Layout(tp=2, pp=2, dtype="bf16"),
        Layout(pp=2, dp=2, dtype="bf16"),
    ],
    8: [Layout(tp=2, pp=2, dp=2), Layout(pp=2, dp=4, dtype="bf16")],
}
CASES = [(world, index) for world, layouts in WORLDS.items() for index in range(len(layouts))]


@cache
def traces(world_size: int) -> list[list[Trace]]:
    """By layout, then by rank; one spawn for all layouts of a world size."""
    by_rank = run_ranks(world_size, train_on_ranks, WORLDS[world_size], timeout_seconds=240)
    return [list(per_layout) for per_layout in zip(*by_rank, strict=True)]


@cache
def expected(layout: Layout) -> Trace:
    return reference(replace(layout, tp=1, pp=1, dp=1, dtype="fp32", schedule="1f1b", zero_stage=1))


@pytest.mark.parametrize(("world_size", "index"), CASES, ids=[str(WORLDS[w][i]) for w, i in CASES])
def test_layout_trains_like_one_process(world_size: int, index: int) -> None:
    layout, per_rank = WORLDS[world_size][index], traces(world_size)[index]
    want, tolerance = expected(layout), 1e-5 if layout.dtype == "fp32" else 5e-3
    assert min(want.grad_norms) > CLIP, "clipping is active in every step"
    for trace in per_rank:
        assert trace.losses == pytest.approx(want.losses, abs=tolerance)
        assert trace.grad_norms == pytest.approx(want.grad_norms, abs=tolerance)
        assert trace.losses == per_rank[0].losses, "every rank reports the same loss"

    initial = assemble([trace.initial for trace in per_rank])
    final = assemble([trace.final for trace in per_rank])
    assert initial.keys() == want.initial.keys()
    assert not any(tensor.isnan().any() for tensor in initial.values()), "together the ranks hold every element"
    if layout.dtype == "fp32":
        assert digest(initial) == digest(want.initial), "initial weights are bit-identical"
        worst = max(float((final[name] - want.final[name]).abs().max()) for name in final)
        assert worst < 5e-5, "Adam at lr 1e-3 turns rounding of tiny gradients into steps of this order"
    assert all(not torch.equal(final[name], initial[name]) for name in final), "every parameter was trained"
