"""StarCoder2 (Lozhkov et al. 2024): LayerNorm, GELU, biases, rotary positions, a window over all layers or none."""

from __future__ import annotations

from typing import Any

from megalm.config.schema import Model
from megalm.convert.huggingface.decoder import (
    RotaryDecoder,
    one_window,
    one_window_to_config,
    unlike_one_window,
)
from megalm.convert.huggingface.family import dropout_note, layer_rules, unlike_biases
from megalm.convert.mapping import Rule
from megalm.convert.untrusted.json_fields import Fields


class StarCoder2Family(RotaryDecoder):
    """``Starcoder2ForCausalLM``. Its LayerNorms have a bias whatever ``use_bias`` says."""

    model_type = "starcoder2"
    title = "StarCoder2"
    architecture = "Starcoder2ForCausalLM"
    norm = "layernorm"
    epsilon = "norm_epsilon"
    activations = {  # noqa: RUF012 - declared a ClassVar in the base class
        "gelu_pytorch_tanh": "gelu",
        "gelu_new": "gelu",
        "gelu_fast": "gelu",
        "gelu": "gelu_erf",
    }
    allowed = ("head_dim", "biases", "attention_windows")
    names_head_dim = False
    default_length = 4096
    default_kv_heads = 2
    default_epsilon = 1e-5
    default_tied = True

    def own_fields(self, fields: Fields, layers: int) -> dict[str, Any]:  # noqa: ARG002 - all layers are alike
        """See the base class."""
        bias = fields.flag("use_bias", True)
        return {
            "bias": bias,
            "norm_bias": None if bias else True,
            "attention_windows": one_window(fields),
            "dropout": fields.number("residual_dropout", 0.0),
        }

    def own_config(self, model: Model) -> dict[str, Any]:
        """See the base class."""
        return {
            "use_bias": model.bias,
            "residual_dropout": model.dropout,
            "embedding_dropout": model.dropout,
            **one_window_to_config(model),
        }

    def own_reasons(self, model: Model) -> list[str]:
        """See the base class."""
        return unlike_biases(model, qkv=model.bias, projection=model.bias, norm=True) + unlike_one_window(model)

    def notes(self, fields: Fields) -> list[str]:
        """See the base class."""
        return dropout_note(fields, "residual_dropout", "embedding_dropout", 0.0)

    def losses(self, model: Model) -> list[str]:  # noqa: ARG002 - it drops where megalm does
        """See the base class."""
        return []

    def mlp_rules(self, model: Model, here: str, there: str) -> list[Rule]:
        """Rules of one layer's MLP."""
        rules = layer_rules(f"{here}.up", f"{there}.c_fc", bias=model.bias)
        return rules + layer_rules(f"{here}.down", f"{there}.c_proj", bias=model.bias)
