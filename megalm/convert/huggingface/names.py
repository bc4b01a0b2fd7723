"""The architecture that a Hugging Face ``config.json`` describes, and which stored tensors belong to it.

DeepSpeed's files hold such models too, their tensors neither in safetensors nor all under the library's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.schema import Model
from megalm.config.violation import format_value, spoken_list
from megalm.convert.checks import check_architecture
from megalm.convert.huggingface.families import FAMILIES
from megalm.convert.huggingface.family import Family
from megalm.convert.mapping import Shape
from megalm.convert.untrusted.json_fields import Fields, read_json
from megalm.convert.weights import full_shapes
from megalm.errors import CheckpointError


@dataclass(frozen=True)
class Architecture:
    """What a ``config.json`` says.

    Attributes:
        family: whose names and arrangement the tensors have.
        model: the architecture.
        notes: what is left out, one line each.
    """

    family: Family
    model: Model
    notes: tuple[str, ...]


def read_architecture(file: Path) -> Architecture:
    """The architecture that a ``config.json`` describes.

    Raises:
        CheckpointError: it cannot be read, or megalm has no such model: every reason, one per line.
    """
    fields = Fields(file, read_json(file))
    model_type = fields.values.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        lacks = what_megalm_lacks(fields.values)
        has = f"the model has {spoken_list(lacks, 'and')}, which megalm has not; " if lacks else ""
        fields.problem("model_type", f"{has}megalm converts {spoken_list(FAMILIES, 'and')}")
        fields.check()
    assert family is not None
    if "quantization_config" in fields:
        fields.problem("quantization_config", "quantized weights are not converted; take the original model")
    model = family.model_from_config(fields)
    notes = family.notes(fields)
    fields.check()
    check_architecture(file, model)
    return Architecture(family, model, tuple(notes))


_LACKING: dict[str, tuple[str, ...]] = {
    "a mixture of experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size"),
    "an encoder and a decoder": ("is_encoder_decoder", "decoder_layers", "num_decoder_layers"),
    "state-space layers": ("state_size", "ssm_cfg", "mamba_d_state", "d_state", "mamba_num_heads", "ssm_state_size"),
    "latent attention (MLA)": ("kv_lora_rank", "q_lora_rank"),
    "attention in a sliding window": ("sliding_window", "attention_window", "sliding_window_pattern", "window_size"),
    "layers of different kinds": ("layer_types", "layers_block_type", "attn_layer_period", "hybrid_override_pattern"),
    "linear attention": ("linear_num_key_heads", "attention_hidden_size", "lin_attn_config"),
    "soft-capped logits": ("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap"),
    "relative position biases": ("relative_attention_num_buckets", "alibi", "relative_attention"),
    "images, audio or several modalities": ("vision_config", "audio_config", "text_config", "image_token_id"),
}
"""What megalm's models do not have ▶ the fields of a ``config.json`` that tell of it."""


def what_megalm_lacks(values: Mapping[str, Any]) -> list[str]:
    """What the architecture of a ``config.json`` has and megalm has not, as its fields tell, each with the field."""
    found = []
    for what, names in _LACKING.items():
        name = next((name for name in names if _is_there(values.get(name))), None)
        if name is not None:
            found.append(f"{what} ({name}={format_value(values[name])})")
    return found


def _is_there(value: Any) -> bool:
    """Whether a field asks for a feature; null, false, 0, or 1 expert mean that the model does not have it."""
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return len(set(value)) > 1
    return value is True or (bool(value) and value not in (1, "none"))


@dataclass(frozen=True)
class Names:
    """What the tensors of a file are to an architecture.

    Attributes:
        stored: names that the family's rules have ▶ names in the file.
        duplicates: names of tensors that are there twice and must be equal ▶ the second's.
        ignored: what may be there and is not read.
        notes: what is left out, one line each.
    """

    stored: dict[str, str]
    duplicates: dict[str, str]
    ignored: frozenset[str]
    notes: tuple[str, ...]


def _canonical_names(path: Path, family: Family, found: Iterable[str]) -> dict[str, str]:
    """Names as the family's rules have them ▶ names in the file.

    Raises:
        CheckpointError: two tensors have one name.
    """
    named: dict[str, str] = {}
    for canonical, stored in family.canonical_names(found):
        if canonical in named:
            raise CheckpointError(f"{path}: {stored} and {named[canonical]} are two names of one tensor")
        named[canonical] = stored
    return named


def sort_names(path: Path, family: Family, model: Model, found: Mapping[str, Shape]) -> Names:
    """Which tensors of a file are which, by name and shape.

    Args:
        path: of the file, for messages.
        family: the architecture.
        model: its sizes; they must have been compared with the file's.
        found: names in the file ▶ shapes.

    Raises:
        CheckpointError: two tensors have one name.
    """
    stored = _canonical_names(path, family, found)
    duplicates, stand_ins = family.duplicates(model), family.stand_ins(model)
    for name, original in (duplicates | stand_ins).items():
        if name in stored and original not in stored:  # a file may keep either of two names of one tensor
            stored[original] = stored.pop(name)
    wanted = foreign_shapes(family, model)
    # Of another shape than the tensor it should equal, a duplicate is an error too, as one that nobody knows.
    twice = {
        original: name
        for name, original in duplicates.items()
        if name in stored and found[stored[name]] == wanted.get(original)
    }
    left_out = {name: what for name in stored if (what := family.what_is_left_out(name))}
    ignored = {name for name in stored if name in left_out or name in stand_ins or family.is_ignored(name)}
    notes = {what: [name for name, other in left_out.items() if other == what] for what in left_out.values()}
    return Names(
        stored,
        twice,
        frozenset(ignored | set(twice.values())),
        tuple(f"left out {what} ({spoken_list(names, 'and')})" for what, names in notes.items()),
    )


def missing_head(family: Family, model: Model, present: Iterable[str]) -> str | None:
    """That none of the head's tensors is there, as in a model saved without one; None: some are, or it needs none."""
    wanted = [name for name in foreign_shapes(family, model) if name.startswith(family.head_prefixes)]
    if not wanted or any(name.startswith(family.head_prefixes) for name in present):
        return None
    return (
        f"has no {family.head_title} ({wanted[0].rpartition('.')[0]}…): a bare model, or one with a head for another "
        f"task; convert a {family.architecture}, which predicts tokens"
    )


def foreign_shapes(family: Family, model: Model) -> dict[str, Shape]:
    """Shapes of the tensors that the rules name."""
    shapes = full_shapes(model)
    return {
        foreign: shape
        for rule in family.rules(model)
        for foreign, shape in zip(rule.foreign, rule.form.foreign_shapes(shapes[rule.name]), strict=True)
    }
