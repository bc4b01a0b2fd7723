"""Llama (Touvron et al. 2023; Grattafiori et al. 2024): RMSNorm, SwiGLU, rotary positions, grouped-query attention."""

from __future__ import annotations

from typing import Any

from megalm.config.schema import Model
from megalm.convert.huggingface.decoder import RotaryDecoder
from megalm.convert.huggingface.family import unlike_biases
from megalm.convert.untrusted.json_fields import Fields


class LlamaFamily(RotaryDecoder):
    """``LlamaForCausalLM``."""

    model_type = "llama"
    title = "Llama"
    architecture = "LlamaForCausalLM"
    default_length = 2048

    def own_fields(self, fields: Fields, layers: int) -> dict[str, Any]:  # noqa: ARG002 - all layers are alike
        """See the base class."""
        fields.must_be("pretraining_tp", 1, "products computed in slices round otherwise")
        for name in ("sliding_window", "use_sliding_window", "layer_types", "no_rope_layers"):
            if fields.values.get(name):
                fields.problem(name, "Llama attends to all tokens before, in all layers; only null can be converted")
        bias, attention_bias = fields.flag("mlp_bias", False), fields.flag("attention_bias", False)
        apart = None if attention_bias == bias else attention_bias
        return {"bias": bias, "qkv_bias": apart, "projection_bias": apart}

    def own_config(self, model: Model) -> dict[str, Any]:
        """See the base class."""
        return {"attention_bias": model.has_qkv_bias, "mlp_bias": model.bias, "pretraining_tp": 1}

    def own_reasons(self, model: Model) -> list[str]:
        """See the base class."""
        return unlike_biases(model, qkv=model.has_qkv_bias, projection=model.has_qkv_bias)
