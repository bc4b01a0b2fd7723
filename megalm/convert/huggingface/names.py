"""The architecture that a Hugging Face ``config.json`` describes, and which stored tensors belong to it.

DeepSpeed's files hold such models too, their tensors neither in safetensors nor all under the library's names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.schema import Model
from megalm.config.violation import spoken_list
from megalm.convert.checks import check_architecture
from megalm.convert.huggingface.families import FAMILIES
from megalm.convert.huggingface.family import Family
from megalm.convert.huggingface.lacking import what_megalm_lacks
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
        converted = spoken_list((known.title for known in FAMILIES.values()), "and")
        fields.problem("model_type", f"{_refusal(fields.values)}megalm converts {converted}")
        fields.check()
    assert family is not None
    if "quantization_config" in fields:
        fields.problem("quantization_config", "quantized weights are not converted; take the original model")
    model = family.model_from_config(fields)
    notes = family.notes(fields)
    fields.check()
    check_architecture(file, model)
    return Architecture(family, model, tuple(notes))


def _refusal(values: Mapping[str, Any]) -> str:
    """Why an architecture is not converted: what megalm lacks, or that its tensors have names that megalm lacks."""
    lacks = what_megalm_lacks(values)
    if lacks:
        return f"the model has {spoken_list(lacks, 'and')}, which megalm has not; "
    return "megalm does not know the names of its tensors; " if "model_type" in values else ""


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
        f"task; convert a {family.architecture}, which predicts tokens{_or_tied(model)}"
    )


def _or_tied(model: Model) -> str:
    """Some makers leave the head out since it is the embedding, and do not say so in ``config.json``."""
    if model.tie_embeddings or not model.causal:
        return ""
    return ", or, where its head is to be the embedding, set tie_word_embeddings to true in config.json"


def foreign_shapes(family: Family, model: Model) -> dict[str, Shape]:
    """Shapes of the tensors that the rules name."""
    shapes = full_shapes(model)
    return {
        foreign: shape
        for rule in family.rules(model)
        for foreign, shape in zip(rule.foreign, rule.form.foreign_shapes(shapes[rule.name]), strict=True)
    }
