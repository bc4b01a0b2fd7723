"""GPT-2 (Radford et al. 2019) in Hugging Face's form: ``Conv1D`` layers, whose weights are transposed."""

from __future__ import annotations

from typing import Any

from megalm.config.schema import Model
from megalm.convert.huggingface.family import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    Family,
    dropout_note,
    layer_rules,
    unlike,
    unlike_any,
)
from megalm.convert.mapping import Rule, Transposed
from megalm.convert.untrusted.json_fields import Fields


class GPT2Family(Family):
    """``GPT2LMHeadModel``."""

    model_type = "gpt2"
    title = "GPT-2"
    architecture = "GPT2LMHeadModel"
    prefix = "transformer."
    word_embedding = "wte.weight"
    ignored = (r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",)

    def model_from_config(self, fields: Fields) -> Model:
        """See the base class."""
        fields.must_be("scale_attn_by_inverse_layer_idx", False, "megalm scales no layer's attention by its number")
        fields.must_be("scale_attn_weights", True, "megalm scales attention by the square root of the head's width")
        fields.must_be("add_cross_attention", False, "megalm has no cross attention")
        hidden = fields.count("n_embd")
        length = "n_positions" if "n_positions" in fields else "n_ctx"  # the older name, where it stands alone
        return Model(
            num_layers=fields.count("n_layer"),
            hidden_size=hidden,
            num_heads=fields.count("n_head"),
            ffn_hidden_size=fields.count("n_inner", 4 * hidden),
            vocab_size=fields.count("vocab_size"),
            sequence_length=fields.count(length),
            activation=fields.choice("activation_function", ACTIVATIONS, "gelu_new"),
            norm_epsilon=fields.number("layer_norm_epsilon", 1e-5),
            dropout=fields.number("resid_pdrop", 0.1),
            attention_dropout=fields.number("attn_pdrop", 0.1),
            init_std=fields.number("initializer_range", 0.02),
            tie_embeddings=fields.flag("tie_word_embeddings", True),
        )

    def notes(self, fields: Fields) -> list[str]:
        """See the base class."""
        return dropout_note(fields, "resid_pdrop", "embd_pdrop", 0.1)

    def reasons_against(self, model: Model) -> list[str]:
        """See the base class."""
        reasons = unlike(
            model,
            causal=True,
            position="learned",
            residual="pre_norm",
            norm="layernorm",
            bias=True,
            activation=("gelu", "gelu_erf"),
            head="linear",
            token_types=0,
            embedding_norm=False,
            num_kv_heads=(model.num_heads, None),
        )
        return reasons + unlike_any(model)

    def config_from_model(self, model: Model) -> dict[str, Any]:
        """See the base class."""
        return {
            "n_layer": model.num_layers,
            "n_embd": model.hidden_size,
            "n_head": model.num_heads,
            "n_inner": model.ffn_size,
            "n_positions": model.sequence_length,
            "n_ctx": model.sequence_length,
            "vocab_size": model.vocab_size,
            "activation_function": ACTIVATION_NAMES[model.activation],
            "layer_norm_epsilon": model.norm_epsilon,
            "resid_pdrop": model.dropout,
            "embd_pdrop": model.dropout,
            "attn_pdrop": model.attention_dropout,
            "initializer_range": model.init_std,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
            "add_cross_attention": False,
            "use_cache": True,
            "tie_word_embeddings": model.tie_embeddings,
        }

    def rules(self, model: Model) -> list[Rule]:
        """See the base class."""
        rules = [Rule("embedding.weight", ("transformer.wte.weight",))]
        rules.append(Rule("position.weight", ("transformer.wpe.weight",)))
        for layer in range(model.num_layers):
            here, there = f"blocks.{layer}", f"transformer.h.{layer}"
            rules += layer_rules(f"{here}.attention_norm", f"{there}.ln_1", bias=True)
            for name, foreign in (
                ("attention.qkv", "attn.c_attn"),
                ("attention.projection", "attn.c_proj"),
                ("mlp.up", "mlp.c_fc"),
                ("mlp.down", "mlp.c_proj"),
            ):
                rules += layer_rules(f"{here}.{name}", f"{there}.{foreign}", bias=True, form=Transposed())
            rules += layer_rules(f"{here}.mlp_norm", f"{there}.ln_2", bias=True)
        rules += layer_rules("final_norm", "transformer.ln_f", bias=True)
        if not model.tie_embeddings:
            rules.append(Rule("head.weight", ("lm_head.weight",)))
        return rules
