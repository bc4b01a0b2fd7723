from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from megalm.config.schema import Model
from megalm.models.counts import (
    flops_per_token,
    head_flops_per_token,
    layer_flops_per_token,
    parameter_count,
)

SMALL = Model(num_layers=3, hidden_size=12, num_heads=4, vocab_size=50, sequence_length=7)
GPT3_175B = Model(num_layers=96, hidden_size=12288, num_heads=96, vocab_size=50257, sequence_length=2048)


def shapes(model: Model) -> list[tuple[int, ...]]:
    """Every parameter of a model spelt out, independently of the closed form."""
    hidden, ffn, kv = model.hidden_size, model.ffn_size, model.kv_heads * (model.hidden_size // model.num_heads)
    vocab = model.vocab_size
    assert vocab is not None
    norm: list[tuple[int, ...]] = [(hidden,)]
    if model.norm == "layernorm" and model.bias:
        norm.append((hidden,))
    linears = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), (ffn, hidden), (hidden, ffn)]
    if model.activation == "swiglu":
        linears.append((ffn, hidden))
    layer = [*linears, *norm, *norm]
    if model.bias:
        layer += [(rows,) for rows, _ in linears]
    ends: list[tuple[int, ...]] = [(vocab, hidden), *norm]
    if model.position == "learned":
        ends.append((model.sequence_length, hidden))
    if not model.tie_embeddings:
        ends.append((vocab, hidden))
    return layer * model.num_layers + ends


def numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


VARIANTS = {
    "position": ("learned", "rotary"),
    "norm": ("layernorm", "rmsnorm"),
    "activation": ("gelu", "swiglu"),
    "bias": (True, False),
    "tie_embeddings": (True, False),
    "num_kv_heads": (None, 1, 2),
}


@pytest.mark.parametrize("values", list(itertools.product(*VARIANTS.values())), ids=str)
def test_counts_are_the_sum_of_the_parts(values: tuple[Any, ...]) -> None:
    model = replace(SMALL, **dict(zip(VARIANTS, values, strict=True)))
    assert parameter_count(model).total == sum(map(numel, shapes(model)))


def test_counts_are_those_of_the_model_that_trains() -> None:
    from megalm.models.transformer import build_full_model

    for values in itertools.product(*VARIANTS.values()):
        model = replace(SMALL, hidden_size=16, **dict(zip(VARIANTS, values, strict=True)))
        built = build_full_model(model, 50)
        assert parameter_count(model).total == sum(parameter.numel() for parameter in built.parameters()), model


@pytest.mark.parametrize(
    "changes",
    [
        {"residual": "post_norm", "token_types": 2, "embedding_norm": True, "activation": "gelu_erf"},
        {"residual": "parallel", "position": "rotary", "rotary_fraction": 0.5},
        {"qk_norm": True, "bias": False, "qkv_bias": True, "num_kv_heads": 1},
        {"qk_norm": True, "qkv_bias": False, "norm": "rmsnorm", "tie_embeddings": False},
        {"head_dim": 6, "qk_norm": True, "num_kv_heads": 1, "bias": False, "norm": "rmsnorm"},
        {"head_dim": 10, "projection_bias": False, "norm_bias": False},
        {"bias": False, "projection_bias": True, "norm_bias": True},
        {"position_offset": 2, "token_types": 1, "residual": "post_norm", "head": "masked_lm", "causal": False},
    ],
    ids=["bert", "neox", "qwen", "qk_norm", "qwen3", "wide heads", "few biases", "roberta"],
)
def test_counts_of_other_families_are_those_of_the_model_that_trains(changes: dict[str, Any]) -> None:
    from megalm.models.transformer import build_full_model

    model = replace(SMALL, hidden_size=16, num_heads=2, **changes)
    built = build_full_model(model, 50)
    assert parameter_count(model).total == sum(parameter.numel() for parameter in built.parameters())


def test_a_banded_layer_counts_the_keys_of_its_window() -> None:
    dense = flops_per_token(GPT3_175B)
    banded = flops_per_token(replace(GPT3_175B, attention_windows=(0, 128)))
    assert dense - banded == 48 * 12 * 12288 * (2048 - 128)
    assert flops_per_token(replace(GPT3_175B, attention_windows=(4096,))) == dense


def test_attention_counts_its_heads_whatever_the_hidden_size() -> None:
    plain, wide = SMALL, replace(SMALL, head_dim=6)  # 4 heads of 6 on a hidden size of 12
    more = 6 * (2 * 12 * 12 + 2 * 12 * 12) + 12 * 12 * 7  # query and projection, key and value; scores and values
    assert layer_flops_per_token(wide) - layer_flops_per_token(plain) == more
    assert layer_flops_per_token(replace(SMALL, head_dim=3)) == layer_flops_per_token(plain)


def test_gpt3_175b_has_the_parameters_that_the_paper_says() -> None:
    assert parameter_count(GPT3_175B).total == 174_604_259_328
    assert parameter_count(GPT3_175B).total == pytest.approx(174.6e9, rel=0.005)


def test_gpt2_small_has_the_parameters_of_its_release() -> None:
    gpt2 = Model(num_layers=12, hidden_size=768, num_heads=12, vocab_size=50257, sequence_length=1024)
    assert parameter_count(gpt2).total == 124_439_808


def test_flops_are_equation_3_of_narayanan_without_recomputation() -> None:
    layers, hidden, sequence, vocab = 96, 12288, 2048, 50257
    formula = 72 * layers * hidden**2 * (1 + sequence / (6 * hidden) + vocab / (12 * layers * hidden))
    assert flops_per_token(GPT3_175B) == pytest.approx(formula, rel=1e-12)
    assert flops_per_token(GPT3_175B) == layers * layer_flops_per_token(GPT3_175B) + head_flops_per_token(GPT3_175B)


def test_flops_are_six_per_parameter_and_attention_as_in_palm() -> None:
    model = replace(SMALL, bias=False, norm="rmsnorm", position="rotary", activation="swiglu", num_kv_heads=2)
    count = parameter_count(model)
    matmul_weights = count.total - count.norm  # tied: the embedding is the output projection
    assert flops_per_token(model) == 6 * matmul_weights + 12 * 3 * 12 * 7
    assert flops_per_token(replace(model, tie_embeddings=False)) == flops_per_token(model)


def test_the_datas_vocabulary_is_used_where_the_model_names_none() -> None:
    unnamed = replace(SMALL, vocab_size=None)
    assert parameter_count(unnamed, 50) == parameter_count(SMALL) == parameter_count(SMALL, 9)
    assert flops_per_token(unnamed, 50) == flops_per_token(SMALL)
    with pytest.raises(ValueError, match="vocabulary"):
        parameter_count(unnamed)


def test_swiglu_width_is_a_multiple_of_64() -> None:
    wide = Model(num_layers=1, hidden_size=4096, num_heads=32, sequence_length=8, activation="swiglu")
    assert wide.ffn_size == 10944
    assert replace(SMALL, activation="swiglu").ffn_size == 64
    assert replace(SMALL, ffn_hidden_size=5).ffn_size == 5
