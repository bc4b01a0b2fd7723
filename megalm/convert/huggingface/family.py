"""A Hugging Face architecture: its config, its tensor names, and which megalm models it can hold.

A family is one small subclass of :class:`Family` in a file of its own, registered in ``families.py``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from megalm.config.schema import Model
from megalm.config.violation import format_value
from megalm.convert.mapping import Form, Plain, Rule
from megalm.convert.untrusted.json_fields import Fields

ACTIVATIONS = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu", "gelu": "gelu_erf"}
"""The library's names of GELU ▶ megalm's: the tanh approximation, or the exact function."""

ACTIVATION_NAMES = {"gelu": "gelu_new", "gelu_erf": "gelu"}
"""megalm's names of activations ▶ the library's."""


class Family(ABC):
    """One architecture of the library.

    Attributes:
        model_type: how ``config.json`` names it.
        title: its usual name.
        architecture: the library's class with a head.
        prefix: begins the names of all tensors but the head's; some published files leave it out.
        word_embedding: name of the word embedding, without the prefix.
        head_prefixes: begin the names of the head's tensors.
        head_title: the head's usual name.
        renamed: older spellings in published files, patterns ▶ replacements.
        ignored: tensors that are constants of the architecture.
        left_out: tensors that megalm has no place for, patterns ▶ what they are.
    """

    model_type: ClassVar[str]
    title: ClassVar[str]
    architecture: ClassVar[str]
    prefix: ClassVar[str]
    word_embedding: ClassVar[str]
    head_prefixes: ClassVar[tuple[str, ...]] = ("lm_head.",)
    head_title: ClassVar[str] = "output projection"
    renamed: ClassVar[dict[str, str]] = {}
    ignored: ClassVar[tuple[str, ...]] = ()
    left_out: ClassVar[dict[str, str]] = {}

    @abstractmethod
    def model_from_config(self, fields: Fields) -> Model:
        """The architecture that a ``config.json`` describes; what megalm does not have is noted in ``fields``."""

    @abstractmethod
    def reasons_against(self, model: Model) -> list[str]:
        """Why the family cannot be this model, one phrase each; empty: it can."""

    @abstractmethod
    def config_from_model(self, model: Model) -> dict[str, Any]:
        """The fields of ``config.json`` that describe this model."""

    @abstractmethod
    def rules(self, model: Model) -> list[Rule]:
        """One rule per tensor of the model."""

    def notes(self, fields: Fields) -> list[str]:  # noqa: ARG002 - most have no such field
        """What a ``config.json`` says that changes no logits and that megalm has no place for, one line each."""
        return []

    def losses(self, model: Model) -> list[str]:  # noqa: ARG002 - most have a place for everything
        """What of a model changes no logits and has no place in the family, one line each."""
        return []

    def duplicates(self, model: Model) -> dict[str, str]:
        """Tensors that may be in a file and must then equal another: their names ▶ the other's."""
        return {"lm_head.weight": self.prefix + self.word_embedding} if model.tie_embeddings else {}

    def stand_ins(self, model: Model) -> dict[str, str]:  # noqa: ARG002 - most have none, whatever the model
        """Tensors that take another's place where a file lacks it, and else mean nothing: their names ▶ the other's."""
        return {}

    def copies(self, model: Model) -> dict[str, str]:  # noqa: ARG002 - most need none, whatever the model
        """Tensors that the library wants to find in a file beside others that they equal: names ▶ the others'."""
        return {}

    def fixed_ids(self, model: Model) -> dict[str, int]:  # noqa: ARG002 - most compute with no special token
        """Ids of special tokens that the architecture computes with, under their names in ``config.json``."""
        return {}

    def canonical_names(self, stored: Iterable[str]) -> list[tuple[str, str]]:
        """Pairs (name as this family's rules have it, name in the file): prefixes and old spellings vary."""
        stored = list(stored)
        bare = not any(name.startswith(self.prefix) for name in stored)
        return [(self._canonical(name, bare), name) for name in stored]

    def _canonical(self, name: str, bare: bool) -> str:
        if bare and not name.startswith(self.head_prefixes):
            name = self.prefix + name
        for pattern, replacement in self.renamed.items():
            name = re.sub(pattern, replacement, name)
        return name

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor means nothing, by its canonical name."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)

    def what_is_left_out(self, name: str) -> str | None:
        """What a tensor is that megalm has no place for; None: it has one, or nobody knows it."""
        return next((what for pattern, what in self.left_out.items() if re.fullmatch(pattern, name)), None)


def head_dim_from(fields: Fields, name: str, *, hidden: int, heads: int, default: int | None = None) -> int | None:
    """A model's ``head_dim`` from a field that may give it; None: hidden / heads.

    ``default`` is what the library takes where the field is absent.
    """
    if name not in fields and default is None:
        return None
    head_dim = fields.count(name, default)
    return None if head_dim * heads == hidden else head_dim


def dropout_note(fields: Fields, residual: str, embedding: str, default: float) -> list[str]:
    """That the embedding's dropout has no place of its own, where it is not the residual stream's; else empty."""
    dropped, of_embedding = (fields.number(name, default) for name in (residual, embedding))
    if dropped == of_embedding:
        return []
    return [f"left out {embedding}={of_embedding:g}: megalm drops as much of the embedding as {residual}={dropped:g}"]


def unlike(model: Model, **wanted: object) -> list[str]:
    """Fields of a model that are not as wanted, one phrase each; a tuple lists what would do."""
    found = []
    for name, choices in wanted.items():
        value = getattr(model, name)
        if value not in (choices if isinstance(choices, tuple) else (choices,)):
            right = choices[0] if isinstance(choices, tuple) else choices
            found.append(f"model.{name}={format_value(value)}, not {format_value(right)}")
    return found


def unlike_any(model: Model, *allowed: str) -> list[str]:
    """What few families have, one phrase each.

    Args:
        model: what is to be a family's.
        allowed: what the family does have: ``head_dim``, ``qk_norm``, ``attention_windows``, ``position_offset`` or
            ``biases``, of which it then says itself where it has them.
    """
    plain: dict[str, object] = {"qk_norm": False}
    if model.position == "learned":
        plain["position_offset"] = 0
    reasons = unlike(model, **{name: value for name, value in plain.items() if name not in allowed})
    if "head_dim" not in allowed and model.attention_size != model.hidden_size:
        reasons.append(f"model.head_dim={format_value(model.head_dim)}, not {model.hidden_size / model.num_heads:g}")
    if "attention_windows" not in allowed and any(model.attention_windows):
        reasons.append(f"model.attention_windows={list(model.attention_windows)}, not [0]")
    if "biases" not in allowed:
        reasons += unlike_biases(
            model, qkv=model.bias, projection=model.bias, norm=model.bias and model.norm == "layernorm"
        )
    return reasons


def unlike_biases(
    model: Model, *, qkv: bool, projection: bool, mlp: bool | None = None, norm: bool | None = None
) -> list[str]:
    """Layers of a model that have a bias where they should not, or the reverse, one phrase each; None: either way."""
    found = (
        ("qkv_bias", model.has_qkv_bias, qkv),
        ("projection_bias", model.has_projection_bias, projection),
        ("bias", model.bias, mlp),
        ("norm_bias", model.has_norm_bias, norm),
    )
    return [
        f"model.{name}={format_value(has)}, not {format_value(wanted)}"
        for name, has, wanted in found
        if wanted is not None and has != wanted
    ]


def layer_rules(
    name: str, foreign: str | Sequence[str], *, bias: bool, form: Form | None = None, bias_form: Form | None = None
) -> list[Rule]:
    """Rules of a layer's weight and bias.

    Args:
        name: the layer's, in megalm.
        foreign: the layers there whose parts make it up.
        bias: whether it has a bias.
        form: of the weight; None: the same tensor.
        bias_form: of the bias; None: the same tensor.
    """
    layers = (foreign,) if isinstance(foreign, str) else tuple(foreign)
    rules = [Rule(f"{name}.weight", tuple(f"{layer}.weight" for layer in layers), form or Plain())]
    if bias:
        rules.append(Rule(f"{name}.bias", tuple(f"{layer}.bias" for layer in layers), bias_form or Plain()))
    return rules
