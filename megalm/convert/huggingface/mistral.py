"""Mistral (Jiang et al. 2023) and Mistral-Nemo: Llama without biases, with a window over all layers or none."""

from __future__ import annotations

from typing import Any

from megalm.config.schema import Model
from megalm.convert.huggingface.decoder import (
    RotaryDecoder,
    one_window,
    one_window_to_config,
    unlike_one_window,
)
from megalm.convert.huggingface.family import unlike_biases
from megalm.convert.untrusted.json_fields import Fields


class MistralFamily(RotaryDecoder):
    """``MistralForCausalLM``."""

    model_type = "mistral"
    title = "Mistral"
    architecture = "MistralForCausalLM"
    allowed = ("head_dim", "biases", "attention_windows")
    default_length = 131072
    default_kv_heads = 8

    def own_fields(self, fields: Fields, layers: int) -> dict[str, Any]:  # noqa: ARG002 - all layers are alike
        """See the base class."""
        return {"bias": False, "attention_windows": one_window(fields, default=4096)}

    def own_config(self, model: Model) -> dict[str, Any]:
        """See the base class."""
        return one_window_to_config(model)

    def own_reasons(self, model: Model) -> list[str]:
        """See the base class."""
        return unlike_biases(model, qkv=False, projection=False, mlp=False) + unlike_one_window(model)
