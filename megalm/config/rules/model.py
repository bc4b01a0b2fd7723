"""Rules about the architecture: heads, and rotary positions."""

from __future__ import annotations

from collections.abc import Iterator

from megalm.config.job import Job, Rule, divisors, needs
from megalm.config.schema import Config, Model
from megalm.config.violation import Fix, Violation

_NOTHING = 1e-6
"""What a share of a head is off by, in elements, when it is only rounded."""


def has_uneven_heads(model: Model) -> bool:
    """Whether the width of heads follows from the hidden size, and the number of heads does not divide it."""
    return model.head_dim is None and model.hidden_size % model.num_heads > 0


@needs("model.hidden_size", "model.num_heads")
def heads_divide_hidden_size(job: Job) -> Iterator[Violation]:
    """Every head is equally wide; heads whose width is given need not divide the hidden size."""
    hidden, heads = job.config.model.hidden_size, job.config.model.num_heads
    if has_uneven_heads(job.config.model):
        above = hidden + heads - hidden % heads
        yield Violation(
            "model.num_heads",
            heads,
            f"does not divide model.hidden_size={hidden}",
            fixes=(Fix("model.num_heads", divisors(hidden)), Fix("model.hidden_size", (above,))),
        )


@needs("model.num_heads", "model.num_kv_heads")
def kv_heads_divide_heads(job: Job) -> Iterator[Violation]:
    """Every key/value head serves equally many query heads (Ainslie et al. 2023)."""
    heads, shared = job.config.model.num_heads, job.config.model.kv_heads
    if heads % shared:
        yield Violation(
            "model.num_kv_heads",
            shared,
            f"does not divide model.num_heads={heads}",
            fixes=(Fix("model.num_kv_heads", (*divisors(heads), None)),),
        )


@needs("model.hidden_size", "model.num_heads", "model.head_dim")
def rotary_heads_are_even(job: Job) -> Iterator[Violation]:
    """Rotary positions turn pairs of a head's elements (Su et al. 2021)."""
    model = job.config.model
    hidden, heads = model.hidden_size, model.num_heads
    if model.position != "rotary" or model.head_size % 2 == 0:
        return
    if model.head_dim is not None:
        yield Violation(
            "model.head_dim",
            model.head_dim,
            "an odd number of elements, and model.position=rotary turns pairs of them",
            fixes=(Fix("model.head_dim", (model.head_dim + 1,)), Fix("model.position", ("learned",))),
        )
    elif hidden % heads == 0:
        yield Violation(
            "model.num_heads",
            heads,
            f"makes heads of {hidden // heads} elements, and model.position=rotary needs an even number",
            fixes=(Fix("model.num_heads", divisors(hidden)), Fix("model.position", ("learned",))),
        )


@needs("model.hidden_size", "model.num_heads", "model.head_dim", "model.rotary_fraction")
def rotary_turns_whole_pairs(job: Job) -> Iterator[Violation]:
    """The share of a head that is rotated is a whole, even number of elements, at least two."""
    model = job.config.model
    if model.position != "rotary" or model.head_size % 2 or has_uneven_heads(model):
        return
    rotated = model.head_size * model.rotary_fraction
    # 14 of 50 elements are a share of 0.28, and 50 * 0.28 is a little more than 14.
    if abs(rotated - round(rotated)) < _NOTHING and round(rotated) % 2 == 0 and round(rotated) >= 2:
        return
    even = {max(2, 2 * int(rotated / 2)), min(model.head_size, 2 * int(rotated / 2) + 2)}
    yield Violation(
        "model.rotary_fraction",
        model.rotary_fraction,
        f"rotates {rotated:g} of a head's {model.head_size} elements, and pairs are turned",
        fixes=(Fix("model.rotary_fraction", tuple(size / model.head_size for size in sorted(even))),),
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


LARGEST_PROBABILITIES = 2**30
"""Bytes of one layer's attention probabilities of a micro-batch, in fp32, that dropout may hold on a GPU.

Backward keeps about three tensors of that size per layer (probabilities, factors of dropout, their product), so at the
limit 24 layers keep 72 GiB, which is all that a GPU of 80 GB has. Without dropout fused attention keeps none of it.
"""


def dropped_probabilities(config: Config) -> int:
    """Bytes of one layer's attention probabilities on a rank, [B, N/ranks, S, S] in fp32; 0 where none is in memory."""
    model, parallel = config.model, config.parallel
    if not model.attention_dropout or (parallel.cp > 1 and parallel.cp_attention == "ring"):  # a ring has tiles
        return 0
    heads = -(-model.num_heads // (parallel.tp * parallel.cp))
    return 4 * config.train.micro_batch_size * heads * model.sequence_length**2


def attention_dropout_violation(config: Config) -> Violation | None:
    """What is wrong with attention dropout on GPUs; None: nothing."""
    size = dropped_probabilities(config)
    if size <= LARGEST_PROBABILITIES:
        return None
    largest = config.train.micro_batch_size * LARGEST_PROBABILITIES // size
    fixes = [Fix("model.attention_dropout", (0.0,))]
    if largest:
        fixes.append(Fix("train.micro_batch_size", (largest,)))
    return Violation(
        "model.attention_dropout",
        config.model.attention_dropout,
        f"on GPUs each layer would hold its probabilities in memory several times, {size / 2**30:.1f} GiB each in fp32 "
        f"(micro-batch × heads of a rank × sequence² × 4); at most {LARGEST_PROBABILITIES / 2**30:.0f} GiB",
        fixes=tuple(fixes),
    )


@needs("model.attention_dropout", "model.sequence_length", "model.num_heads", "train.micro_batch_size")
def attention_dropout_fits_gpus(job: Job) -> Iterator[Violation]:
    """Dropout of attention probabilities holds them all in memory, where it is known that GPUs compute."""
    config = job.config
    on_gpus = config.launch.device == "cuda" or (config.cluster.gpu is not None and config.launch.device != "cpu")
    if on_gpus and (violation := attention_dropout_violation(config)) is not None:
        yield violation


RULES: tuple[Rule, ...] = (
    heads_divide_hidden_size,
    kv_heads_divide_heads,
    rotary_heads_are_even,
    rotary_turns_whole_pairs,
    rotary_scaling_is_whole,
    attention_dropout_fits_gpus,
)
