"""Where each tensor of a model is in Megatron-LM: its name, the order of its rows, and how ranks share it.

Names here are those of Megatron-Core's "local" layers, numbered within a stage. Its Transformer Engine layers keep the
norms inside the products after them, and models from before Megatron-Core have other names: both are spellings of
these. From Megatron-LM's ``megatron/core/models/gpt`` and ``megatron/legacy/model``.

Shape legend: T tensor-parallel degree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto

import torch
from torch import Tensor

from megalm.config.schema import Model
from megalm.convert.mapping import Form, GroupedHeads, Plain, Shape

TIED_COPY = "output_layer.weight"
"""The last stage's copy of a tied word embedding; and the output projection of an untied model."""

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")

_SPELLINGS = (
    (r"language_model\.", ""),
    (r"(?:encoder|transformer)\.layers\.", "decoder.layers."),
    (r"(?:encoder|transformer)\.final_(?:layer)?norm\.", "decoder.final_layernorm."),
    (r"word_embeddings_for_head\.weight", TIED_COPY),
    (r"(decoder\.layers\.\d+)\.input_norm\.", r"\1.input_layernorm."),
    (r"(decoder\.layers\.\d+)\.post_attention_(?:layer)?norm\.", r"\1.pre_mlp_layernorm."),
    (r"(decoder\.layers\.\d+)\.(?:self_)?attention\.query_key_value\.", r"\1.self_attention.linear_qkv."),
    (r"(decoder\.layers\.\d+)\.(?:self_)?attention\.dense\.", r"\1.self_attention.linear_proj."),
    (r"(decoder\.layers\.\d+)\.mlp\.dense_h_to_4h\.", r"\1.mlp.linear_fc1."),
    (r"(decoder\.layers\.\d+)\.mlp\.dense_4h_to_h\.", r"\1.mlp.linear_fc2."),
    (r"(decoder\.layers\.\d+)\.self_attention\.linear_qkv\.layer_norm_(weight|bias)", r"\1.input_layernorm.\2"),
    (r"(decoder\.layers\.\d+)\.mlp\.linear_fc1\.layer_norm_(weight|bias)", r"\1.pre_mlp_layernorm.\2"),
)
"""Beginnings of names ▶ what they are here, applied in this order."""

_TRANSFORMER_ENGINE = (
    (r"(decoder\.layers\.\d+)\.input_layernorm\.(weight|bias)", r"\1.self_attention.linear_qkv.layer_norm_\2"),
    (r"(decoder\.layers\.\d+)\.pre_mlp_layernorm\.(weight|bias)", r"\1.mlp.linear_fc1.layer_norm_\2"),
)

_IGNORED = re.compile(r".*(\._extra_state|rotary_pos_emb\.inv_freq|rotary_emb\.inv_freq)")


class Split(Enum):
    """How tensor-parallel ranks share a tensor."""

    COPIES = auto()
    """Each has all of it."""
    ROWS = auto()
    """Each has 1/T of the rows."""
    COLUMNS = auto()
    """Each has 1/T of the columns."""
    HALVES = auto()
    """Each has 1/T of the first half of the rows, then 1/T of the second: SwiGLU's gate and up."""
    VOCABULARY = auto()
    """Each has 1/T of the rows, of which the last are padding."""

    def local_shape(self, shape: Shape, tp: int) -> Shape:
        """What one rank has of a tensor of ``shape``; padding is not counted."""
        if self is Split.COPIES:
            return shape
        if self is Split.COLUMNS:
            return (shape[0], shape[1] // tp)
        return (shape[0] // tp, *shape[1:])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The tensor of which the ranks have these parts."""
        if self is Split.COPIES or len(parts) == 1:
            return parts[0]
        if self is Split.COLUMNS:
            return torch.cat(tuple(parts), dim=1)
        if self is Split.HALVES:
            halves = [part.chunk(2) for part in parts]
            return torch.cat([pair[0] for pair in halves] + [pair[1] for pair in halves])
        return torch.cat(tuple(parts))

    def cut(self, tensor: Tensor, tp: int) -> list[Tensor]:
        """What each rank has of a tensor that they share evenly, contiguous."""
        if self is Split.COPIES or tp == 1:
            return [tensor.contiguous()] * tp
        if self is Split.COLUMNS:
            return [part.contiguous() for part in tensor.chunk(tp, dim=1)]
        if self is Split.HALVES:
            first, second = (half.chunk(tp) for half in tensor.chunk(2))
            return [torch.cat(pair) for pair in zip(first, second, strict=True)]
        return list(tensor.contiguous().chunk(tp))


@dataclass(frozen=True)
class Placement:
    """One megalm tensor, and where it is.

    Attributes:
        name: megalm's.
        layer: number of its layer in the whole model; None: it is in none.
        foreign: its name in the layer, or in the stage.
        split: how ranks share it.
        form: the order of its rows.
    """

    name: str
    layer: int | None
    foreign: str
    split: Split
    form: Form = Plain()  # noqa: RUF009 - it has no state

    def foreign_name(self, first_layer: int) -> str:
        """Its name in a stage whose layers begin with this one."""
        return self.foreign if self.layer is None else f"decoder.layers.{self.layer - first_layer}.{self.foreign}"


def placements(model: Model) -> list[Placement]:
    """Where every tensor of a model is, in the order of the model."""
    places = [Placement("embedding.weight", None, "embedding.word_embeddings.weight", Split.VOCABULARY)]
    if model.position == "learned":
        places.append(Placement("position.weight", None, "embedding.position_embeddings.weight", Split.COPIES))
    for layer in range(model.num_layers):
        places += _layer(model, layer)
    places += _norm(model, None, "final_norm", "decoder.final_layernorm")
    if not model.tie_embeddings:
        places.append(Placement("head.weight", None, TIED_COPY, Split.VOCABULARY))
    return places


def _layer(model: Model, layer: int) -> list[Placement]:
    grouped = GroupedHeads(model.num_heads, model.kv_heads, model.head_size)
    first = ("mlp.gate_up", Split.HALVES) if model.activation == "swiglu" else ("mlp.up", Split.ROWS)
    places = _norm(model, layer, "attention_norm", "input_layernorm")
    places += _linear(layer, "attention.qkv", "self_attention.linear_qkv", Split.ROWS, model.has_qkv_bias, grouped)
    if model.qk_norm:
        for ours, theirs in (("query_norm", "q_layernorm"), ("key_norm", "k_layernorm")):
            name = f"blocks.{layer}.attention.{ours}.weight"
            places.append(Placement(name, layer, f"self_attention.{theirs}.weight", Split.COPIES))
    places += _linear(
        layer, "attention.projection", "self_attention.linear_proj", Split.COLUMNS, model.has_projection_bias
    )
    places += _norm(model, layer, "mlp_norm", "pre_mlp_layernorm")
    places += _linear(layer, first[0], "mlp.linear_fc1", first[1], model.bias)
    places += _linear(layer, "mlp.down", "mlp.linear_fc2", Split.COLUMNS, model.bias)
    return places


def _linear(layer: int, ours: str, theirs: str, split: Split, bias: bool, form: Form | None = None) -> list[Placement]:
    form = form or Plain()
    places = [Placement(f"blocks.{layer}.{ours}.weight", layer, f"{theirs}.weight", split, form)]
    if bias:
        # What is added after the ranks' products are summed is the same on all of them.
        bias_split = Split.COPIES if split is Split.COLUMNS else split
        places.append(Placement(f"blocks.{layer}.{ours}.bias", layer, f"{theirs}.bias", bias_split, form))
    return places


def _norm(model: Model, layer: int | None, ours: str, theirs: str) -> list[Placement]:
    prefix = "" if layer is None else f"blocks.{layer}."
    kinds = ("weight", "bias") if model.has_norm_bias else ("weight",)
    return [Placement(f"{prefix}{ours}.{kind}", layer, f"{theirs}.{kind}", Split.COPIES) for kind in kinds]


def canonical(name: str) -> str:
    """The name that a tensor has here, from any spelling."""
    for pattern, replacement in _SPELLINGS:
        name = re.sub(f"^{pattern}", replacement, name)
    return name


def transformer_engine(name: str) -> str:
    """The name that Transformer Engine's layers give a tensor."""
    for pattern, replacement in _TRANSFORMER_ENGINE:
        name = re.sub(f"^{pattern}$", replacement, name)
    return name


def is_ignored(name: str) -> bool:
    """Whether a tensor is none of the model's weights: scales of FP8, tables of angles."""
    return _IGNORED.fullmatch(name) is not None


def layer_of(name: str) -> int | None:
    """Number of a tensor's layer in its stage; None: it is in none."""
    found = _LAYER.fullmatch(name)
    return None if found is None else int(found[1])


def padded_vocabulary(vocab_size: int, divisor: int, tp: int) -> int:
    """Rows of the embedding of all ranks together: a multiple of ``divisor`` on each."""
    multiple = divisor * tp
    return -(-vocab_size // multiple) * multiple
