"""GPT-NeoX and Pythia (Black et al. 2022; Biderman et al. 2023): query, key and value rows interleaved by head."""

from __future__ import annotations

from typing import Any

from megalm.config.schema import Model
from megalm.convert.huggingface.family import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    Family,
    layer_rules,
    unlike,
    unlike_any,
    unlike_biases,
)
from megalm.convert.huggingface.rotary import (
    RotaryNames,
    reasons_against_rotary,
    rotary_from_config,
    rotary_to_config,
)
from megalm.convert.mapping import GroupedHeads, Rule
from megalm.convert.untrusted.json_fields import Fields

_ROTARY = RotaryNames(base="rotary_emb_base", fraction="rotary_pct", default_fraction=0.25)
_RESIDUALS = {True: "parallel", False: "pre_norm"}


class NeoXFamily(Family):
    """``GPTNeoXForCausalLM``. Its output projection is ``embed_out``, which version 5 also reads as ``lm_head``."""

    model_type = "gpt_neox"
    title = "GPT-NeoX"
    architecture = "GPTNeoXForCausalLM"
    prefix = "gpt_neox."
    head_prefixes = ("embed_out.", "lm_head.")
    renamed = {r"^lm_head\.": "embed_out."}  # noqa: RUF012 - declared a ClassVar in the base class
    word_embedding = "embed_in.weight"
    ignored = (r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",)

    def model_from_config(self, fields: Fields) -> Model:
        """See the base class."""
        hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        length = fields.count("max_position_embeddings", 2048)
        bias = None if fields.flag("attention_bias", True) else False
        return Model(
            num_layers=fields.count("num_hidden_layers"),
            hidden_size=hidden,
            num_heads=heads,
            ffn_hidden_size=fields.count("intermediate_size"),
            vocab_size=fields.count("vocab_size"),
            sequence_length=length,
            residual=_RESIDUALS[fields.flag("use_parallel_residual", True)],
            qkv_bias=bias,
            projection_bias=bias,
            activation=fields.choice("hidden_act", ACTIVATIONS, "gelu"),
            norm_epsilon=fields.number("layer_norm_eps", 1e-5),
            dropout=fields.number("hidden_dropout", 0.0),
            attention_dropout=fields.number("attention_dropout", 0.0),
            init_std=fields.number("initializer_range", 0.02),
            tie_embeddings=fields.flag("tie_word_embeddings", False),
            **rotary_from_config(fields, names=_ROTARY, length=length, head_dim=max(hidden // heads, 1)),
        )

    def reasons_against(self, model: Model) -> list[str]:
        """See the base class."""
        reasons = unlike(
            model,
            causal=True,
            position="rotary",
            residual=("parallel", "pre_norm"),
            norm="layernorm",
            bias=True,
            activation=("gelu", "gelu_erf"),
            head="linear",
            token_types=0,
            embedding_norm=False,
            num_kv_heads=(model.num_heads, None),
        )
        if model.position == "rotary":
            reasons += reasons_against_rotary(model, names=_ROTARY)
        reasons += unlike_biases(model, qkv=model.has_qkv_bias, projection=model.has_qkv_bias, norm=True)
        return reasons + unlike_any(model, "biases")

    def config_from_model(self, model: Model) -> dict[str, Any]:
        """See the base class."""
        return {
            "num_hidden_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_heads,
            "intermediate_size": model.ffn_size,
            "max_position_embeddings": model.sequence_length,
            "vocab_size": model.vocab_size,
            "hidden_act": ACTIVATION_NAMES[model.activation],
            "layer_norm_eps": model.norm_epsilon,
            "hidden_dropout": model.dropout,
            "attention_dropout": model.attention_dropout,
            "initializer_range": model.init_std,
            "use_parallel_residual": model.residual == "parallel",
            "attention_bias": model.has_qkv_bias,
            "use_cache": True,
            "tie_word_embeddings": model.tie_embeddings,
            **rotary_to_config(model, names=_ROTARY),
        }

    def rules(self, model: Model) -> list[Rule]:
        """See the base class."""
        heads = GroupedHeads(model.num_heads, model.num_heads, model.head_size)
        rules = [Rule("embedding.weight", ("gpt_neox.embed_in.weight",))]
        for layer in range(model.num_layers):
            here, there = f"blocks.{layer}", f"gpt_neox.layers.{layer}"
            fused = f"{there}.attention.query_key_value"
            rules += layer_rules(f"{here}.attention_norm", f"{there}.input_layernorm", bias=True)
            rules += layer_rules(f"{here}.attention.qkv", fused, bias=model.has_qkv_bias, form=heads, bias_form=heads)
            rules += layer_rules(f"{here}.attention.projection", f"{there}.attention.dense", bias=model.has_qkv_bias)
            rules += layer_rules(f"{here}.mlp_norm", f"{there}.post_attention_layernorm", bias=True)
            rules += layer_rules(f"{here}.mlp.up", f"{there}.mlp.dense_h_to_4h", bias=True)
            rules += layer_rules(f"{here}.mlp.down", f"{there}.mlp.dense_4h_to_h", bias=True)
        rules += layer_rules("final_norm", "gpt_neox.final_layer_norm", bias=True)
        if not model.tie_embeddings:
            rules.append(Rule("head.weight", ("embed_out.weight",)))
        return rules

    def duplicates(self, model: Model) -> dict[str, str]:
        """See the base class."""
        return {"embed_out.weight": "gpt_neox.embed_in.weight"} if model.tie_embeddings else {}
