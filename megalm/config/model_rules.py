"""Rules about the architecture alone."""

from __future__ import annotations

from collections.abc import Iterator

from megalm.config.cross_rules import needs
from megalm.config.field_rules import Job
from megalm.config.violation import Fix, Violation

_NOTHING = 1e-6
"""What a share of a head is off by, in elements, when it is only rounded."""


@needs("model.hidden_size", "model.num_heads", "model.rotary_fraction")
def rotary_turns_whole_pairs(job: Job) -> Iterator[Violation]:
    """The share of a head that is rotated is a whole, even number of elements, at least two."""
    model = job.config.model
    if model.position != "rotary" or model.hidden_size % model.num_heads or model.head_dim % 2:
        return
    rotated = model.head_dim * model.rotary_fraction
    # 14 of 50 elements are a share of 0.28, and 50 * 0.28 is a little more than 14.
    if abs(rotated - round(rotated)) < _NOTHING and round(rotated) % 2 == 0 and round(rotated) >= 2:
        return
    even = {max(2, 2 * int(rotated / 2)), min(model.head_dim, 2 * int(rotated / 2) + 2)}
    yield Violation(
        "model.rotary_fraction",
        model.rotary_fraction,
        f"rotates {rotated:g} of a head's {model.head_dim} elements, and pairs are turned",
        fixes=(Fix("model.rotary_fraction", tuple(size / model.head_dim for size in sorted(even))),),
    )


@needs(
    "model.rotary_factor",
    "model.rotary_low_frequency_factor",
    "model.rotary_high_frequency_factor",
    "model.rotary_beta_fast",
    "model.rotary_beta_slow",
)
def rotary_scaling_is_whole(job: Job) -> Iterator[Violation]:
    """A stretched context names its factor, on rotary positions, and the ends of its ramp are in order."""
    model = job.config.model
    if model.rotary_scaling == "none":
        if model.rotary_factor != 1.0:
            yield Violation(
                "model.rotary_factor",
                model.rotary_factor,
                "stretches nothing: model.rotary_scaling=none",
                fixes=(
                    Fix("model.rotary_factor", (1.0,)),
                    Fix("model.rotary_scaling", ("linear", "llama3", "yarn")),
                ),
            )
        return
    if model.position != "rotary":
        yield Violation(
            "model.rotary_scaling",
            model.rotary_scaling,
            f"model.position={model.position} has no angles to stretch",
            fixes=(Fix("model.rotary_scaling", ("none",)), Fix("model.position", ("rotary",))),
        )
    low, high = model.rotary_low_frequency_factor, model.rotary_high_frequency_factor
    if model.rotary_scaling == "llama3" and low >= high:
        yield Violation(
            "model.rotary_low_frequency_factor",
            low,
            f"not below model.rotary_high_frequency_factor={high:g}, where the ramp ends",
            fixes=(Fix("model.rotary_low_frequency_factor", (high / 4,)),),
        )
    fast, slow = model.rotary_beta_fast, model.rotary_beta_slow
    if model.rotary_scaling == "yarn" and slow >= fast:
        yield Violation(
            "model.rotary_beta_slow",
            slow,
            f"not below model.rotary_beta_fast={fast:g}, where the ramp ends",
            fixes=(Fix("model.rotary_beta_slow", (fast / 32,)),),
        )
