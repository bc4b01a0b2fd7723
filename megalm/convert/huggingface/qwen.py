"""Qwen2, Qwen2.5 (Yang et al. 2024) and Qwen3 (Yang et al. 2025): Llama with windows in some layers.

Qwen2 has biases on query, key and value; Qwen3 normalises query and key heads instead, which are apart from the hidden
size.
"""

from __future__ import annotations

from typing import Any

from megalm.config.schema import Model
from megalm.convert.huggingface.decoder import (
    RotaryDecoder,
    layered_windows,
    layered_windows_to_config,
    unlike_layered_windows,
)
from megalm.convert.huggingface.family import unlike, unlike_biases
from megalm.convert.untrusted.json_fields import Fields


class Qwen2Family(RotaryDecoder):
    """``Qwen2ForCausalLM``."""

    model_type = "qwen2"
    title = "Qwen2"
    architecture = "Qwen2ForCausalLM"
    allowed = ("head_dim", "biases", "attention_windows")
    names_head_dim = False
    default_length = 32768
    default_kv_heads = 32

    def own_fields(self, fields: Fields, layers: int) -> dict[str, Any]:
        """See the base class."""
        return {"bias": False, "qkv_bias": True, "attention_windows": layered_windows(fields, layers)}

    def own_config(self, model: Model) -> dict[str, Any]:
        """See the base class."""
        return layered_windows_to_config(model)

    def own_reasons(self, model: Model) -> list[str]:
        """See the base class."""
        return unlike_biases(model, qkv=True, projection=False, mlp=False) + unlike_layered_windows(model)


class Qwen3Family(RotaryDecoder):
    """``Qwen3ForCausalLM``."""

    model_type = "qwen3"
    title = "Qwen3"
    architecture = "Qwen3ForCausalLM"
    allowed = ("head_dim", "biases", "attention_windows", "qk_norm")
    default_length = 32768
    default_kv_heads = 32
    default_head_dim = 128

    def own_fields(self, fields: Fields, layers: int) -> dict[str, Any]:
        """See the base class."""
        bias = True if fields.flag("attention_bias", False) else None
        return {
            "bias": False,
            "qkv_bias": bias,
            "projection_bias": bias,
            "qk_norm": True,
            "attention_windows": layered_windows(fields, layers),
        }

    def own_config(self, model: Model) -> dict[str, Any]:
        """See the base class."""
        return {"attention_bias": model.has_qkv_bias, **layered_windows_to_config(model)}

    def own_reasons(self, model: Model) -> list[str]:
        """See the base class."""
        biases = unlike_biases(model, qkv=model.has_qkv_bias, projection=model.has_qkv_bias, mlp=False)
        return unlike(model, qk_norm=True) + biases + unlike_layered_windows(model)
