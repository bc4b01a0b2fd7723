"""Rotary positions in a ``config.json``, in the spellings of either generation of the library.

Version 5 collects them in ``rope_parameters``; earlier ones have ``rope_theta`` and ``rope_scaling``, which version 5
reads too and which are what is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megalm.config.schema import Model
from megalm.config.violation import spoken_list
from megalm.convert.untrusted.json_fields import Fields

_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_LACKING = {
    "longrope": "LongRoPE (Ding et al. 2024)",
    "su": "LongRoPE (Ding et al. 2024)",
    "dynamic": "scaling that changes with the length of a text",
    "mrope": "positions of images (M-RoPE)",
}
"""Scalings of the library that megalm does not have ▶ their names."""

_TOLERANCE = 1e-6
_MAPPINGS = ("rope_parameters", "rope_scaling")
_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class RotaryNames:
    """What a family calls the fields that are its own.

    Attributes:
        base: the base of the wavelengths.
        fraction: the share of a head that is rotated; None: the family rotates all of it.
        default_fraction: what holds where it is absent.
        scalings: those of megalm's that the library computes for the family.
    """

    base: str = "rope_theta"
    fraction: str | None = None
    default_fraction: float = 1.0
    scalings: tuple[str, ...] = ("linear", "llama3", "yarn")


def rotary_from_config(fields: Fields, *, names: RotaryNames, length: int, head_dim: int) -> dict[str, Any]:
    """The ``rotary_…`` fields of a model.

    Args:
        fields: of ``config.json``; problems are noted there.
        names: the family's spellings.
        length: the longest sequence.
        head_dim: elements of a head.
    """
    scaling = _scaling_of(fields)
    base, name = (scaling, "rope_theta") if scaling is not None and "rope_theta" in scaling else (fields, names.base)
    found: dict[str, Any] = {
        "position": "rotary",
        "rotary_base": base.number(name, 10000.0),
        "rotary_fraction": _fraction(fields, scaling, names, head_dim),
    }
    if scaling is None:
        return found
    kind = _kind(scaling, names)
    if kind == "none":
        return found
    if kind == "linear":
        return found | {"rotary_scaling": kind, "rotary_factor": _factor(scaling)}
    original = _original(fields, scaling, length)
    factor = length / original if kind == "yarn" and "factor" not in scaling else _factor(scaling)
    found |= {"rotary_scaling": kind, "rotary_factor": factor, "rotary_original_length": original}
    if kind == "llama3":
        found["rotary_low_frequency_factor"] = scaling.number("low_freq_factor")
        found["rotary_high_frequency_factor"] = scaling.number("high_freq_factor")
    else:
        found["rotary_beta_fast"] = scaling.number("beta_fast", 32.0)
        found["rotary_beta_slow"] = scaling.number("beta_slow", 1.0)
        scaling.must_be("truncate", True, "megalm rounds the ends of the ramp to whole pairs")
        _check_amplitude(scaling, factor)
    return found


def _kind(scaling: Fields, names: RotaryNames) -> str:
    """How positions are scaled, by megalm's name; ``none`` where it has no such scaling, which is noted."""
    name = "rope_type" if "rope_type" in scaling else "type"
    given = scaling.values.get(name, "default")
    allowed = {theirs: ours for theirs, ours in _TYPES.items() if ours in ("none", *names.scalings)}
    if isinstance(given, str) and given in _LACKING:
        scaling.problem(name, f"megalm has no {_LACKING[given]}; only {spoken_list(allowed)} can be converted")
        return "none"
    return scaling.choice(name, allowed, "default")


def rotary_to_config(model: Model, *, names: RotaryNames) -> dict[str, Any]:
    """The fields of ``config.json``."""
    fields: dict[str, Any] = {names.base: model.rotary_base}
    if names.fraction is not None:
        fields[names.fraction] = _library_fraction(model)
    if model.rotary_scaling == "none":
        return fields | {"rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": model.rotary_scaling, "factor": model.rotary_factor}
    if model.rotary_scaling != "linear":
        scaling[_ORIGINAL] = int(original_length(model))
    if model.rotary_scaling == "llama3":
        scaling["low_freq_factor"] = model.rotary_low_frequency_factor
        scaling["high_freq_factor"] = model.rotary_high_frequency_factor
    if model.rotary_scaling == "yarn":
        scaling["beta_fast"] = model.rotary_beta_fast
        scaling["beta_slow"] = model.rotary_beta_slow
    return fields | {"rope_scaling": scaling}


def reasons_against_rotary(model: Model, *, names: RotaryNames) -> list[str]:
    """Why a family with these spellings cannot have this model's rotary positions."""
    reasons = []
    if names.fraction is None and model.rotary_fraction != 1.0:
        reasons.append(f"model.rotary_fraction={model.rotary_fraction:g}, not 1")
    if model.rotary_scaling not in ("none", *names.scalings):
        reasons.append(f"model.rotary_scaling={model.rotary_scaling}, not none")
    if model.rotary_scaling in ("llama3", "yarn") and not original_length(model).is_integer():
        reasons.append(
            f"model.rotary_original_length=null, and model.sequence_length / model.rotary_factor = "
            f"{original_length(model):g} is no whole number"
        )
    return reasons


def original_length(model: Model) -> float:
    """The context that the unscaled model was trained with."""
    return float(model.rotary_original_length or model.sequence_length / model.rotary_factor)


def _scaling_of(fields: Fields) -> Fields | None:
    """What a config says of rotation in a mapping of its own; an empty one says nothing, as in the library."""
    found = [mapping for name in _MAPPINGS if (mapping := fields.mapping(name)) is not None and mapping.values]
    # Version 5 of the library takes rope_scaling where there are both, earlier ones know no other.
    if len(found) == len(_MAPPINGS) and len({str(_effective(fields, mapping)) for mapping in found}) > 1:
        fields.problem(
            "rope_scaling", "contradicts rope_parameters, which is its newer name; keep the one that is right"
        )
    return found[-1] if found else None


def _effective(fields: Fields, mapping: Fields) -> dict[str, Any]:
    """What a mapping says, with the fields beside it that it takes where it is silent, and its type under one name."""
    beside = {name: fields.values[name] for name in ("rope_theta", "partial_rotary_factor") if name in fields}
    kind = mapping.values.get("rope_type", mapping.values.get("type", "default"))
    return beside | mapping.values | {"rope_type": kind, "type": kind}


def _original(fields: Fields, scaling: Fields, length: int) -> int:
    """The length that the model was trained with before it was stretched: the library prefers the one at the top."""
    inner = scaling.count(_ORIGINAL, length)
    if _ORIGINAL not in fields:
        return inner
    outer = fields.count(_ORIGINAL)
    if _ORIGINAL in scaling and inner != outer:
        fields.problem(_ORIGINAL, f"contradicts the {inner} beside the rotation's factor; keep the one that is right")
    return outer


def _fraction(fields: Fields, scaling: Fields | None, names: RotaryNames, head_dim: int) -> float:
    """The share of a head that is rotated: the library rounds its elements down."""
    place, name = (fields, names.fraction or "partial_rotary_factor")
    if scaling is not None and "partial_rotary_factor" in scaling:
        place, name = scaling, "partial_rotary_factor"
    if names.fraction is None:
        if place.number(name, 1.0) != 1.0:
            place.problem(name, "this architecture rotates whole heads; only 1.0 can be converted")
        return 1.0
    return int(head_dim * place.number(name, names.default_fraction)) / head_dim


def _library_fraction(model: Model) -> float:
    """The share of a head that the library, which rounds its elements down, takes for as many as megalm rotates."""
    rotated = round(model.head_size * model.rotary_fraction)
    exact = int(model.head_size * model.rotary_fraction) == rotated
    return model.rotary_fraction if exact else (rotated + 0.5) / model.head_size


def _factor(scaling: Fields) -> float:
    factor = scaling.number("factor")
    if factor < 1.0:
        scaling.problem("factor", "below 1, which would shorten the context")
    return max(factor, 1.0)


def _check_amplitude(scaling: Fields, factor: float) -> None:
    """YaRN's factor of cosines and sines follows from the factor; some models set another, which megalm has not."""
    expected = _amplitude(factor, 1.0)
    actual = expected
    if "attention_factor" in scaling:
        actual = scaling.number("attention_factor")
    elif scaling.values.get("mscale") and scaling.values.get("mscale_all_dim"):  # to the library, 0 is none
        actual = _amplitude(factor, scaling.number("mscale")) / _amplitude(factor, scaling.number("mscale_all_dim"))
    if abs(actual - expected) > _TOLERANCE:
        name = "attention_factor" if "attention_factor" in scaling else "mscale"
        scaling.problem(name, f"scales rotations by {actual:g}; megalm by 0.1*ln(factor) + 1 = {expected:g}")


def _amplitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0
