"""BERT (Devlin et al. 2019) with the head for masked words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from megalm.config.schema import Model
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

ENCODER: dict[str, Any] = {
    "position": "learned",
    "residual": "post_norm",
    "norm": "layernorm",
    "bias": True,
    "head": "masked_lm",
    "embedding_norm": True,
}
"""What a model is that BERT and its descendants can be, beside sizes, activation, positions and token types."""


@dataclass(frozen=True)
class HeadNames:
    """Names of the tensors of the head for masked words, without ``weight`` and ``bias``.

    Attributes:
        dense: the dense layer.
        norm: the norm.
        top: the bias per word, and the decoder that holds the rows of the output projection, are its parts.
    """

    dense: str
    norm: str
    top: str

    @property
    def bias(self) -> str:
        """The bias per word."""
        return f"{self.top}.bias"

    @property
    def decoder(self) -> str:
        """The rows of the output projection, and the same bias once more."""
        return f"{self.top}.decoder"


class BertFamily(Family):
    """``BertForMaskedLM``. The head for next-sentence prediction is left out.

    Attributes:
        head: names of the head's tensors.
    """

    model_type = "bert"
    title = "BERT"
    architecture = "BertForMaskedLM"
    prefix = "bert."
    head_prefixes = ("cls.",)
    head_title = "masked-word head"
    renamed = {r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"}  # noqa: RUF012
    word_embedding = "embeddings.word_embeddings.weight"
    ignored = (r"bert\.embeddings\.(position_ids|token_type_ids)",)
    left_out = {  # noqa: RUF012
        r"bert\.pooler\..*": "the pooler of the first token",
        r"cls\.seq_relationship\..*": "the prediction of the next sentence",
    }

    head: ClassVar[HeadNames] = HeadNames(
        "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions"
    )

    def model_from_config(self, fields: Fields) -> Model:
        """See the base class."""
        fields.must_be("position_embedding_type", "absolute", "megalm has no relative position embeddings")
        fields.must_be("is_decoder", False, f"megalm's {self.title} sees both sides")
        fields.must_be("add_cross_attention", False, "megalm has no cross attention")
        return Model(
            num_layers=fields.count("num_hidden_layers"),
            hidden_size=fields.count("hidden_size"),
            num_heads=fields.count("num_attention_heads"),
            ffn_hidden_size=fields.count("intermediate_size"),
            vocab_size=fields.count("vocab_size"),
            **self.positions(fields),
            causal=False,
            residual="post_norm",
            token_types=fields.count("type_vocab_size", 2),
            embedding_norm=True,
            activation=fields.choice("hidden_act", ACTIVATIONS, "gelu"),
            norm_epsilon=fields.number("layer_norm_eps", 1e-12),
            dropout=fields.number("hidden_dropout_prob", 0.1),
            attention_dropout=fields.number("attention_probs_dropout_prob", 0.1),
            init_std=fields.number("initializer_range", 0.02),
            tie_embeddings=fields.flag("tie_word_embeddings", True),
            head="masked_lm",
        )

    def positions(self, fields: Fields) -> dict[str, Any]:
        """The model's ``sequence_length``, and rows of the position embedding before the first."""
        return {"sequence_length": fields.count("max_position_embeddings", 512)}

    def reasons_against(self, model: Model) -> list[str]:
        """See the base class."""
        reasons = unlike(
            model,
            causal=False,
            activation=("gelu_erf", "gelu"),
            **ENCODER,
            num_kv_heads=(model.num_heads, None),
        )
        if not model.token_types:
            reasons.append("model.token_types=0, not 1 or more")
        return reasons + unlike_any(model)

    def config_from_model(self, model: Model) -> dict[str, Any]:
        """See the base class."""
        return {
            "num_hidden_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_heads,
            "intermediate_size": model.ffn_size,
            "max_position_embeddings": model.sequence_length,
            "type_vocab_size": model.token_types,
            "vocab_size": model.vocab_size,
            "hidden_act": ACTIVATION_NAMES[model.activation],
            "layer_norm_eps": model.norm_epsilon,
            "hidden_dropout_prob": model.dropout,
            "attention_probs_dropout_prob": model.attention_dropout,
            "initializer_range": model.init_std,
            "position_embedding_type": "absolute",
            "is_decoder": False,
            "tie_word_embeddings": model.tie_embeddings,
        }

    def rules(self, model: Model) -> list[Rule]:
        """See the base class."""
        embeddings = f"{self.prefix}embeddings"
        qkv = Fused((model.hidden_size,) * 3)
        rules = [
            Rule("embedding.weight", (f"{embeddings}.word_embeddings.weight",)),
            Rule("position.weight", (f"{embeddings}.position_embeddings.weight",)),
            Rule("token_type.weight", (f"{embeddings}.token_type_embeddings.weight",)),
            *layer_rules("embedding_norm", f"{embeddings}.LayerNorm", bias=True),
        ]
        for layer in range(model.num_layers):
            here, there = f"blocks.{layer}", f"{self.prefix}encoder.layer.{layer}"
            parts = [f"{there}.attention.self.{part}" for part in ("query", "key", "value")]
            rules += layer_rules(f"{here}.attention_norm", f"{there}.attention.output.LayerNorm", bias=True)
            rules += layer_rules(f"{here}.attention.qkv", parts, bias=True, form=qkv, bias_form=qkv)
            rules += layer_rules(f"{here}.attention.projection", f"{there}.attention.output.dense", bias=True)
            rules += layer_rules(f"{here}.mlp_norm", f"{there}.output.LayerNorm", bias=True)
            rules += layer_rules(f"{here}.mlp.up", f"{there}.intermediate.dense", bias=True)
            rules += layer_rules(f"{here}.mlp.down", f"{there}.output.dense", bias=True)
        # Untied, the library has two biases and computes with the decoder's.
        bias = self.head.bias if model.tie_embeddings else f"{self.head.decoder}.bias"
        rules += [
            Rule("masked_lm.weight", (f"{self.head.dense}.weight",)),
            Rule("masked_lm.dense_bias", (f"{self.head.dense}.bias",)),
            Rule("masked_lm.bias", (bias,)),
            *layer_rules("masked_lm.norm", self.head.norm, bias=True),
        ]
        if not model.tie_embeddings:
            rules.append(Rule("head.weight", (f"{self.head.decoder}.weight",)))
        return rules

    def duplicates(self, model: Model) -> dict[str, str]:
        """See the base class."""
        if not model.tie_embeddings:
            return {}
        word_embedding = self.prefix + self.word_embedding
        return {f"{self.head.decoder}.bias": self.head.bias, f"{self.head.decoder}.weight": word_embedding}

    def stand_ins(self, model: Model) -> dict[str, str]:
        """See the base class. Version 4 of the library had one bias of two names, tied or not."""
        return {} if model.tie_embeddings else {self.head.bias: f"{self.head.decoder}.bias"}

    def copies(self, model: Model) -> dict[str, str]:
        """The library ties the bias to its second name only where it ties the embedding too, and wants both."""
        return {} if model.tie_embeddings else {self.head.bias: f"{self.head.decoder}.bias"}
