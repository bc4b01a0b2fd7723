"""Any layout, same numbers: losses, gradient norms and weights of six clipped steps against one plain process.

What a failure tells: initial weights differ ▶ ShardSpec or initialisation; the first loss differs ▶ forward or loss
weights; the first gradient norm ▶ backward, a missing reduction, or a parameter counted twice; the second loss only ▶
clipping or the optimizer; copies that differ between ranks ▶ replicated or tied gradients are not reduced alike.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from harness import run_ranks_on_each
from parity import CLIP, MODEL, Layout, at_dropout, train_on_ranks

from megalm.verify.differences import differences
from megalm.verify.parity import Trace, train_plainly
from tests.families import bert_of

LLAMA = replace(
    MODEL,
    position="rotary",
    rotary_scaling="llama3",
    rotary_factor=4.0,
    norm="rmsnorm",
    activation="swiglu",
    bias=False,
    qkv_bias=True,
    num_kv_heads=2,
    tie_embeddings=False,
    ffn_hidden_size=48,
    num_layers=3,
)
"""The Llama and Qwen families' choices, on layers that two stages cannot share evenly."""

NEOX = replace(MODEL, position="rotary", rotary_fraction=0.25, residual="parallel", activation="gelu_erf", qk_norm=True)
BERT = bert_of(MODEL)
GPT3 = replace(MODEL, attention_windows=(0, 5))
MQA = replace(LLAMA, num_kv_heads=1, rotary_scaling="yarn", attention_windows=(0, 3))
QWEN3 = replace(LLAMA, rotary_scaling="none", rotary_factor=1.0, qkv_bias=None, qk_norm=True, head_dim=12)
"""4 heads of 12 on a hidden size of 32, which share 2 key/value heads: fewer than ranks at tp 4."""

BIASES = replace(MODEL, bias=False, qkv_bias=True, projection_bias=True, norm_bias=True, head_dim=4, num_kv_heads=1)
"""Biases on all but the MLP; heads that are narrower together than the hidden size."""

ROBERTA = replace(BERT, position_offset=2, token_types=1)
DROPOUT = at_dropout(MODEL, 0.2)
MILLIONS = replace(MODEL, num_layers=4, hidden_size=256, vocab_size=1500)
"""3.5 million parameters: on one partition a sum of their squares in fp32 is 7e-5 off."""

WORLDS: dict[int, list[Layout]] = {
    1: [
        Layout(),
        Layout(zero_stage=0),
        Layout(dtype="fp16"),
        Layout(schedule="zb_h1", z_loss=1e-2),
        Layout(recompute="full", recompute_every=2, model=DROPOUT, name="dropout"),
        Layout(zero_stage=3, schedule="gpipe"),
        Layout(model=MILLIONS, name="millions"),
        # Weight gradients that add to the fp32 sum themselves.
        Layout(fusion=True),
        Layout(dtype="bf16", zero_stage=2, fusion=True),
        Layout(schedule="zb_h1", fusion=True, z_loss=1e-2),
        Layout(recompute="full", fusion=True, model=LLAMA, name="llama"),
        Layout(fusion=True, model=MILLIONS, name="millions"),
    ],
    2: [
        # Kinds of engine; sums over more replicas are below.
        Layout(dp=2, zero_stage=3, schedule="gpipe"),
        Layout(dp=2, zero_stage=3, schedule="zb_h1"),
        Layout(dp=2, zero_stage=3, dtype="bf16"),
        Layout(dp=2, offload=True),
        Layout(dp=2, zero_stage=3, model=BERT, name="bert"),
        Layout(dp=2, zero_stage=3, model=QWEN3, name="qwen3"),
        Layout(dp=2, dtype="fp16"),
        Layout(dp=2, dtype="fp16", zero_stage=2),
        Layout(dp=2, dtype="fp16", reduce_dtype="bf16"),
        Layout(dp=2, zero_stage=0, transport="nccl"),
    ],
    4: [
        # One axis at a time.
        Layout(tp=4),
        Layout(tp=4, sp=True),
        Layout(pp=4),
        Layout(pp=4, schedule="gpipe"),
        Layout(pp=4, schedule="zb_h1"),
        Layout(dp=4),
        Layout(dp=4, zero_stage=0),
        Layout(dp=4, zero_stage=2),
        Layout(dp=4, zero_stage=3),
        Layout(dp=2, cp=2, zero_stage=3, recompute="full"),
        Layout(cp=4),
        Layout(cp=4, cp_attention="ring"),
        # Two and three together.
        Layout(tp=2, dp=2),
        Layout(tp=2, sp=True, dp=2, zero_stage=2),
        Layout(tp=2, pp=2),
        Layout(tp=2, sp=True, pp=2),
        Layout(tp=2, pp=2, zero_stage=0),
        Layout(tp=2, sp=True, pp=2, schedule="zb_h1"),
        Layout(pp=2, dp=2, schedule="gpipe"),
        Layout(pp=2, dp=2, schedule="zb_h1"),
        Layout(pp=2, v=2, dp=2, schedule="interleaved_1f1b"),
        Layout(tp=2, sp=True, pp=2, v=2, schedule="interleaved_1f1b"),
        Layout(pp=2, dp=2, stage_layers=(1, 3)),
        Layout(cp=2, dp=2, cp_attention="ring"),
        Layout(cp=2, pp=2, schedule="zb_h1"),
        Layout(tp=2, sp=True, cp=2, cp_attention="ring"),
        # So many parameters that the sums behind norm and loss show how they are computed.
        Layout(dp=4, zero_stage=0, model=MILLIONS, name="millions"),
        Layout(tp=2, sp=True, dp=2, zero_stage=2, model=MILLIONS, name="millions"),
        # Tensor-parallel products in parts: sequences of a micro-batch (2), and tokens of a share where parts are more.
        Layout(tp=4, parts=2),
        Layout(tp=2, parts=3, pp=2, schedule="zb_h1"),
        Layout(tp=4, sp=True, parts=3, recompute="full"),
        Layout(tp=2, sp=True, parts=3, pp=2, schedule="zb_h1", recompute="selective"),
        Layout(tp=2, sp=True, parts=3, cp=2, cp_attention="ring", model=LLAMA, name="llama"),
        Layout(tp=2, sp=True, parts=3, pp=2, schedule="zb_h1", model=BERT, name="bert"),
        Layout(tp=2, sp=True, parts=4, pp=2, dtype="bf16"),
        # Recomputation, the loss's extra term, dropout.
        Layout(tp=2, sp=True, pp=2, recompute="selective"),
        Layout(pp=4, schedule="zb_h1", recompute="full"),
        Layout(tp=2, pp=2, z_loss=1e-2),
        Layout(tp=2, sp=True, pp=2, model=DROPOUT, name="dropout"),
        Layout(cp=2, pp=2, cp_attention="ring", recompute="full", model=DROPOUT, name="dropout"),
        # Other architectures.
        Layout(tp=2, pp=2, model=LLAMA, name="llama"),
        Layout(tp=4, sp=True, model=MQA, name="mqa"),
        Layout(cp=2, tp=2, model=MQA, name="mqa"),
        Layout(tp=2, sp=True, pp=2, model=NEOX, name="neox"),
        Layout(tp=2, sp=True, pp=2, schedule="zb_h1", model=BERT, name="bert"),
        Layout(tp=2, pp=2, model=BERT, name="bert"),
        Layout(tp=2, dp=2, zero_stage=2, dtype="bf16", model=BERT, name="bert"),
        Layout(cp=2, pp=2, cp_attention="ring", model=replace(BERT, tie_embeddings=False), name="bert untied"),
        # Heads apart from the hidden size, at tp {1, 2, 4} x pp {1, 2}; the last is below, on eight ranks.
        Layout(pp=2, dp=2, schedule="zb_h1", model=QWEN3, name="qwen3"),
        Layout(tp=2, dp=2, zero_stage=2, model=QWEN3, name="qwen3"),
        Layout(tp=2, sp=True, pp=2, recompute="selective", model=QWEN3, name="qwen3"),
        Layout(tp=4, sp=True, model=QWEN3, name="qwen3"),
        Layout(cp=2, tp=2, cp_attention="ring", model=QWEN3, name="qwen3"),
        # Biases per projection, and positions that begin at another row.
        Layout(tp=2, sp=True, pp=2, schedule="zb_h1", model=BIASES, name="biases"),
        Layout(tp=4, model=BIASES, name="biases"),
        Layout(tp=2, sp=True, pp=2, model=ROBERTA, name="roberta"),
        # Attention and positions that restart at each document of a packed row.
        Layout(tp=2, sp=True, pp=2, recompute="selective", reset_at_documents=True),
        Layout(cp=2, pp=2, reset_at_documents=True, model=LLAMA, name="llama"),
        Layout(tp=2, dp=2, dtype="bf16", reset_at_documents=True),
        Layout(tp=2, pp=2, reset_at_documents=True, model=BERT, name="bert"),
        Layout(tp=2, cp=2, cp_attention="ring", model=GPT3, name="banded"),
        # 16-bit formats, against one process of the same format.
        Layout(tp=2, pp=2, dtype="bf16"),
        Layout(pp=2, dp=2, dtype="bf16"),
        Layout(tp=2, sp=True, pp=2, schedule="zb_h1", dtype="bf16"),
        Layout(dp=4, dtype="bf16", zero_stage=2),
        Layout(cp=2, dp=2, cp_attention="ring", dtype="bf16"),
        Layout(tp=2, pp=2, dtype="fp16"),
        # The collectives of NCCL: reduce-scatters.
        Layout(dp=4, transport="nccl"),
        Layout(dp=4, zero_stage=2, transport="nccl"),
        Layout(dp=4, transport="nccl", model=MILLIONS, name="millions"),
        Layout(tp=2, sp=True, dp=2, transport="nccl"),
        Layout(pp=2, dp=2, schedule="zb_h1", transport="nccl"),
        Layout(pp=2, v=2, dp=2, schedule="interleaved_1f1b", transport="nccl"),
        Layout(pp=2, dp=2, transport="nccl", model=LLAMA, name="llama"),
        Layout(dp=2, cp=2, dtype="bf16", zero_stage=2, transport="nccl"),
        # Messages of 16 bits.
        Layout(dp=4, dtype="bf16", reduce_dtype="bf16"),
        Layout(dp=4, dtype="bf16", zero_stage=2, reduce_dtype="bf16", transport="nccl"),
        Layout(tp=2, sp=True, dp=2, dtype="bf16", reduce_dtype="bf16", model=BERT, name="bert"),
        # Weight gradients that add to the fp32 sum themselves.
        Layout(tp=2, sp=True, dp=2, zero_stage=2, fusion=True),
        Layout(tp=2, sp=True, pp=2, schedule="zb_h1", fusion=True),
        Layout(pp=2, v=2, dp=2, schedule="interleaved_1f1b", fusion=True, transport="nccl"),
        Layout(tp=2, sp=True, pp=2, schedule="zb_h1", fusion=True, model=BERT, name="bert"),
        Layout(tp=2, pp=2, dtype="fp16", fusion=True),
    ],
    8: [
        Layout(tp=2, pp=2, dp=2),
        Layout(tp=2, sp=True, pp=2, cp=2),
        Layout(tp=4, sp=True, pp=2, model=QWEN3, name="qwen3"),
        Layout(tp=2, sp=True, pp=2, v=2, dp=2, schedule="interleaved_1f1b", dtype="bf16"),
        Layout(pp=2, dp=4, dtype="bf16"),
        Layout(tp=2, pp=2, dp=2, transport="nccl"),
        Layout(tp=2, sp=True, pp=2, v=2, dp=2, schedule="interleaved_1f1b", dtype="bf16", transport="nccl"),
        Layout(tp=2, pp=2, dp=2, dtype="bf16", reduce_dtype="bf16", fusion=True),
    ],
}
CASES = [(world, index) for world, layouts in WORLDS.items() for index in range(len(layouts))]


PER_SPAWN = 10
"""Layouts that one start of ranks trains on: so few that a slow machine has the time."""


@cache
def traces(world_size: int, spawn: int) -> list[list[Trace]]:
    """By layout, then by rank."""
    layouts = WORLDS[world_size][spawn * PER_SPAWN : (spawn + 1) * PER_SPAWN]
    return run_ranks_on_each(world_size, train_on_ranks, layouts, timeout_seconds=280)


@cache
def expected(layout: Layout) -> Trace:
    return train_plainly(layout.config())


@pytest.mark.parametrize(("world_size", "index"), CASES, ids=[str(WORLDS[w][i]) for w, i in CASES])
def test_layout_trains_like_one_process(world_size: int, index: int) -> None:
    layout, per_rank = WORLDS[world_size][index], traces(world_size, index // PER_SPAWN)[index % PER_SPAWN]
    want, tolerance = expected(layout.reference), 1e-5 if layout.dtype == "fp32" else 5e-3
    assert min(want.grad_norms) > CLIP, "clipping is active in every step"
    found = differences(want, per_rank)
    assert found.missing == 0, "together the ranks hold every element"
    assert found.initial_weights == 0.0, "initial weights are bit-identical"
    assert found.copies == 0.0, "copies of an element, and what ranks report, agree to the last bit"
    assert found.loss < tolerance
    assert found.grad_norm < tolerance
    if layout.model is MILLIONS:
        for trace in per_rank:
            assert trace.grad_norms == pytest.approx(want.grad_norms, rel=1e-6)
            assert trace.losses == pytest.approx(want.losses, rel=1e-6)
    assert found.untrained == ()
    if layout.dtype == "fp32":
        assert found.weights < 1e-5
