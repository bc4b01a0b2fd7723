"""Rotary positions in a ``config.json``, in the spellings of either generation of the library.

Version 5 collects them in ``rope_parameters``; earlier ones have ``rope_theta`` and ``rope_scaling``, which version 5
reads too and which are what is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megalm.checkpoint.adapters.json_fields import Fields
from megalm.config.schema import Model

_TYPES = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class RotaryNames:
    """What a family calls the fields that are its own.

    Attributes:
        base: the base of the wavelengths.
        fraction: the share of a head that is rotated; None: the family rotates all of it.
        default_fraction: what holds where it is absent.
    """

    base: str = "rope_theta"
    fraction: str | None = None
    default_fraction: float = 1.0


def rotary_from_config(fields: Fields, *, names: RotaryNames, length: int, head_dim: int) -> dict[str, Any]:
    """The ``rotary_…`` fields of a model.

    Args:
        fields: of ``config.json``; problems are noted there.
        names: the family's spellings.
        length: the longest sequence.
        head_dim: elements of a head.
    """
    new = fields.mapping("rope_parameters")
    scaling = fields.mapping("rope_scaling") if new is None else new
    base = new if new is not None and "rope_theta" in new else fields
    found: dict[str, Any] = {
        "position": "rotary",
        "rotary_base": base.number("rope_theta" if base is new else names.base, 10000.0),
        "rotary_fraction": _fraction(fields, new, names, head_dim),
    }
    if scaling is None:
        return found
    kind = scaling.choice("rope_type" if "rope_type" in scaling else "type", _TYPES, "default")
    if kind == "none":
        return found
    found |= {"rotary_scaling": kind, "rotary_factor": _factor(scaling, kind, length)}
    if kind == "linear":
        return found
    found["rotary_original_length"] = scaling.count("original_max_position_embeddings", length)
    if kind == "llama3":
        found["rotary_low_frequency_factor"] = scaling.number("low_freq_factor")
        found["rotary_high_frequency_factor"] = scaling.number("high_freq_factor")
    else:
        found["rotary_beta_fast"] = scaling.number("beta_fast", 32.0)
        found["rotary_beta_slow"] = scaling.number("beta_slow", 1.0)
        scaling.must_be("truncate", True, "megalm rounds the ends of the ramp to whole pairs")
        _check_amplitude(scaling, found["rotary_factor"])
    return found


def rotary_to_config(model: Model, *, names: RotaryNames) -> dict[str, Any]:
    """The fields of ``config.json``."""
    fields: dict[str, Any] = {names.base: model.rotary_base}
    if names.fraction is not None:
        fields[names.fraction] = model.rotary_fraction
    if model.rotary_scaling == "none":
        return fields | {"rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": model.rotary_scaling, "factor": model.rotary_factor}
    if model.rotary_scaling != "linear":
        scaling["original_max_position_embeddings"] = int(original_length(model))
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
    if model.rotary_scaling in ("llama3", "yarn") and not original_length(model).is_integer():
        reasons.append(
            f"model.rotary_original_length=null, and model.sequence_length / model.rotary_factor = "
            f"{original_length(model):g} is no whole number"
        )
    return reasons


def original_length(model: Model) -> float:
    """The context that the unscaled model was trained with."""
    return float(model.rotary_original_length or model.sequence_length / model.rotary_factor)


def _fraction(fields: Fields, new: Fields | None, names: RotaryNames, head_dim: int) -> float:
    """The share of a head that is rotated: the library rounds its elements down."""
    place, name = (fields, names.fraction or "partial_rotary_factor")
    if new is not None and "partial_rotary_factor" in new:
        place, name = new, "partial_rotary_factor"
    if names.fraction is None:
        if place.number(name, 1.0) != 1.0:
            place.problem(name, "this architecture rotates whole heads; only 1.0 can be converted")
        return 1.0
    return int(head_dim * place.number(name, names.default_fraction)) / head_dim


def _factor(scaling: Fields, kind: str, length: int) -> float:
    if kind == "yarn" and "factor" not in scaling:
        return length / scaling.count("original_max_position_embeddings", length)
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
    elif "mscale" in scaling and "mscale_all_dim" in scaling:
        actual = _amplitude(factor, scaling.number("mscale")) / _amplitude(factor, scaling.number("mscale_all_dim"))
    if abs(actual - expected) > _TOLERANCE:
        name = "attention_factor" if "attention_factor" in scaling else "mscale"
        scaling.problem(name, f"scales rotations by {actual:g}; megalm by 0.1*ln(factor) + 1 = {expected:g}")


def _amplitude(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1.0 else 1.0
