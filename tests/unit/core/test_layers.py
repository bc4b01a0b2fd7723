"""The model against an independent implementation in plain torch, and the promises of its initialisation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from megalm.config.schema import Model, Objective, Optim
from megalm.core.parameters import Init
from megalm.core.random import initial_values
from megalm.engine.optimizer import make_adamw, parameter_groups
from megalm.mesh.groups import ParallelContext
from megalm.mesh.slices import ShardSpec, even_range, padded_range
from megalm.models.counts import parameter_count
from megalm.models.micro_batch import MicroBatch
from megalm.models.transformer import build_full_model
from megalm.objectives.clm import CausalLM

GPT2 = Model(num_layers=3, hidden_size=48, num_heads=4, sequence_length=20, vocab_size=67)
LLAMA = replace(
    GPT2, position="rotary", norm="rmsnorm", activation="swiglu", bias=False, num_kv_heads=2, tie_embeddings=False
)


def gpt2_logits(weights: dict[str, torch.Tensor], tokens: torch.Tensor, model: Model) -> torch.Tensor:
    """GPT-2 written out (Radford et al. 2019), one head at a time."""
    size, head_dim = model.hidden_size, model.hidden_size // model.num_heads
    x = weights["embedding.weight"][tokens] + weights["position.weight"][: tokens.shape[1]]
    causal = torch.full((tokens.shape[1], tokens.shape[1]), float("-inf")).triu(1)
    for layer in range(model.num_layers):
        w = {k.removeprefix(f"blocks.{layer}."): v for k, v in weights.items() if k.startswith(f"blocks.{layer}.")}
        h = F.layer_norm(x, (size,), w["attention_norm.weight"], w["attention_norm.bias"])
        q, k, v = (h @ w["attention.qkv.weight"].T + w["attention.qkv.bias"]).split(size, -1)
        heads = []
        for head in range(model.num_heads):
            s = slice(head * head_dim, (head + 1) * head_dim)
            scores = q[..., s] @ k[..., s].transpose(1, 2) / math.sqrt(head_dim) + causal
            heads.append(scores.softmax(-1) @ v[..., s])
        x = x + torch.cat(heads, -1) @ w["attention.projection.weight"].T + w["attention.projection.bias"]
        h = F.layer_norm(x, (size,), w["mlp_norm.weight"], w["mlp_norm.bias"])
        h = F.gelu(h @ w["mlp.up.weight"].T + w["mlp.up.bias"], approximate="tanh")
        x = x + h @ w["mlp.down.weight"].T + w["mlp.down.bias"]
    x = F.layer_norm(x, (size,), weights["final_norm.weight"], weights["final_norm.bias"])
    return x @ weights["embedding.weight"].T


def llama_logits(weights: dict[str, torch.Tensor], tokens: torch.Tensor, model: Model) -> torch.Tensor:
    """Llama's block written out: complex-number rotation, grouped queries, SwiGLU, RMSNorm."""
    size, head_dim = model.hidden_size, model.hidden_size // model.num_heads
    kv_size, group = model.kv_heads * head_dim, model.num_heads // model.kv_heads

    def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + model.norm_epsilon).sqrt() * weight

    frequency = model.rotary_base ** (-torch.arange(0, head_dim, 2) / head_dim)
    turn = torch.polar(torch.ones(()), torch.outer(torch.arange(tokens.shape[1]).float(), frequency))

    def rotate(x: torch.Tensor) -> torch.Tensor:
        half = head_dim // 2
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    x = weights["embedding.weight"][tokens]
    causal = torch.full((tokens.shape[1], tokens.shape[1]), float("-inf")).triu(1)
    for layer in range(model.num_layers):
        w = {k.removeprefix(f"blocks.{layer}."): v for k, v in weights.items() if k.startswith(f"blocks.{layer}.")}
        h = rms(x, w["attention_norm.weight"])
        q, k, v = (h @ w["attention.qkv.weight"].T).split((size, kv_size, kv_size), -1)
        heads = []
        for head in range(model.num_heads):
            s = slice(head * head_dim, (head + 1) * head_dim)
            t = slice(head // group * head_dim, (head // group + 1) * head_dim)
            scores = rotate(q[..., s]) @ rotate(k[..., t]).transpose(1, 2) / math.sqrt(head_dim) + causal
            heads.append(scores.softmax(-1) @ v[..., t])
        x = x + torch.cat(heads, -1) @ w["attention.projection.weight"].T
        gate, up = (rms(x, w["mlp_norm.weight"]) @ w["mlp.gate_up.weight"].T).chunk(2, -1)
        x = x + (F.silu(gate) * up) @ w["mlp.down.weight"].T
    return rms(x, weights["final_norm.weight"]) @ weights["head.weight"].T


@pytest.mark.parametrize(("model", "independent"), [(GPT2, gpt2_logits), (LLAMA, llama_logits)], ids=["gpt2", "llama"])
def test_logits_equal_an_independent_implementation(model, independent) -> None:
    ours = build_full_model(model, model.vocab_size, seed=3)
    with torch.no_grad():
        for parameter in ours.parameters():  # norms and biases away from one and zero, weights away from tiny
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        tokens = torch.randint(0, model.vocab_size, (2, 17), generator=torch.Generator().manual_seed(2))
        want = independent({t.name: t.tensor for t in ours.tensors()}, tokens, model)
        torch.testing.assert_close(ours(tokens), want, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("model", [GPT2, LLAMA, replace(LLAMA, bias=True, norm="layernorm", tie_embeddings=True)])
def test_parameter_count_is_what_is_built(model: Model) -> None:
    built = sum(p.numel() for p in build_full_model(model, model.vocab_size).parameters())
    assert built == parameter_count(model, model.vocab_size).total


def test_stage_loss_is_the_weighted_sum_of_token_losses() -> None:
    model = build_full_model(GPT2, 67, objective=CausalLM(Objective()), seed=1).train()
    tokens, labels = torch.randint(0, 67, (2, 2, 20))
    weight = torch.rand(2, 20)
    want = (F.cross_entropy(model(tokens).transpose(1, 2), labels, reduction="none") * weight).sum()
    torch.testing.assert_close(model.run(0, None, MicroBatch(tokens, labels, weight)), {"loss": want})


def test_residual_projections_start_scaled_by_depth() -> None:
    model = replace(GPT2, num_layers=8, hidden_size=128)
    weights = {p.name: p.parameter for p in build_full_model(model, 67).tensors()}
    for name, weight in weights.items():
        if weight.ndim == 1:
            assert torch.all(weight == (1.0 if "norm.weight" in name else 0.0)), name
            continue
        residual = name.endswith(("attention.projection.weight", "mlp.down.weight"))
        std = model.init_std / math.sqrt(2 * model.num_layers) if residual else model.init_std
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.06), name


def test_weight_decay_spares_norms_and_biases() -> None:
    declared = build_full_model(GPT2, 67).tensors()
    decays = {
        id(parameter): group["weight_decay"]
        for group in make_adamw(
            parameter_groups(declared, ParallelContext.single()), Optim(lr=1e-3, weight_decay=0.1)
        ).param_groups
        for parameter in group["params"]
    }
    assert len(decays) == len(declared)
    for p in declared:
        spared = "norm" in p.name or p.name.endswith("bias")
        assert decays[id(p.parameter)] == (0.0 if spared else 0.1), p.name


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 7])
def test_initial_values_do_not_depend_on_the_slices(dim: int, degree: int) -> None:
    shape = (150, 131)
    whole = initial_values("w", ShardSpec.along(shape, dim, ((0, shape[dim]),)), Init.normal(0.02), seed=5)
    assembled = torch.full(shape, float("nan"))
    for index in range(degree):
        valid, padding = padded_range(shape[dim], index, degree)
        shard = ShardSpec.along(shape, dim, (valid,), padding)
        local = initial_values("w", shard, Init.normal(0.02), seed=5)
        assert tuple(local.shape) == shard.local_shape
        assert torch.equal(shard.take(whole), local)
        shard.put(local, assembled)
    assert torch.equal(assembled, whole)


def test_initial_values_depend_on_seed_and_name() -> None:
    shard = ShardSpec.along((64, 64), 0, ((0, 64),))
    streams = [initial_values(name, shard, Init.normal(1.0), seed) for name in "ab" for seed in (1, 2)]
    for i, first in enumerate(streams):
        for second in streams[:i]:
            assert abs(float((first * second).mean())) < 0.08, "streams are uncorrelated"


def test_a_fused_shard_takes_and_puts_each_of_its_ranges() -> None:
    full = torch.arange(24.0).view(12, 2)
    shard = ShardSpec.along((12, 2), 0, ((2, 4), (9, 10)), padding=1)
    local = shard.take(full)
    assert local[:, 0].tolist() == [4.0, 6.0, 18.0, 0.0]
    back = torch.zeros_like(full)
    shard.put(local, back)
    assert torch.equal(back[[2, 3, 9]], full[[2, 3, 9]])
    assert not back[[0, 1, 4, 5, 6, 7, 8, 10, 11]].any()


def test_ranges_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="7 items do not split evenly over 2 ranks"):
        even_range(7, 0, 2)
    with pytest.raises(ValueError, match="range 0:5 is outside 0:4"):
        ShardSpec.along((4, 2), 0, ((0, 5),))
