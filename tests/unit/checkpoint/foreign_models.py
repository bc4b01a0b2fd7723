"""Small models of each architecture that has a life outside megalm, with random weights, as sources of conversions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from megalm.config.schema import Model
from megalm.convert.convert import Report, Request, convert
from megalm.convert.run import write_run
from megalm.convert.transfer import Transfer
from megalm.convert.weights import SourceInfo, WeightSource, full_shapes
from megalm.data.tokenization.tokenizer import Tokenizer

GPT2 = Model(num_layers=2, hidden_size=24, num_heads=4, ffn_hidden_size=40, vocab_size=101, sequence_length=32)
NEOX = replace(
    GPT2, hidden_size=32, position="rotary", rotary_fraction=0.25, residual="parallel", activation="gelu_erf"
)
LLAMA = replace(
    GPT2,
    hidden_size=32,
    num_heads=8,
    num_kv_heads=4,
    position="rotary",
    norm="rmsnorm",
    norm_epsilon=1e-6,
    activation="swiglu",
    bias=False,
    tie_embeddings=False,
)
BERT = replace(
    GPT2,
    causal=False,
    residual="post_norm",
    token_types=2,
    embedding_norm=True,
    activation="gelu_erf",
    norm_epsilon=1e-12,
    head="masked_lm",
)
QWEN2 = replace(LLAMA, qkv_bias=True, attention_windows=(0, 9))
QWEN3 = replace(LLAMA, qk_norm=True, head_dim=6, num_kv_heads=2)
MISTRAL = replace(LLAMA, attention_windows=(7,), num_kv_heads=2)
PHI3 = replace(LLAMA, rotary_fraction=0.5, dropout=0.1, attention_windows=(5,))
STARCODER2 = replace(
    LLAMA, norm="layernorm", activation="gelu", bias=True, tie_embeddings=True, attention_windows=(11,), dropout=0.1
)
ROBERTA = replace(BERT, token_types=1, position_offset=2, norm_epsilon=1e-5)
DISTILBERT = replace(BERT, token_types=0)
MODELS = {
    "gpt2": GPT2,
    "gpt2-untied": replace(GPT2, tie_embeddings=False, activation="gelu_erf"),
    "neox": replace(NEOX, tie_embeddings=False),
    "neox-sequential-tied": replace(NEOX, residual="pre_norm", rotary_fraction=0.5, activation="gelu"),
    "llama": LLAMA,
    "llama-tied-2kv": replace(LLAMA, tie_embeddings=True, num_kv_heads=2),
    "llama-biases": replace(LLAMA, bias=True),
    "bert": BERT,
    "bert-untied": replace(BERT, tie_embeddings=False, activation="gelu"),
    "neox-few-biases": replace(NEOX, qkv_bias=False, projection_bias=False, tie_embeddings=False),
    "llama-attention-bias": replace(LLAMA, qkv_bias=True, projection_bias=True),
    "llama-mlp-bias": replace(LLAMA, bias=True, qkv_bias=False, projection_bias=False, head_dim=6),
    "mistral": MISTRAL,
    "mistral-nemo": replace(MISTRAL, head_dim=6),
    "qwen2": QWEN2,
    "qwen2-tied-full": replace(QWEN2, tie_embeddings=True, attention_windows=(0,)),
    "qwen3": QWEN3,
    "qwen3-tied-windows": replace(QWEN3, tie_embeddings=True, attention_windows=(6, 0), head_dim=2),
    "qwen3-biases": replace(QWEN3, qkv_bias=True, projection_bias=True),
    "phi3": PHI3,
    "starcoder2": STARCODER2,
    "starcoder2-no-biases": replace(STARCODER2, bias=False, norm_bias=True, activation="gelu_erf", head_dim=6),
    "roberta": ROBERTA,
    "roberta-untied-padding-0": replace(ROBERTA, tie_embeddings=False, position_offset=1, token_types=2),
    "distilbert": DISTILBERT,
    "distilbert-untied": replace(DISTILBERT, tie_embeddings=False, activation="gelu"),
}
"""By what a test calls them."""


class RandomSource(WeightSource):
    """A model in memory, its weights far from what initialisation gives: norms and biases are random too."""

    def __init__(self, model: Model, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.values: dict[str, Tensor] = {}
        for name, shape in full_shapes(model).items():
            tensor = torch.randn(shape, generator=generator) * 0.2
            self.values[name] = (tensor + 1.0 if "norm.weight" in name else tensor).to(dtype)
        self.info = SourceInfo(format="random", path=Path("nowhere"), model=model, dtype=dtype)

    def read(self, name: str) -> Tensor:
        return self.values[name]


def write_random_run(
    folder: Path,
    model: Model,
    *,
    tp: int = 1,
    pp: int = 1,
    dtype: torch.dtype = torch.float32,
    tokenizer: Tokenizer | None = None,
) -> RandomSource:
    """A run folder with a random model; returns the model."""
    source = RandomSource(model, dtype)
    folder.mkdir(parents=True)
    write_run(Transfer(source, dtype), folder, name=folder.name, tokenizer=tokenizer, tp=tp, pp=pp)
    return source


def convert_quietly(source_format: str, target_format: str, source: Path, target: Path, **options: object) -> Report:
    """A conversion that nobody watches."""
    return convert(Request(source_format, target_format, source, target, **options), Nobody())  # type: ignore[arg-type]


class Nobody:
    """Does not care how far a conversion has come."""

    def begin(self, *_: object):
        return lambda size: None
