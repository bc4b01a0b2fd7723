"""The architecture in the ``args`` of a Megatron-LM checkpoint, read and written.

Megatron-LM's arguments are many and change; those that this module does not name do not alter what a GPT computes. From
``megatron/training/arguments.py`` and ``megatron/core/transformer/transformer_config.py``. Megatron-DeepSpeed has other
names for a few, and one for which "off" is ``[1]``.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch

from megalm.config.schema import Model
from megalm.config.violation import format_value
from megalm.convert.huggingface.family import head_dim_from, unlike
from megalm.convert.megatron.names import padded_vocabulary
from megalm.convert.untrusted.json_fields import Fields

VOCABULARY_DIVISOR = 128
"""Megatron-LM's default of ``--make-vocab-size-divisible-by``."""

_LLAMA3_LENGTH, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0
"""What ``--use-rope-scaling`` means; Megatron-LM has no arguments for them."""

_NORMS = {"LayerNorm": "layernorm", "RMSNorm": "rmsnorm", "layernorm": "layernorm", "rmsnorm": "rmsnorm"}
_POSITIONS = {"learned_absolute": "learned", "rope": "rotary"}

_FOREIGN = {
    "num_experts": "megalm has no mixture of experts",
    "multi_latent_attention": "megalm has no multi-latent attention",
    "apply_layernorm_1p": "megalm's norms scale by the weight, not by 1 + weight",
    "layernorm_zero_centered_gamma": "megalm's norms scale by the weight, not by 1 + weight",
    "squared_relu": "megalm has no squared ReLU",
    "quick_geglu": "megalm has no GEGLU",
    "geglu": "megalm has no GEGLU",
    "glu_linear_offset": "megalm's SwiGLU has no offset",
    "activation_func_clamp_value": "megalm clamps no activations",
    "rotary_interleaved": "megalm rotates halves of a head, not neighbours",
    "no_rope_freq": "megalm rotates in all layers or none",
    "apply_residual_connection_post_layernorm": "megalm's residual stream passes beside the norms",
    "window_size": "megalm's windows are not converted",
    "softmax_scale": "megalm scales attention by the square root of the head's width",
    "qk_l2_norm": "megalm normalises queries and keys by RMSNorm only",
    "attention_output_gate": "megalm's attention has no gate",
    "mtp_num_layers": "megalm predicts one token",
    "is_hybrid_model": "megalm has Transformer layers only",
    "hybrid_layer_pattern": "megalm has Transformer layers only",
    "hybrid_override_pattern": "megalm has Transformer layers only",
    "linear_attention_freq": "megalm has no linear attention",
    "experimental_attention_variant": "megalm has softmax attention only",
    "heterogeneous_layers_config_path": "megalm's layers are all alike",
    "heterogeneous_layers_config_encoded_json": "megalm's layers are all alike",
    "use_mup": "megalm scales no activations by their width",
}
"""Arguments that change the model into one that megalm does not have, where they are set."""


def model_from_args(fields: Fields, *, legacy: bool) -> Model:
    """The architecture that ``args`` describe; what megalm does not have is noted in ``fields``.

    Args:
        fields: of ``args``.
        legacy: whether the model is from before Megatron-Core, whose activations are chosen by other arguments.
    """
    for name, why in _FOREIGN.items():
        if _is_set(fields.values.get(name)):
            fields.problem(name, f"{why}; convert a model without it")
    fields.must_be("softmax_type", "vanilla", "megalm has the plain softmax")
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    head_dim = head_dim_from(fields, "kv_channels", hidden=hidden, heads=heads)
    norm = fields.choice("normalization", _NORMS, "LayerNorm")
    bias = not fields.flag("disable_bias_linear", False) and fields.flag("add_bias_linear", True)
    qk_norm = fields.flag("qk_layernorm", False)
    if qk_norm and norm != "rmsnorm":
        fields.problem("qk_layernorm", "megalm normalises queries and keys by RMSNorm, Megatron as the model's norms")
    vocab = fields.count("padded_vocab_size")
    if fields.count("vocab_size", vocab) > vocab:
        fields.problem("vocab_size", f"larger than padded_vocab_size={vocab}")
    epsilon = "norm_epsilon" if "norm_epsilon" in fields else "layernorm_epsilon"
    length = "max_position_embeddings" if "max_position_embeddings" in fields else "seq_length"
    return Model(
        num_layers=fields.count("num_layers"),
        hidden_size=hidden,
        num_heads=heads,
        head_dim=head_dim,
        num_kv_heads=_kv_heads(fields, heads),
        ffn_hidden_size=fields.count("ffn_hidden_size", 4 * hidden),
        vocab_size=fields.count("vocab_size", vocab),
        sequence_length=fields.count(length),
        norm=norm,
        norm_epsilon=fields.number(epsilon, 1e-5),
        activation=_activation(fields, bias=bias, legacy=legacy),
        bias=bias,
        qkv_bias=True if not bias and fields.flag("add_qkv_bias", False) else None,
        norm_bias=True if norm == "layernorm" and not bias else None,
        qk_norm=qk_norm,
        tie_embeddings=not fields.flag("untie_embeddings_and_output_weights", False),
        dropout=fields.number("hidden_dropout", 0.1),
        attention_dropout=fields.number("attention_dropout", 0.1),
        init_std=fields.number("init_method_std", 0.02),
        **_position(fields, head_dim or max(hidden // heads, 1)),
    )


def _is_set(value: object) -> bool:
    """Whether an argument is other than off; of kinds that arguments never are, all are."""
    if value is None or isinstance(value, bool | int | float | str | list | tuple | dict):
        return bool(value) and value != [1]
    return True


def _kv_heads(fields: Fields, heads: int) -> int | None:
    if fields.flag("group_query_attention", False):
        return fields.count("num_query_groups", heads)
    return fields.count("num_key_value_heads") if "num_key_value_heads" in fields else None


def _activation(fields: Fields, *, bias: bool, legacy: bool) -> str:
    """Megatron-Core's GELU is the tanh approximation where it is fused with a bias, and exact elsewhere."""
    if fields.flag("swiglu", False):
        return "swiglu"
    if legacy and fields.flag("openai_gelu", False):
        return "gelu"
    if legacy and fields.flag("onnx_safe", False):
        return "gelu_erf"
    return "gelu" if bias and fields.flag("bias_gelu_fusion", True) else "gelu_erf"


def _position(fields: Fields, head_dim: int) -> dict[str, Any]:
    if fields.flag("use_rotary_position_embeddings", False) and "position_embedding_type" not in fields:
        position = "rotary"
    else:
        position = fields.choice("position_embedding_type", _POSITIONS, "learned_absolute")
    if position == "learned":
        fields.must_be("add_position_embedding", True, "megalm has learned or rotary positions")
        return {"position": position}
    fraction = int(head_dim * fields.number("rotary_percent", 1.0)) / head_dim
    base = fields.number("rotary_base" if "rotary_base" in fields else "rope_theta", 10000.0)
    found = {"position": position, "rotary_base": base, "rotary_fraction": fraction}
    interpolated = "rotary_seq_len_interpolation_factor" in fields
    if fields.flag("use_rope_scaling", False):
        if interpolated:
            fields.problem("rotary_seq_len_interpolation_factor", "megalm stretches rotary positions in one way only")
        return found | {
            "rotary_scaling": "llama3",
            "rotary_factor": fields.number("rope_scaling_factor", 8.0),
            "rotary_original_length": _LLAMA3_LENGTH,
            "rotary_low_frequency_factor": _LLAMA3_LOW,
            "rotary_high_frequency_factor": _LLAMA3_HIGH,
        }
    if interpolated:
        factor = fields.number("rotary_seq_len_interpolation_factor")
        return found | {"rotary_scaling": "linear", "rotary_factor": factor}
    return found


def reasons_against(model: Model) -> list[str]:
    """Why Megatron-LM cannot have this model, one phrase each; empty: it can."""
    reasons = unlike(
        model,
        causal=True,
        residual="pre_norm",
        head="linear",
        token_types=0,
        embedding_norm=False,
        position_offset=(0, model.position_offset) if model.position != "learned" else 0,
    )
    if any(model.attention_windows):
        reasons.append(f"model.attention_windows={list(model.attention_windows)}: windows are not converted")
    if model.norm == "layernorm" and not model.has_norm_bias:
        name = "bias" if model.norm_bias is None else "norm_bias"
        reasons.append(f"model.{name}=false beside model.norm=layernorm: its LayerNorm always has a bias")
    if model.activation == "gelu" and not model.bias:
        reasons.append("model.activation=gelu beside model.bias=false: its tanh GELU comes fused with a bias only")
    if model.bias and not model.has_qkv_bias:
        reasons.append("model.qkv_bias=false beside model.bias=true: its biases are on all linear layers")
    if model.has_projection_bias != model.bias:
        given, bias = format_value(model.projection_bias), format_value(model.bias)
        reasons.append(
            f"model.projection_bias={given} beside model.bias={bias}: its output projections have biases as its MLP has"
        )
    if model.qk_norm and model.norm != "rmsnorm":
        reasons.append(f"model.qk_norm=true beside model.norm={model.norm}: it normalises queries as the rest")
    if model.position == "rotary":
        reasons += _reasons_against_rotary(model)
    return reasons


def _reasons_against_rotary(model: Model) -> list[str]:
    if model.rotary_scaling == "yarn":
        return ["model.rotary_scaling=yarn: it has no arguments for it"]
    if model.rotary_scaling != "llama3":
        return []
    original = model.rotary_original_length or model.sequence_length / model.rotary_factor
    actual = (original, model.rotary_low_frequency_factor, model.rotary_high_frequency_factor)
    if actual == (_LLAMA3_LENGTH, _LLAMA3_LOW, _LLAMA3_HIGH):
        return []
    return [
        f"model.rotary_scaling=llama3 with an original length of {original:g} and factors {actual[1]:g} and "
        f"{actual[2]:g}: it has {_LLAMA3_LENGTH}, {_LLAMA3_LOW:g} and {_LLAMA3_HIGH:g} built in"
    ]


def layout_reasons(model: Model, tp: int, pp: int) -> list[str]:
    """Why Megatron-LM cannot split this model so, one phrase each, with what would be right."""
    reasons = []
    for name, value in (("num_heads", model.num_heads), ("ffn_hidden_size", model.ffn_size)):
        if value % tp:
            reasons.append(f"tp={tp} does not divide model.{name}={value}; choose a tp that does")
    if model.kv_heads % tp and tp % model.kv_heads:
        reasons.append(
            f"tp={tp} neither divides model.num_kv_heads={model.kv_heads} nor is a multiple of it; choose a tp that is "
            "either"
        )
    if model.num_layers % pp:
        fitting = [stages for stages in range(1, model.num_layers + 1) if model.num_layers % stages == 0]
        reasons.append(f"pp={pp} does not divide model.num_layers={model.num_layers}; choose one of {fitting}")
    return reasons


def args_from_model(model: Model, *, tp: int, pp: int, dtype: torch.dtype, transformer_impl: str) -> Namespace:
    """The ``args`` with which Megatron-LM builds, and checks, the model: what ``--use-checkpoint-args`` reads."""
    assert model.vocab_size is not None
    rotary = model.position == "rotary"
    return Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_heads,
        kv_channels=model.head_size,
        group_query_attention=model.kv_heads != model.num_heads,
        num_query_groups=model.kv_heads,
        seq_length=model.sequence_length,
        max_position_embeddings=model.sequence_length,
        position_embedding_type="rope" if rotary else "learned_absolute",
        add_position_embedding=True,
        use_rotary_position_embeddings=rotary,
        rotary_base=int(model.rotary_base) if model.rotary_base.is_integer() else model.rotary_base,
        rotary_percent=_rotary_percent(model),
        rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=model.rotary_factor if model.rotary_scaling == "linear" else None,
        use_rope_scaling=model.rotary_scaling == "llama3",
        rope_scaling_factor=model.rotary_factor if model.rotary_scaling == "llama3" else 8.0,
        normalization="LayerNorm" if model.norm == "layernorm" else "RMSNorm",
        norm_epsilon=model.norm_epsilon,
        layernorm_epsilon=model.norm_epsilon,
        apply_layernorm_1p=False,
        apply_residual_connection_post_layernorm=False,
        qk_layernorm=model.qk_norm,
        swiglu=model.activation == "swiglu",
        squared_relu=False,
        openai_gelu=False,
        onnx_safe=False,
        bias_gelu_fusion=model.activation == "gelu",
        bias_swiglu_fusion=model.activation == "swiglu",
        add_bias_linear=model.bias,
        add_qkv_bias=model.has_qkv_bias and not model.bias,
        untie_embeddings_and_output_weights=not model.tie_embeddings,
        hidden_dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        apply_query_key_layer_scaling=False,
        init_method_std=model.init_std,
        num_experts=None,
        multi_latent_attention=False,
        vocab_size=model.vocab_size,
        padded_vocab_size=padded_vocabulary(model.vocab_size, VOCABULARY_DIVISOR, tp),
        make_vocab_size_divisible_by=VOCABULARY_DIVISOR,
        tokenizer_type="HuggingFaceTokenizer",
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=None,
        num_layers_per_virtual_pipeline_stage=None,
        expert_model_parallel_size=1,
        transformer_impl=transformer_impl,
        ckpt_format="torch",
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        skipped_train_samples=0,
    )


def _rotary_percent(model: Model) -> float:
    """The share of a head that is rotated; Megatron-LM rounds its elements down, megalm to the nearest.

    30 of 44 elements are a share of which 44 make a little less than 30.
    """
    rotated = round(model.head_size * model.rotary_fraction)
    exact = int(model.head_size * model.rotary_fraction) == rotated
    return model.rotary_fraction if exact else (rotated + 0.5) / model.head_size
