"""Rules about how layers, heads and the sequence are split over tensor, pipeline and context parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd, lcm

from megalm.config.job import Job, Rule, divisors, is_in_bounds, needs
from megalm.config.rules.model import has_uneven_heads
from megalm.config.violation import Fix, Violation, spoken_list

_DEGREES = ("parallel.tp", "parallel.pp", "parallel.cp")
_HEADS = ("model.hidden_size", "model.num_heads", "model.head_dim", "model.num_kv_heads")
_INTERLEAVED = "interleaved_1f1b"


@needs("parallel.tp")
def tensor_parallelism_divides_model(job: Job) -> Iterator[Violation]:
    """Each tensor-parallel rank holds whole query heads and an equal share of the MLP (Shoeybi et al. 2019).

    The vocabulary is padded, so it need not divide.
    """
    tp, model = job.config.parallel.tp, job.config.model
    ffn_source = "model.hidden_size" if model.ffn_hidden_size is None else "model.ffn_hidden_size"
    ffn_label = "the derived model.ffn_hidden_size" if model.ffn_hidden_size is None else ffn_source
    sizes = {
        label: size
        for label, size, source in (
            ("model.num_heads", model.num_heads, "model.num_heads"),
            (ffn_label, model.ffn_size, ffn_source),
        )
        if is_in_bounds(job.config, source)
    }
    uneven = [f"{label}={size}" for label, size in sizes.items() if size % tp]
    if uneven:
        yield Violation(
            "parallel.tp",
            tp,
            f"does not divide {spoken_list(uneven, 'and')}",
            fixes=(Fix("parallel.tp", divisors(gcd(*sizes.values()))),),
        )


@needs("parallel.tp", *_HEADS)
def tensor_parallelism_shares_kv_heads(job: Job) -> Iterator[Violation]:
    """Key/value heads are dealt out over tensor-parallel ranks, or each is shared by equally many of them."""
    tp, model = job.config.parallel.tp, job.config.model
    heads = model.kv_heads
    if model.num_kv_heads is None or heads % tp == 0 or model.num_heads % tp or has_uneven_heads(model):
        return
    if tp % heads:
        wrong = f"neither divides model.num_kv_heads={heads} nor is a multiple of it"
    elif heads * model.head_size % tp:
        wrong = f"does not divide the {heads * model.head_size} rows of model.num_kv_heads={heads} heads"
    else:
        return
    fitting = tuple(d for d in divisors(model.num_heads) if heads % d == 0 or d % heads == 0)
    yield Violation("parallel.tp", tp, wrong, fixes=(Fix("parallel.tp", fitting), Fix("model.num_kv_heads", (None,))))


@needs(*_DEGREES, "parallel.virtual_stages", "model.num_layers")
def stages_have_layers(job: Job) -> Iterator[Violation]:
    """Every pipeline stage has at least one layer; an uneven split is fine."""
    stages, layers = job.config.parallel.pp * job.config.parallel.virtual_stages, job.config.model.num_layers
    if layers < stages:
        virtual = job.config.parallel.virtual_stages
        split = f"parallel.pp={job.config.parallel.pp}" + (f" times virtual_stages={virtual}" if virtual > 1 else "")
        yield Violation(
            "model.num_layers",
            layers,
            f"too few for the {stages} pipeline stages of {split}, each needs one",
            f"at least {stages} layers",
            fixes=(Fix("parallel.pp", tuple(range(1, min(layers, 1024) + 1))),),
        )


@needs("parallel.pp", "parallel.virtual_stages")
def virtual_stages_have_their_schedule(job: Job) -> Iterator[Violation]:
    """Several stages per rank need the schedule that interleaves them, and more than one rank to go round."""
    parallel = job.config.parallel
    if parallel.virtual_stages > 1 and parallel.pp == 1:
        yield Violation(
            "parallel.virtual_stages",
            parallel.virtual_stages,
            "virtual stages shrink the pipeline bubble, and parallel.pp=1 has none",
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
            f"parallel.cp_attention=ulysses distributes the {local} heads of a tensor-parallel rank, and parallel.cp "
            "does not divide them",
            fixes=(Fix("parallel.cp", divisors(local)), Fix("parallel.cp_attention", ("ring",))),
        )


RULES: tuple[Rule, ...] = (
    tensor_parallelism_divides_model,
    tensor_parallelism_shares_kv_heads,
    stages_have_layers,
    virtual_stages_have_their_schedule,
    stage_layers_are_a_split,
    sequence_splits_evenly,
    ulysses_divides_heads,
)
