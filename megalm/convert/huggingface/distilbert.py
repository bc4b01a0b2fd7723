"""DistilBERT (Sanh et al. 2019): BERT without token types, under other names."""

from __future__ import annotations

from typing import Any

from megalm.config.schema import Model
from megalm.convert.huggingface.bert import ENCODER
from megalm.convert.huggingface.family import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    Family,
    layer_rules,
    unlike,
    unlike_any,
)
from megalm.convert.mapping import Fused, Rule
from megalm.convert.untrusted.json_fields import Fields

_EPSILON = 1e-12
"""Of its norms; ``config.json`` has no field for it."""


class DistilBertFamily(Family):
    """``DistilBertForMaskedLM``."""

    model_type = "distilbert"
    title = "DistilBERT"
    architecture = "DistilBertForMaskedLM"
    prefix = "distilbert."
    word_embedding = "embeddings.word_embeddings.weight"
    head_prefixes = ("vocab_transform.", "vocab_layer_norm.", "vocab_projector.")
    head_title = "masked-word head"
    renamed = {r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"}  # noqa: RUF012
    ignored = (r"distilbert\.embeddings\.position_ids",)

    def model_from_config(self, fields: Fields) -> Model:
        """See the base class."""
        return Model(
            num_layers=fields.count("n_layers"),
            hidden_size=fields.count("dim"),
            num_heads=fields.count("n_heads"),
            ffn_hidden_size=fields.count("hidden_dim"),
            vocab_size=fields.count("vocab_size"),
            sequence_length=fields.count("max_position_embeddings", 512),
            causal=False,
            residual="post_norm",
            embedding_norm=True,
            activation=fields.choice("activation", ACTIVATIONS, "gelu"),
            norm_epsilon=_EPSILON,
            dropout=fields.number("dropout", 0.1),
            attention_dropout=fields.number("attention_dropout", 0.1),
            init_std=fields.number("initializer_range", 0.02),
            tie_embeddings=fields.flag("tie_word_embeddings", True),
            head="masked_lm",
        )

    def notes(self, fields: Fields) -> list[str]:
        """See the base class."""
        if not fields.flag("sinusoidal_pos_embds", False):
            return []
        return [
            "left out sinusoidal_pos_embds=true: the positions are those stored, and megalm trains them as learned ones"
        ]

    def reasons_against(self, model: Model) -> list[str]:
        """See the base class."""
        reasons = unlike(
            model,
            causal=False,
            activation=("gelu_erf", "gelu"),
            **ENCODER,
            token_types=0,
            norm_epsilon=_EPSILON,
            num_kv_heads=(model.num_heads, None),
        )
        return reasons + unlike_any(model)

    def config_from_model(self, model: Model) -> dict[str, Any]:
        """See the base class."""
        return {
            "n_layers": model.num_layers,
            "dim": model.hidden_size,
            "n_heads": model.num_heads,
            "hidden_dim": model.ffn_size,
            "max_position_embeddings": model.sequence_length,
            "sinusoidal_pos_embds": False,
            "vocab_size": model.vocab_size,
            "activation": ACTIVATION_NAMES[model.activation],
            "dropout": model.dropout,
            "attention_dropout": model.attention_dropout,
            "initializer_range": model.init_std,
            "tie_word_embeddings": model.tie_embeddings,
        }

    def rules(self, model: Model) -> list[Rule]:
        """See the base class."""
        embeddings, qkv = "distilbert.embeddings", Fused((model.hidden_size,) * 3)
        rules = [
            Rule("embedding.weight", (f"{embeddings}.word_embeddings.weight",)),
            Rule("position.weight", (f"{embeddings}.position_embeddings.weight",)),
            *layer_rules("embedding_norm", f"{embeddings}.LayerNorm", bias=True),
        ]
        for layer in range(model.num_layers):
            here, there = f"blocks.{layer}", f"distilbert.transformer.layer.{layer}"
            parts = [f"{there}.attention.{part}_lin" for part in "qkv"]
            rules += layer_rules(f"{here}.attention_norm", f"{there}.sa_layer_norm", bias=True)
            rules += layer_rules(f"{here}.attention.qkv", parts, bias=True, form=qkv, bias_form=qkv)
            rules += layer_rules(f"{here}.attention.projection", f"{there}.attention.out_lin", bias=True)
            rules += layer_rules(f"{here}.mlp_norm", f"{there}.output_layer_norm", bias=True)
            rules += layer_rules(f"{here}.mlp.up", f"{there}.ffn.lin1", bias=True)
            rules += layer_rules(f"{here}.mlp.down", f"{there}.ffn.lin2", bias=True)
        rules += [
            Rule("masked_lm.weight", ("vocab_transform.weight",)),
            Rule("masked_lm.dense_bias", ("vocab_transform.bias",)),
            Rule("masked_lm.bias", ("vocab_projector.bias",)),
            *layer_rules("masked_lm.norm", "vocab_layer_norm", bias=True),
        ]
        if not model.tie_embeddings:
            rules.append(Rule("head.weight", ("vocab_projector.weight",)))
        return rules

    def duplicates(self, model: Model) -> dict[str, str]:
        """See the base class."""
        return {"vocab_projector.weight": self.prefix + self.word_embedding} if model.tie_embeddings else {}
