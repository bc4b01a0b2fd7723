"""Llama (Touvron et al. 2023; Grattafiori et al. 2024): RMSNorm, SwiGLU, rotary positions, grouped-query attention."""

from __future__ import annotations

from typing import Any

from megalm.config.schema import Model
from megalm.convert.huggingface.family import Family, layer_rules, unlike, unlike_any
from megalm.convert.huggingface.rotary import (
    RotaryNames,
    reasons_against_rotary,
    rotary_from_config,
    rotary_to_config,
)
from megalm.convert.mapping import Fused, Rule
from megalm.convert.untrusted.json_fields import Fields

_ROTARY = RotaryNames()
_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu"}


class LlamaFamily(Family):
    """``LlamaForCausalLM``."""

    model_type = "llama"
    title = "Llama"
    architecture = "LlamaForCausalLM"
    prefix = "model."
    word_embedding = "embed_tokens.weight"
    ignored = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)

    def model_from_config(self, fields: Fields) -> Model:
        """See the base class."""
        fields.must_be("pretraining_tp", 1, "products computed in slices round otherwise")
        for name in ("sliding_window", "use_sliding_window", "layer_types", "no_rope_layers"):
            if fields.values.get(name):
                fields.problem(name, "megalm's Llama attends to all tokens before; only null can be converted")
        hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        length = fields.count("max_position_embeddings", 2048)
        if fields.count("head_dim", max(hidden // heads, 1)) != hidden // heads:
            fields.problem("head_dim", f"megalm's heads have hidden_size / num_attention_heads = {hidden / heads:g}")
        bias = fields.flag("attention_bias", False)
        if fields.flag("mlp_bias", False) != bias:
            fields.problem("mlp_bias", f"megalm has biases on all linear layers or none, and attention_bias={bias}")
        return Model(
            num_layers=fields.count("num_hidden_layers"),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=fields.count("num_key_value_heads", heads),
            ffn_hidden_size=fields.count("intermediate_size"),
            vocab_size=fields.count("vocab_size"),
            sequence_length=length,
            norm="rmsnorm",
            norm_epsilon=fields.number("rms_norm_eps", 1e-6),
            activation=fields.choice("hidden_act", _ACTIVATIONS, "silu"),
            bias=bias,
            attention_dropout=fields.number("attention_dropout", 0.0),
            init_std=fields.number("initializer_range", 0.02),
            tie_embeddings=fields.flag("tie_word_embeddings", False),
            **rotary_from_config(fields, names=_ROTARY, length=length, head_dim=max(hidden // heads, 1)),
        )

    def losses(self, model: Model) -> list[str]:
        """See the base class."""
        return [f"left out model.dropout={model.dropout:g}: Llama drops attention only"] if model.dropout else []

    def reasons_against(self, model: Model) -> list[str]:
        """See the base class."""
        reasons = unlike(
            model,
            causal=True,
            position="rotary",
            residual="pre_norm",
            norm="rmsnorm",
            activation="swiglu",
            head="linear",
            token_types=0,
            embedding_norm=False,
        )
        if model.position == "rotary":
            reasons += reasons_against_rotary(model, names=_ROTARY)
        return reasons + unlike_any(model)

    def config_from_model(self, model: Model) -> dict[str, Any]:
        """See the base class."""
        return {
            "num_hidden_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.kv_heads,
            "head_dim": model.head_size,
            "intermediate_size": model.ffn_size,
            "max_position_embeddings": model.sequence_length,
            "vocab_size": model.vocab_size,
            "hidden_act": "silu",
            "rms_norm_eps": model.norm_epsilon,
            "attention_bias": model.bias,
            "mlp_bias": model.bias,
            "attention_dropout": model.attention_dropout,
            "initializer_range": model.init_std,
            "pretraining_tp": 1,
            "use_cache": True,
            "tie_word_embeddings": model.tie_embeddings,
            **rotary_to_config(model, names=_ROTARY),
        }

    def rules(self, model: Model) -> list[Rule]:
        """See the base class."""
        bias, kv = model.bias, model.kv_heads * model.head_size
        qkv, gate_up = Fused((model.hidden_size, kv, kv)), Fused((model.ffn_size, model.ffn_size))
        rules = [Rule("embedding.weight", ("model.embed_tokens.weight",))]
        for layer in range(model.num_layers):
            here, there = f"blocks.{layer}", f"model.layers.{layer}"
            parts = [f"{there}.self_attn.{part}_proj" for part in "qkv"]
            halves = [f"{there}.mlp.{half}_proj" for half in ("gate", "up")]
            rules += layer_rules(f"{here}.attention_norm", f"{there}.input_layernorm", bias=False)
            rules += layer_rules(f"{here}.attention.qkv", parts, bias=bias, form=qkv, bias_form=qkv)
            rules += layer_rules(f"{here}.attention.projection", f"{there}.self_attn.o_proj", bias=bias)
            rules += layer_rules(f"{here}.mlp_norm", f"{there}.post_attention_layernorm", bias=False)
            rules += layer_rules(f"{here}.mlp.gate_up", halves, bias=bias, form=gate_up, bias_form=gate_up)
            rules += layer_rules(f"{here}.mlp.down", f"{there}.mlp.down_proj", bias=bias)
        rules += layer_rules("final_norm", "model.norm", bias=False)
        if not model.tie_embeddings:
            rules.append(Rule("head.weight", ("lm_head.weight",)))
        return rules
