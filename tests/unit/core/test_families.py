"""Other families' choices against implementations written out here, one head and one token pair at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from megalm.config.schema import Model
from megalm.core.attention.attend import AttentionCore
from megalm.core.place import Place
from megalm.models.transformer import build_full_model
from tests.families import bert_of

BASE = Model(num_layers=3, hidden_size=48, num_heads=4, sequence_length=20, vocab_size=67)
NEOX = replace(BASE, residual="parallel", position="rotary", rotary_fraction=0.5, activation="gelu_erf", qk_norm=True)
BERT = bert_of(BASE)
GPT3 = replace(BASE, attention_windows=(0, 4))
QWEN = replace(BASE, bias=False, qkv_bias=True, norm="rmsnorm", num_kv_heads=2)
QWEN3 = replace(QWEN, qkv_bias=None, head_dim=20, qk_norm=True, position="rotary", norm_epsilon=0.1)
ROBERTA = replace(BERT, position_offset=2, token_types=1)
BIASES = replace(BASE, bias=False, qkv_bias=True, projection_bias=True, norm_bias=True, head_dim=4)
"""Biases on all but the MLP, on heads that are narrower together than the residual stream."""

NO_ATTENTION_BIASES = replace(BASE, qkv_bias=False, projection_bias=False, norm_bias=False)


def norm(x: torch.Tensor, w: dict[str, torch.Tensor], name: str, model: Model) -> torch.Tensor:
    if model.norm == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + model.norm_epsilon).sqrt() * w[f"{name}.weight"]
    return F.layer_norm(x, (x.shape[-1],), w[f"{name}.weight"], w.get(f"{name}.bias"), model.norm_epsilon)


def linear(x: torch.Tensor, w: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def turn(x: torch.Tensor, model: Model) -> torch.Tensor:
    """Complex-number rotation of the first share of a head's elements."""
    if model.position != "rotary":
        return x
    size = int(model.head_size * model.rotary_fraction)
    frequency = model.rotary_base ** (-torch.arange(0, size, 2) / size)
    angle = torch.polar(torch.ones(()), torch.outer(torch.arange(x.shape[1]).float(), frequency))
    half = size // 2
    turned = torch.complex(x[..., :half], x[..., half:size]) * angle
    return torch.cat((turned.real, turned.imag, x[..., size:]), -1)


def attention(x: torch.Tensor, w: dict[str, torch.Tensor], model: Model, layer: int) -> torch.Tensor:
    d, group = model.head_size, model.num_heads // model.kv_heads
    q, k, v = linear(x, w, "attention.qkv").split((model.num_heads * d, model.kv_heads * d, model.kv_heads * d), -1)
    window = model.attention_window(layer) or x.shape[1]
    hidden = torch.tensor([[not 0 <= i - j < window for j in range(x.shape[1])] for i in range(x.shape[1])])
    hidden &= model.causal  # BERT sees everything
    heads = []
    for head in range(model.num_heads):
        s, t = slice(head * d, (head + 1) * d), slice(head // group * d, (head // group + 1) * d)
        query, key = q[..., s], k[..., t]
        if model.qk_norm:
            query, key = (
                h / (h.square().mean(-1, keepdim=True) + model.norm_epsilon).sqrt() * w[f"attention.{name}.weight"]
                for h, name in ((query, "query_norm"), (key, "key_norm"))
            )
        scores = turn(query, model) @ turn(key, model).transpose(1, 2) / math.sqrt(d)
        heads.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[..., t])
    return linear(torch.cat(heads, -1), w, "attention.projection")


def mlp(x: torch.Tensor, w: dict[str, torch.Tensor], model: Model) -> torch.Tensor:
    exact = model.activation == "gelu_erf"
    return linear(F.gelu(linear(x, w, "mlp.up"), approximate="none" if exact else "tanh"), w, "mlp.down")


def logits(weights: dict[str, torch.Tensor], tokens: torch.Tensor, model: Model) -> torch.Tensor:
    x = weights["embedding.weight"][tokens]
    if model.position == "learned":
        x = x + weights["position.weight"][model.position_offset :][: tokens.shape[1]]
    if model.token_types:
        x = x + weights["token_type.weight"][0]
    if model.embedding_norm:
        x = norm(x, weights, "embedding_norm", model)
    for layer in range(model.num_layers):
        w = {k.removeprefix(f"blocks.{layer}."): v for k, v in weights.items() if k.startswith(f"blocks.{layer}.")}
        if model.residual == "pre_norm":
            x = x + attention(norm(x, w, "attention_norm", model), w, model, layer)
            x = x + mlp(norm(x, w, "mlp_norm", model), w, model)
        elif model.residual == "post_norm":
            x = norm(x + attention(x, w, model, layer), w, "attention_norm", model)
            x = norm(x + mlp(x, w, model), w, "mlp_norm", model)
        else:
            from_attention = attention(norm(x, w, "attention_norm", model), w, model, layer)
            x = x + from_attention + mlp(norm(x, w, "mlp_norm", model), w, model)
    if model.residual != "post_norm":
        x = norm(x, weights, "final_norm", model)
    if model.head == "masked_lm":
        x = F.gelu(x @ weights["masked_lm.weight"].T + weights["masked_lm.dense_bias"])
        return norm(x, weights, "masked_lm.norm", model) @ weights["embedding.weight"].T + weights["masked_lm.bias"]
    return x @ weights["embedding.weight"].T


@pytest.mark.parametrize(
    "model",
    [NEOX, BERT, GPT3, QWEN, QWEN3, ROBERTA, BIASES, NO_ATTENTION_BIASES],
    ids=["neox", "bert", "gpt3 banded", "qwen2", "qwen3", "roberta", "biases", "no attention biases"],
)
def test_logits_equal_an_independent_implementation(model: Model) -> None:
    ours = build_full_model(model, 67, seed=3)
    with torch.no_grad():
        for index, parameter in enumerate(ours.parameters()):  # norms and biases away from one and zero
            generator = torch.Generator().manual_seed(index)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        tokens = torch.randint(0, 67, (2, 17), generator=torch.Generator().manual_seed(2))
        weights = {t.name: t.tensor for t in ours.tensors()}
        assert _has_the_biases(set(weights), model)
        want = logits(weights, tokens, model)
        torch.testing.assert_close(ours(tokens), want, atol=3e-5, rtol=1e-5)


def _has_the_biases(names: set[str], model: Model) -> bool:
    """Whether exactly the layers that should have a bias have one: the computation above takes those that are there."""
    wanted = {
        "attention.qkv": model.bias if model.qkv_bias is None else model.qkv_bias,
        "attention.projection": model.bias if model.projection_bias is None else model.projection_bias,
        "mlp.down": model.bias,
        "attention_norm": model.norm == "layernorm" and (model.bias if model.norm_bias is None else model.norm_bias),
    }
    return all((f"blocks.0.{layer}.bias" in names) == has for layer, has in wanted.items())


def core(**changes) -> AttentionCore:
    settings = {"causal": True, "window": 0, "dropout": 0.0, "seed": 1, "layer": 0}
    return AttentionCore(**{**settings, **changes})


def test_a_bidirectional_core_sees_later_tokens() -> None:
    q, k, v = torch.randn(3, 1, 2, 8, 16, generator=torch.Generator().manual_seed(0)).unbind()
    heads = torch.arange(2)
    want = (q @ k.mT / 4.0).softmax(-1) @ v
    torch.testing.assert_close(core(causal=False)(q, k, v, heads, None), want, atol=1e-6, rtol=1e-5)
    sees = core(causal=False, window=2).sees(torch.arange(4), torch.arange(4))
    assert sees.tolist() == [[abs(i - j) < 2 for j in range(4)] for i in range(4)]


def test_attention_dropout_drops_probabilities_and_scales_the_rest() -> None:
    q, k = torch.randn(2, 1, 2, 8, 16, generator=torch.Generator().manual_seed(0)).unbind()
    heads, samples = torch.arange(2), torch.tensor([7])
    dropping = core(dropout=0.5)
    # With the identity for values the output is the probabilities themselves.
    identity = torch.eye(8).expand(1, 2, 8, 8)
    dropped = dropping(q, k, identity, heads, samples)
    whole = core()(q, k, identity, heads, None)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2.0 * whole[kept])
    share = float(kept.float().sum() / (whole != 0).float().sum())
    assert 0.3 < share < 0.7
    assert torch.equal(dropped, dropping(q, k, identity, heads, samples)), "it replays"
    torch.testing.assert_close(dropping.eval()(q, k, identity, heads, samples), whole)


def test_grouped_heads_with_dropout_use_their_own_keys() -> None:
    q = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    k, v = torch.randn(2, 1, 2, 6, 8, generator=torch.Generator().manual_seed(1)).unbind()
    samples = torch.tensor([0])
    grouped = core(dropout=0.3)(q, k, v, torch.arange(4), samples)
    alone = core(dropout=0.3)(q[:, 2:], k[:, 1:], v[:, 1:], torch.arange(2, 4), samples)
    torch.testing.assert_close(grouped[:, 2:], alone)


def test_dropout_is_off_without_samples_and_in_evaluation() -> None:
    model = replace(BASE, dropout=0.5, attention_dropout=0.5)
    gpt = build_full_model(model, 67)
    tokens = torch.randint(0, 67, (2, 8))
    place = Place(torch.arange(8), torch.arange(2))
    plain = build_full_model(BASE, 67)(tokens)
    torch.testing.assert_close(gpt.eval()(tokens, place), plain)
    torch.testing.assert_close(gpt.train()(tokens), plain)
    assert not torch.allclose(gpt(tokens, place), plain)
    assert not torch.allclose(gpt(tokens, place), gpt(tokens, Place(place.positions, place.samples + 2)))
