"""What Llama and the decoders that descend from it share: fields, names of tensors, windows.

They are pre-norm blocks with rotary positions and grouped-query attention. A family says, beyond that, which norm,
activation, biases and windows it has.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from megalm.config.schema import Model
from megalm.config.violation import format_value
from megalm.convert.huggingface.family import Family, head_dim_from, layer_rules, unlike, unlike_any
from megalm.convert.huggingface.rotary import (
    RotaryNames,
    reasons_against_rotary,
    rotary_from_config,
    rotary_to_config,
)
from megalm.convert.mapping import Fused, Rule
from megalm.convert.untrusted.json_fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"
"""What ``layer_types`` calls a layer that sees all tokens before, and one with a window."""


class RotaryDecoder(Family):
    """A descendant of Llama.

    Attributes:
        rotary: its spellings of rotary positions.
        norm: megalm's name of its norm.
        epsilon: the field that has the norm's epsilon.
        activations: the library's names of activations ▶ megalm's.
        allowed: what few families have and this one does, see :func:`unlike_any`.
        default_length: what the library takes for the longest sequence where the field is absent.
        default_kv_heads: the same of key/value heads; None: as many as query heads.
        names_head_dim: whether its configs have ``head_dim`` where it is hidden / heads too.
        default_head_dim: what the library takes for it where it is absent; None: hidden / heads.
        default_epsilon: the same of the norm's epsilon.
        default_tied: the same of tied embeddings.
    """

    prefix = "model."
    word_embedding = "embed_tokens.weight"
    ignored = (r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)
    rotary: ClassVar[RotaryNames] = RotaryNames()
    norm: ClassVar[str] = "rmsnorm"
    epsilon: ClassVar[str] = "rms_norm_eps"
    activations: ClassVar[dict[str, str]] = {"silu": "swiglu", "swish": "swiglu"}
    allowed: ClassVar[tuple[str, ...]] = ("head_dim", "biases")
    default_length: ClassVar[int]
    default_kv_heads: ClassVar[int | None] = None
    names_head_dim: ClassVar[bool] = True
    default_head_dim: ClassVar[int | None] = None
    default_epsilon: ClassVar[float] = 1e-6
    default_tied: ClassVar[bool] = False

    @abstractmethod
    def own_fields(self, fields: Fields, layers: int) -> dict[str, Any]:
        """The model's biases, windows, dropout and query norms, as far as they are not megalm's defaults."""

    @abstractmethod
    def own_config(self, model: Model) -> dict[str, Any]:
        """The fields of ``config.json`` for them."""

    @abstractmethod
    def own_reasons(self, model: Model) -> list[str]:
        """Why the family cannot have the model's, one phrase each."""

    def model_from_config(self, fields: Fields) -> Model:
        """See the base class."""
        layers, hidden = fields.count("num_hidden_layers"), fields.count("hidden_size")
        heads = fields.count("num_attention_heads")
        default_kv = None if fields.is_null("num_key_value_heads") else self.default_kv_heads
        head_dim = head_dim_from(fields, "head_dim", hidden=hidden, heads=heads, default=self.default_head_dim)
        length = fields.count("max_position_embeddings", self.default_length)
        default_activation = next(iter(self.activations))
        return Model(
            num_layers=layers,
            hidden_size=hidden,
            num_heads=heads,
            head_dim=head_dim,
            num_kv_heads=fields.count("num_key_value_heads", default_kv or heads),
            ffn_hidden_size=fields.count("intermediate_size"),
            vocab_size=fields.count("vocab_size"),
            sequence_length=length,
            norm=self.norm,
            norm_epsilon=fields.number(self.epsilon, self.default_epsilon),
            activation=fields.choice("hidden_act", self.activations, default_activation),
            attention_dropout=fields.number("attention_dropout", 0.0),
            init_std=fields.number("initializer_range", 0.02),
            tie_embeddings=fields.flag("tie_word_embeddings", self.default_tied),
            **self.own_fields(fields, layers),
            **rotary_from_config(
                fields, names=self.rotary, length=length, head_dim=head_dim or max(hidden // heads, 1)
            ),
        )

    def losses(self, model: Model) -> list[str]:
        """See the base class."""
        return [f"left out model.dropout={model.dropout:g}: {self.title} drops attention only"] if model.dropout else []

    def reasons_against(self, model: Model) -> list[str]:
        """See the base class."""
        reasons = unlike(
            model,
            causal=True,
            position="rotary",
            residual="pre_norm",
            norm=self.norm,
            activation=tuple(dict.fromkeys(self.activations.values())),
            head="linear",
            token_types=0,
            embedding_norm=False,
        )
        if model.position == "rotary":
            reasons += reasons_against_rotary(model, names=self.rotary)
        return reasons + unlike_any(model, *self.allowed) + self.own_reasons(model)

    def config_from_model(self, model: Model) -> dict[str, Any]:
        """See the base class."""
        names = {ours: theirs for theirs, ours in reversed(self.activations.items())}
        return {
            "num_hidden_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "num_attention_heads": model.num_heads,
            "num_key_value_heads": model.kv_heads,
            **({"head_dim": model.head_size} if self.names_head_dim or model.head_dim is not None else {}),
            "intermediate_size": model.ffn_size,
            "max_position_embeddings": model.sequence_length,
            "vocab_size": model.vocab_size,
            "hidden_act": names[model.activation],
            self.epsilon: model.norm_epsilon,
            "attention_dropout": model.attention_dropout,
            "initializer_range": model.init_std,
            "use_cache": True,
            "tie_word_embeddings": model.tie_embeddings,
            **self.own_config(model),
            **rotary_to_config(model, names=self.rotary),
        }

    def rules(self, model: Model) -> list[Rule]:
        """See the base class."""
        rules = [Rule("embedding.weight", ("model.embed_tokens.weight",))]
        norm_bias = model.has_norm_bias
        for layer in range(model.num_layers):
            here, there = f"blocks.{layer}", f"model.layers.{layer}"
            rules += layer_rules(f"{here}.attention_norm", f"{there}.input_layernorm", bias=norm_bias)
            rules += self.attention_rules(model, f"{here}.attention", f"{there}.self_attn")
            rules += layer_rules(f"{here}.mlp_norm", f"{there}.post_attention_layernorm", bias=norm_bias)
            rules += self.mlp_rules(model, f"{here}.mlp", f"{there}.mlp")
        rules += layer_rules("final_norm", "model.norm", bias=norm_bias)
        if not model.tie_embeddings:
            rules.append(Rule("head.weight", ("lm_head.weight",)))
        return rules

    def attention_rules(self, model: Model, here: str, there: str) -> list[Rule]:
        """Rules of one layer's attention: query, key and value apart, and their norms where the model has them."""
        kv = model.kv_heads * model.head_size
        parts, qkv = [f"{there}.{part}_proj" for part in "qkv"], Fused((model.attention_size, kv, kv))
        rules = layer_rules(f"{here}.qkv", parts, bias=model.has_qkv_bias, form=qkv, bias_form=qkv)
        if model.qk_norm:
            rules += layer_rules(f"{here}.query_norm", f"{there}.q_norm", bias=False)
            rules += layer_rules(f"{here}.key_norm", f"{there}.k_norm", bias=False)
        return rules + layer_rules(f"{here}.projection", f"{there}.o_proj", bias=model.has_projection_bias)

    def mlp_rules(self, model: Model, here: str, there: str) -> list[Rule]:
        """Rules of one layer's MLP: gate and up apart."""
        halves, gate_up = [f"{there}.{half}_proj" for half in ("gate", "up")], Fused((model.ffn_size,) * 2)
        rules = layer_rules(f"{here}.gate_up", halves, bias=model.bias, form=gate_up, bias_form=gate_up)
        return rules + layer_rules(f"{here}.down", f"{there}.down_proj", bias=model.bias)


def one_window(fields: Fields, default: int | None = None) -> tuple[int, ...]:
    """The window of all layers, as ``sliding_window`` gives it; null: none, absent: the library's default."""
    kinds = fields.values.get("layer_types")
    if isinstance(kinds, list) and len(set(map(str, kinds))) > 1:
        fields.problem("layer_types", "of several kinds, and this architecture computes all layers alike")
    if "sliding_window" not in fields and (default is None or fields.is_null("sliding_window")):
        return (0,)
    return (fields.count("sliding_window", default),)


def layered_windows(fields: Fields, layers: int) -> tuple[int, ...]:
    """A window per layer: ``layer_types`` says which have it, or else those from ``max_window_layers`` on (Qwen)."""
    used = fields.flag("use_sliding_window", False) and not fields.is_null("sliding_window")
    window = fields.count("sliding_window", 4096) if used else 0
    kinds = fields.values.get("layer_types")
    if kinds is None:
        first = fields.count("max_window_layers", 28, smallest=0)
        return rotation([window if layer >= first else 0 for layer in range(min(layers, _MOST_LAYERS))])
    if not isinstance(kinds, list) or len(kinds) != layers or not set(map(str, kinds)) <= {FULL, SLIDING}:
        fields.problem("layer_types", f"not a list of {layers} times {FULL} or {SLIDING}, which megalm's layers are")
        return (0,)
    if SLIDING in kinds and not used:
        fields.problem("layer_types", f"has {SLIDING}, and use_sliding_window or sliding_window turns windows off")
    return rotation([window if kind == SLIDING else 0 for kind in kinds])


_MOST_LAYERS = 1 << 16
"""Layers beyond which a config is not that of its tensors, which is said where they are compared."""


def rotation(windows: Sequence[int]) -> tuple[int, ...]:
    """The shortest sequence that, repeated, gives each layer its window."""
    # borders[i]: length of the longest proper beginning of windows[: i + 1] that is also its end (Knuth et al. 1977).
    borders = [0] * len(windows)
    for place in range(1, len(windows)):
        length = borders[place - 1]
        while length and windows[place] != windows[length]:
            length = borders[length - 1]
        borders[place] = length + (windows[place] == windows[length])
    return tuple(windows[: len(windows) - borders[-1]]) if windows else (0,)


def windows_of(model: Model) -> list[int]:
    """The window of each layer; 0: none."""
    return [model.attention_window(layer) for layer in range(model.num_layers)]


def unlike_one_window(model: Model) -> list[str]:
    """That layers have different windows, where a family has one for all; empty: they have not."""
    if len(set(windows_of(model))) == 1:
        return []
    return [f"model.attention_windows={list(model.attention_windows)}, not one window for all layers"]


def unlike_layered_windows(model: Model) -> list[str]:
    """That layers have windows of several widths, where a family has one width for some; empty: they have not."""
    if len(set(windows_of(model)) - {0}) <= 1:
        return []
    return [f"model.attention_windows={format_value(list(model.attention_windows))}, not one width for some layers"]


def one_window_to_config(model: Model) -> dict[str, Any]:
    """``sliding_window`` of a model whose layers have one window, or none."""
    return {"sliding_window": model.attention_window(0) or None}


def layered_windows_to_config(model: Model) -> dict[str, Any]:
    """``layer_types`` and what older versions of the library go by instead: they know no other order than this."""
    windows = windows_of(model)
    full_first = next((layer for layer, window in enumerate(windows) if window), model.num_layers)
    return {
        "use_sliding_window": any(windows),
        "sliding_window": max(windows) or None,
        "max_window_layers": full_first,
        "layer_types": [SLIDING if window else FULL for window in windows],
    }
