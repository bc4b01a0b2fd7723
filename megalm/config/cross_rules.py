"""Rules about several fields together: how a model splits over a layout, and how a batch and a schedule add up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from math import gcd

from megalm.config.field_rules import Job, divisors, is_in_bounds
from megalm.config.support import CHOICES, PROVEN
from megalm.config.violation import Fix, Violation, spoken_list

Rule = Callable[[Job], Iterator[Violation]]

_DEGREES = ("parallel.tp", "parallel.pp", "parallel.cp")
_HEADS = ("model.hidden_size", "model.num_heads", "model.num_kv_heads")


def needs(*paths: str) -> Callable[[Rule], Rule]:
    """Apply a rule only where the numbers it calculates with are in range; a wrong one is reported on its own."""

    def decorate(rule: Rule) -> Rule:
        @wraps(rule)
        def guarded(job: Job) -> Iterator[Violation]:
            if job.world_size >= 1 and all(is_in_bounds(job.config, path) for path in paths):
                yield from rule(job)

        return guarded

    return decorate


def world_field(job: Job) -> str:
    """The field that decided the number of ranks; ``world_size`` when a launcher (torchrun, srun, mpirun) did."""
    if job.config.launch.ranks == job.world_size:
        return "launch.ranks"
    return "cluster.gpus" if job.config.cluster.gpus == job.world_size else "world_size"


@needs("model.hidden_size", "model.num_heads")
def heads_divide_hidden_size(job: Job) -> Iterator[Violation]:
    """Every head is equally wide."""
    hidden, heads = job.config.model.hidden_size, job.config.model.num_heads
    if hidden % heads:
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


@needs("model.hidden_size", "model.num_heads")
def rotary_heads_are_even(job: Job) -> Iterator[Violation]:
    """Rotary positions turn pairs of a head's elements (Su et al. 2021)."""
    hidden, heads = job.config.model.hidden_size, job.config.model.num_heads
    if job.config.model.position == "rotary" and hidden % heads == 0 and hidden // heads % 2:
        yield Violation(
            "model.num_heads",
            heads,
            f"makes heads of {hidden // heads} elements, and model.position=rotary needs an even number",
            fixes=(Fix("model.num_heads", divisors(hidden)), Fix("model.position", ("learned",))),
        )


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
    if model.num_kv_heads is None or heads % tp == 0 or model.num_heads % tp or model.hidden_size % model.num_heads:
        return
    if tp % heads:
        wrong = f"neither divides model.num_kv_heads={heads} nor is a multiple of it"
    elif heads * model.head_dim % tp:
        wrong = f"does not divide the {heads * model.head_dim} rows of model.num_kv_heads={heads} heads"
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


@needs(*_DEGREES, "launch.ranks", "cluster.gpus")
def layout_fills_ranks(job: Job) -> Iterator[Violation]:
    """Ranks form whole replicas: their number is a multiple of tp·pp·cp."""
    parallel = job.config.parallel
    model_ranks = parallel.tp * parallel.pp * parallel.cp
    if job.world_size % model_ranks == 0:
        return
    field = world_field(job)
    replicas = job.world_size // model_ranks
    counts = {max(1, replicas), replicas + 1, *(1 << power for power in range((replicas + 1).bit_length()))}
    yield Violation(
        field,
        job.world_size,
        f"not a multiple of tp*pp*cp = {parallel.tp}*{parallel.pp}*{parallel.cp} = {model_ranks}",
        f"a multiple of {model_ranks}",
        fixes=(Fix(field, tuple(sorted(count * model_ranks for count in counts))),),
    )


@needs(*_DEGREES, "train.micro_batch_size", "train.global_batch_size")
def batch_splits_evenly(job: Job) -> Iterator[Violation]:
    """Every replica runs equally many whole micro-batches in a step."""
    model_ranks = job.config.parallel.tp * job.config.parallel.pp * job.config.parallel.cp
    if job.world_size % model_ranks:
        return
    micro, batch, dp = (
        job.config.train.micro_batch_size,
        job.config.train.global_batch_size,
        job.world_size // model_ranks,
    )
    unit = dp * micro
    if batch % unit:
        below, above = batch // unit * unit, (batch // unit + 1) * unit
        yield Violation(
            "train.global_batch_size",
            batch,
            f"not a multiple of dp*micro_batch_size = {dp}*{micro} = {unit} on {job.world_size} ranks",
            fixes=(
                Fix("train.global_batch_size", tuple(size for size in (below, above) if size)),
                Fix("train.micro_batch_size", divisors(batch // dp) if batch % dp == 0 else ()),
            ),
        )


@needs("engine.zero_stage", "parallel.pp")
def precision_and_zero_are_proven(job: Job) -> Iterator[Violation]:
    """Only combinations of number format and ZeRO stage that a parity test covers (``support.PROVEN``)."""
    dtype, stage, pp = job.config.engine.dtype, job.config.engine.zero_stage, job.config.parallel.pp
    in_any_format = tuple(sorted(set.intersection(*map(set, PROVEN.values()))))
    # A pipeline runs many micro-batches, and stages 2 and 3 communicate in each.
    proven = tuple(s for s in PROVEN.get(dtype, in_any_format) if s < 2 or pp == 1)
    if stage in proven:
        return
    fixes = [Fix("engine.zero_stage", proven)]
    if stage >= 2 and pp > 1:
        wrong = f"ZeRO-{stage} would repeat its collectives for every micro-batch of the pipeline (parallel.pp={pp})"
        fixes.append(Fix("parallel.pp", (1,)))
    else:
        wrong = f"ZeRO-{stage} with engine.dtype={dtype} is not in this version: no test proves its gradient norm"
        fixes.append(Fix("engine.dtype", tuple(name for name in CHOICES["engine.dtype"] if stage in PROVEN[name])))
    yield Violation("engine.zero_stage", stage, wrong, fixes=tuple(fixes))


@needs("engine.zero_stage", "parallel.tp")
def zero_3_runs_alone(job: Job) -> Iterator[Violation]:
    """ZeRO-3 is DeepSpeed's own, hooks and all: its norm is wrong under tensor parallelism."""
    engine, tp = job.config.engine, job.config.parallel.tp
    if engine.zero_stage != 3:
        return
    stages = Fix("engine.zero_stage", (1, 2))
    if tp > 1:
        yield Violation(
            "parallel.tp",
            tp,
            "DeepSpeed's ZeRO-3 leaves parameters out of the gradient norm under tensor parallelism",
            fixes=(Fix("parallel.tp", (1,)), stages),
        )
    for field, value in (("engine.offload_optimizer", engine.offload_optimizer), ("engine.compile", engine.compile)):
        if value:
            yield Violation(field, value, "not in this version with ZeRO-3", fixes=(Fix(field, (False,)), stages))


@needs("optim.warmup_tokens", "optim.decay_tokens")
def warmup_ends_before_decay(job: Job) -> Iterator[Violation]:
    """The decay ends after the warm-up. A run may be shorter than both: that is how a job is tried out."""
    optim = job.config.optim
    if optim.schedule == "constant" or optim.decay_tokens is None or optim.warmup_tokens < optim.decay_tokens:
        return
    yield Violation(
        "optim.warmup_tokens",
        optim.warmup_tokens,
        f"not below optim.decay_tokens={optim.decay_tokens}, where the decay ends",
        f"at most {optim.decay_tokens - 1}",
        fixes=(Fix("optim.decay_tokens", (None,)),),
    )


def one_source_of_weights(job: Job) -> Iterator[Violation]:
    """A run starts from a checkpoint's weights, in one way, or resumes a named one."""
    checkpoint = job.config.checkpoint
    for name in ("init_from", "finetune_from"):
        value = getattr(checkpoint, name)
        if value is not None and checkpoint.resume not in ("auto", "never"):
            yield Violation(
                f"checkpoint.{name}",
                value,
                f"conflicts with checkpoint.resume={checkpoint.resume}, which brings weights of its own",
                fixes=(Fix(f"checkpoint.{name}", (None,)), Fix("checkpoint.resume", ("auto", "never"))),
            )
    if checkpoint.init_from is not None and checkpoint.finetune_from is not None:
        yield Violation(
            "checkpoint.finetune_from",
            checkpoint.finetune_from,
            f"conflicts with checkpoint.init_from={checkpoint.init_from}: a run starts from one model's weights",
            fixes=(Fix("checkpoint.finetune_from", (None,)), Fix("checkpoint.init_from", (None,))),
        )
    if checkpoint.extend_vocab and checkpoint.init_from is None and checkpoint.finetune_from is None:
        yield Violation(
            "checkpoint.extend_vocab",
            True,
            "adds words to a model that a run begins with, and none is named",
            "name it with checkpoint.finetune_from or checkpoint.init_from",
            fixes=(Fix("checkpoint.extend_vocab", (False,)),),
        )


def retention_has_something_to_keep(job: Job) -> Iterator[Violation]:
    """Rules of retention that can never apply are mistakes."""
    checkpoint, train = job.config.checkpoint, job.config.train
    if checkpoint.keep_every and checkpoint.every and checkpoint.keep_every % checkpoint.every:
        rounded = -(-checkpoint.keep_every // checkpoint.every) * checkpoint.every
        yield Violation(
            "checkpoint.keep_every",
            checkpoint.keep_every,
            f"not a multiple of checkpoint.every={checkpoint.every}, so some of these steps are never saved",
            fixes=(Fix("checkpoint.keep_every", (rounded,)),),
        )
    if checkpoint.keep_best and checkpoint.every and not train.validate_every:
        yield Violation(
            "checkpoint.keep_best",
            checkpoint.keep_best,
            "train.validate_every=0: there is one validation, at the end, and no best of several",
            fixes=(Fix("train.validate_every", (checkpoint.every,)), Fix("checkpoint.keep_best", (0,))),
        )
