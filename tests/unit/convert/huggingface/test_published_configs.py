"""What models that people fine-tune say in their ``config.json``: read to the parameters that they were published with.

Fields that do not change the architecture are left out. Totals are those of the weights, tied ones counted once; of an
encoder with its head for masked words. The library, building the same config without memory, counts the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalm.config.schema import Model
from megalm.convert.huggingface.families import family_of
from megalm.convert.huggingface.names import read_architecture
from megalm.convert.weights import full_shapes
from megalm.models.counts import parameter_count

QWEN25 = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "use_mrope": False,
}
QWEN3 = {
    "model_type": "qwen3",
    "attention_bias": False,
    "hidden_size": 1024,
    "head_dim": 128,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "sliding_window": None,
    "use_sliding_window": False,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
MISTRAL = {
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
NEMO = MISTRAL | {
    "hidden_size": 5120,
    "head_dim": 128,
    "num_hidden_layers": 40,
    "vocab_size": 131072,
    "max_position_embeddings": 1024000,
    "sliding_window": None,
    "rope_theta": 1000000.0,
}
LLAMA32 = {
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_size": 2048,
    "head_dim": 64,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "tie_word_embeddings": True,
}
PHI3 = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "sliding_window": 2047,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "pad_token_id": 32000,
}
STARCODER2 = {
    "model_type": "starcoder2",
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "max_position_embeddings": 16384,
    "sliding_window": 4096,
    "norm_epsilon": 1e-5,
    "norm_type": "layer_norm",
    "rope_theta": 999999.4420358813,
    "hidden_act": "gelu_pytorch_tanh",
    "mlp_type": "default",
    "use_bias": True,
    "attention_dropout": 0.1,
    "residual_dropout": 0.1,
    "embedding_dropout": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ROBERTA = {
    "model_type": "roberta",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
DISTILBERT = {
    "model_type": "distilbert",
    "dim": 768,
    "hidden_dim": 3072,
    "n_layers": 6,
    "n_heads": 12,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "activation": "gelu",
    "sinusoidal_pos_embds": False,
    "tie_weights_": True,
    "pad_token_id": 0,
}
PUBLISHED: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "Qwen2.5-0.5B": (QWEN25, 494_032_768, {"qkv_bias": True, "bias": False, "attention_windows": (0,)}),
    "Qwen2.5-7B": (
        QWEN25
        | {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "tie_word_embeddings": False,
        },
        7_615_616_512,
        {"head_dim": None},
    ),
    "Qwen3-0.6B": (QWEN3, 596_049_920, {"head_dim": 128, "qk_norm": True, "attention_size": 2048}),
    "Qwen3-32B": (
        QWEN3
        | {
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
            "tie_word_embeddings": False,
        },
        32_762_123_264,
        {"head_dim": 128, "attention_size": 8192},
    ),
    "Mistral-7B-v0.1": (MISTRAL, 7_241_732_096, {"attention_windows": (4096,), "head_dim": None}),
    "Mistral-7B-v0.3": (
        MISTRAL | {"vocab_size": 32768, "sliding_window": None, "rope_theta": 1000000.0},
        7_248_023_552,
        {"attention_windows": (0,)},
    ),
    "Mistral-Nemo": (NEMO, 12_247_782_400, {"head_dim": 128, "attention_size": 4096, "attention_windows": (0,)}),
    "Llama-3.2-1B": (LLAMA32, 1_235_814_400, {"head_dim": None, "rotary_scaling": "llama3"}),
    "Phi-3-mini-4k": (PHI3, 3_821_079_552, {"attention_windows": (2047,), "rotary_scaling": "none"}),
    "StarCoder2-3B": (STARCODER2, 3_030_371_328, {"attention_windows": (4096,), "norm": "layernorm", "dropout": 0.1}),
    "RoBERTa base": (ROBERTA, 124_697_433, {"sequence_length": 512, "position_offset": 2, "token_types": 1}),
    "XLM-R base": (
        ROBERTA | {"model_type": "xlm-roberta", "vocab_size": 250002},
        278_295_186,
        {"sequence_length": 512, "position_offset": 2},
    ),
    "DistilBERT base uncased": (DISTILBERT, 66_985_530, {"token_types": 0, "norm_epsilon": 1e-12}),
}


def _read(values: dict[str, Any], folder: Path) -> Model:
    (folder / "config.json").write_text(json.dumps(values))
    return read_architecture(folder / "config.json").model


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_to_its_parameters(name: str, tmp_path: Path) -> None:
    values, parameters, fields = PUBLISHED[name]
    model = _read(values, tmp_path)
    assert parameter_count(model).total == parameters
    assert {field: getattr(model, field) for field in fields} == fields
    counted = 0
    for shape in full_shapes(model).values():
        counted += shape[0] * (shape[1] if len(shape) > 1 else 1)
    assert counted == parameters
    # What is written again for the same weights is the same model.
    family = family_of(model, values["model_type"])
    assert family.model_type == values["model_type"]
    assert (
        _read({"model_type": family.model_type, **family.config_from_model(model), **family.fixed_ids(model)}, tmp_path)
        == model
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_library_counts_the_same(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    values, parameters, _ = PUBLISHED[name]
    config = transformers.AutoConfig.for_model(**values)
    kind = (
        transformers.AutoModelForMaskedLM if values["model_type"] in ("roberta", "xlm-roberta", "distilbert") else None
    )
    with torch.device("meta"):
        built = (kind or transformers.AutoModelForCausalLM).from_config(config)
    assert sum(parameter.numel() for parameter in built.parameters()) == parameters
