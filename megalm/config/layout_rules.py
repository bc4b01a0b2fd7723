"""Rules about how a model's layers, heads and sequence split over a layout of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm

from megalm.config.cross_rules import needs
from megalm.config.field_rules import Job, divisors
from megalm.config.violation import Fix, Violation

_INTERLEAVED = "interleaved_1f1b"


@needs("parallel.pp", "parallel.virtual_stages")
def virtual_stages_have_their_schedule(job: Job) -> Iterator[Violation]:
    """Several stages per rank need the schedule that interleaves them, and more than one rank to go round."""
    parallel = job.config.parallel
    if parallel.virtual_stages > 1 and parallel.pp == 1:
        yield Violation(
            "parallel.virtual_stages",
            parallel.virtual_stages,
            "parallel.pp=1 has no bubble that virtual stages could shrink",
            fixes=(Fix("parallel.virtual_stages", (1,)), Fix("parallel.pp", (2, 4))),
        )
    elif parallel.virtual_stages > 1 and parallel.schedule != _INTERLEAVED:
        yield Violation(
            "parallel.virtual_stages",
            parallel.virtual_stages,
            f"parallel.schedule={parallel.schedule} runs one stage per rank",
            fixes=(Fix("parallel.schedule", (_INTERLEAVED,)), Fix("parallel.virtual_stages", (1,))),
        )
    elif parallel.virtual_stages == 1 and parallel.schedule == _INTERLEAVED:
        yield Violation(
            "parallel.schedule",
            parallel.schedule,
            "interleaves the virtual stages of a rank, and parallel.virtual_stages=1",
            fixes=(Fix("parallel.virtual_stages", (2, 4)), Fix("parallel.schedule", ("1f1b",))),
        )


@needs("parallel.pp", "parallel.virtual_stages", "parallel.stage_layers", "model.num_layers")
def stage_layers_are_a_split(job: Job) -> Iterator[Violation]:
    """A split of layers that is given has one entry per stage and loses no layer."""
    parallel, layers = job.config.parallel, job.config.model.num_layers
    sizes, stages = parallel.stage_layers, parallel.pp * parallel.virtual_stages
    if sizes is None:
        return
    shown = list(sizes)
    if len(sizes) != stages:
        wrong = f"{len(sizes)} entries for {stages} stages (pp*virtual_stages)"
    elif sum(sizes) != layers:
        wrong = f"adds up to {sum(sizes)} layers, and model.num_layers={layers}"
    else:
        return
    yield Violation(
        "parallel.stage_layers",
        shown,
        wrong,
        f"{stages} integers that add up to {layers}",
        fixes=(Fix("parallel.stage_layers", (None,)),),
    )


@needs("parallel.tp", "parallel.cp", "model.sequence_length")
def sequence_splits_evenly(job: Job) -> Iterator[Violation]:
    """Each rank holds equally many tokens: context parallelism splits a sequence, sequence parallelism its activations.

    Ring attention gives each rank two chunks, one from either end, so that causal work is balanced.
    """
    parallel, length = job.config.parallel, job.config.model.sequence_length
    chunks = 2 * parallel.cp if parallel.cp > 1 and parallel.cp_attention == "ring" else parallel.cp
    pieces = lcm(chunks, parallel.cp * parallel.tp) if parallel.sequence_parallel else chunks
    if length % pieces == 0:
        return
    parts = [f"parallel.cp={parallel.cp}"] if parallel.cp > 1 else []
    if parallel.sequence_parallel and parallel.tp > 1:
        parts.append(f"parallel.tp={parallel.tp} with sequence_parallel")
    near = (length // pieces * pieces, (length // pieces + 1) * pieces)
    fitting = (
        [size for size in job.data_lengths if size % pieces == 0] if job.datasets else [size for size in near if size]
    )
    yield Violation(
        "model.sequence_length",
        length,
        f"does not split into {pieces} equal pieces ({' and '.join(parts)})",
        fixes=(
            Fix("model.sequence_length", tuple(fitting)),
            Fix("parallel.sequence_parallel", (False,)) if parallel.sequence_parallel else Fix("parallel.cp", (1,)),
        ),
    )


@needs("parallel.tp", "parallel.cp", "model.num_heads")
def ulysses_divides_heads(job: Job) -> Iterator[Violation]:
    """Ulysses trades a share of the sequence for a share of the heads (Jacobs et al. 2023)."""
    parallel, heads = job.config.parallel, job.config.model.num_heads
    if parallel.cp == 1 or parallel.cp_attention != "ulysses" or heads % parallel.tp:
        return
    local = heads // parallel.tp
    if local % parallel.cp:
        yield Violation(
            "parallel.cp",
            parallel.cp,
            f"parallel.cp_attention=ulysses deals out the {local} heads of a tensor-parallel rank, which it does not "
            "divide",
            fixes=(Fix("parallel.cp", divisors(local)), Fix("parallel.cp_attention", ("ring",))),
        )
