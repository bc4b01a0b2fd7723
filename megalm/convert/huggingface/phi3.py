"""Phi-3 (Abdin et al. 2024) and Phi-4: Llama with query, key and value in one tensor, and gate and up in another.

The models with a context of 4k, and those whose rotary positions are not scaled: LongRoPE, which stretches the others,
is not among megalm's scalings.
"""

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
from megalm.convert.huggingface.rotary import RotaryNames
from megalm.convert.mapping import Rule
from megalm.convert.untrusted.json_fields import Fields


class Phi3Family(RotaryDecoder):
    """``Phi3ForCausalLM``. The library scales its rotary positions by LongRoPE or not at all."""

    model_type = "phi3"
    title = "Phi-3"
    architecture = "Phi3ForCausalLM"
    rotary = RotaryNames(fraction="partial_rotary_factor", scalings=())
    allowed = ("head_dim", "biases", "attention_windows")
    names_head_dim = False
    default_length = 4096
    default_epsilon = 1e-5

    def own_fields(self, fields: Fields, layers: int) -> dict[str, Any]:  # noqa: ARG002 - all layers are alike
        """See the base class."""
        return {
            "bias": False,
            "attention_windows": one_window(fields),
            "dropout": fields.number("resid_pdrop", 0.0),
        }

    def own_config(self, model: Model) -> dict[str, Any]:
        """See the base class."""
        return {
            "original_max_position_embeddings": model.sequence_length,
            "resid_pdrop": model.dropout,
            "embd_pdrop": model.dropout,
            **one_window_to_config(model),
        }

    def own_reasons(self, model: Model) -> list[str]:
        """See the base class."""
        biases = unlike_biases(model, qkv=False, projection=False, mlp=False)
        return biases + unlike_one_window(model)

    def notes(self, fields: Fields) -> list[str]:
        """See the base class."""
        return dropout_note(fields, "resid_pdrop", "embd_pdrop", 0.0)

    def losses(self, model: Model) -> list[str]:  # noqa: ARG002 - it drops where megalm does
        """See the base class."""
        return []

    def attention_rules(self, model: Model, here: str, there: str) -> list[Rule]:
        """Rules of one layer's attention: query, key and value in one tensor, as megalm has them."""
        rules = layer_rules(f"{here}.qkv", f"{there}.qkv_proj", bias=model.has_qkv_bias)
        return rules + layer_rules(f"{here}.projection", f"{there}.o_proj", bias=model.has_projection_bias)

    def mlp_rules(self, model: Model, here: str, there: str) -> list[Rule]:
        """Rules of one layer's MLP: gate and up in one tensor, as megalm has them."""
        rules = layer_rules(f"{here}.gate_up", f"{there}.gate_up_proj", bias=model.bias)
        return rules + layer_rules(f"{here}.down", f"{there}.down_proj", bias=model.bias)
