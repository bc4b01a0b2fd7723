"""Rules about the batch: how it splits over ranks, and how a ramp grows it."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

from megalm.config.job import Job, Rule, divisors, needs
from megalm.config.violation import Fix, Violation

_DEGREES = ("parallel.tp", "parallel.pp", "parallel.cp")
_RAMP = (
    "train.batch_ramp_start",
    "train.batch_ramp_increment",
    "train.batch_ramp_tokens",
    "train.micro_batch_size",
    "train.global_batch_size",
    "train.steps",
    "model.sequence_length",
    "parallel.tp",
    "parallel.pp",
    "parallel.cp",
)
_MOST_SIZES = 6
_MOST_TRIED = 1000


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


@needs(*_RAMP)
def batch_ramp_is_whole(job: Job) -> Iterator[Violation]:
    """A ramp has a start and a length; without a start there is nothing to grow."""
    train = job.config.train
    if train.batch_ramp_start is not None:
        if train.batch_ramp_tokens == 0:
            run = train.steps * train.global_batch_size * job.config.model.sequence_length
            yield Violation(
                "train.batch_ramp_tokens",
                0,
                f"no tokens to rise over from train.batch_ramp_start={train.batch_ramp_start}",
                fixes=(Fix("train.batch_ramp_tokens", (max(1, run // 10),)), Fix("train.batch_ramp_start", (None,))),
            )
        return
    start = Fix("train.batch_ramp_start", _ramp_starts(job)[:1])
    if train.batch_ramp_increment is not None:
        wrong = "there is no ramp that it could belong to: train.batch_ramp_start=null"
        fixes = (Fix("train.batch_ramp_increment", (None,)), start)
        yield Violation("train.batch_ramp_increment", train.batch_ramp_increment, wrong, fixes=fixes)
    if train.batch_ramp_tokens:
        wrong = "the ramp has no size to rise from: train.batch_ramp_start=null"
        fixes = (Fix("train.batch_ramp_tokens", (0,)), start)
        yield Violation("train.batch_ramp_tokens", train.batch_ramp_tokens, wrong, fixes=fixes)


@needs(*_RAMP)
def batch_ramp_splits_evenly(job: Job) -> Iterator[Violation]:
    """At every size of the ramp each replica runs equally many whole micro-batches."""
    train, unit = job.config.train, _unit(job)
    if unit is None:
        return
    sizes = {
        "train.batch_ramp_start": train.batch_ramp_start,
        "train.batch_ramp_increment": train.batch_ramp_increment,
    }
    for field, size in sizes.items():
        if size is not None and size % unit:
            fitting = _ramp_starts(job) if field == "train.batch_ramp_start" else _ramp_increments(job)
            yield Violation(
                field,
                size,
                f"not a multiple of dp*micro_batch_size = {unit // train.micro_batch_size}*{train.micro_batch_size} "
                f"= {unit} on {job.world_size} ranks",
                fixes=(
                    Fix(field, _nearest(fitting, size)),
                    Fix("train.micro_batch_size", _micro_batches(job)),
                    Fix(field, (None,)),
                ),
            )


@needs(*_RAMP)
def batch_ramp_arrives(job: Job) -> Iterator[Violation]:
    """Whole increments lead from the first batch size to the last."""
    train = job.config.train
    start, final = train.batch_ramp_start, train.global_batch_size
    if start is None:
        return
    starts = Fix("train.batch_ramp_start", _nearest(_ramp_starts(job), start))
    increment = start if train.batch_ramp_increment is None else train.batch_ramp_increment
    if start > final:
        wrong = f"above train.global_batch_size={final}, where the ramp ends"
        yield Violation("train.batch_ramp_start", start, wrong, fixes=(starts, Fix("train.batch_ramp_start", (None,))))
    elif (final - start) % increment:
        wrong = f"does not divide the rise from train.batch_ramp_start={start} to train.global_batch_size={final}"
        sizes = Fix("train.batch_ramp_increment", _nearest(_ramp_increments(job), increment))
        yield Violation("train.batch_ramp_increment", increment, wrong, fixes=(sizes, starts))


def _unit(job: Job) -> int | None:
    """Sequences of one micro-batch on every replica; None where the ranks form no whole replicas."""
    parallel = job.config.parallel
    replicas, rest = divmod(job.world_size, parallel.tp * parallel.pp * parallel.cp)
    return None if rest or not replicas else replicas * job.config.train.micro_batch_size


def _micro_batches(job: Job) -> tuple[int, ...]:
    """Micro-batches that split every size of the ramp evenly, whose change leaves the run's numbers alone."""
    train, unit = job.config.train, _unit(job)
    if not unit:
        return ()
    sizes = (train.batch_ramp_start, train.batch_ramp_increment, train.global_batch_size)
    common, replicas = gcd(*(size for size in sizes if size)), unit // train.micro_batch_size
    return () if common % replicas else divisors(common // replicas)


def _ramp_starts(job: Job) -> tuple[int, ...]:
    """First sizes from which whole increments lead to the last, some of them where there are many."""
    train, unit = job.config.train, _unit(job) or 1
    if train.batch_ramp_increment is None:
        sizes = divisors(train.global_batch_size)
    else:
        first = train.global_batch_size % train.batch_ramp_increment or train.batch_ramp_increment
        sizes = tuple(range(first, train.global_batch_size + 1, train.batch_ramp_increment)[:_MOST_TRIED])
    return tuple(size for size in sizes if size % unit == 0)


def _ramp_increments(job: Job) -> tuple[int, ...]:
    """Increments that divide the whole rise."""
    train = job.config.train
    rise = train.global_batch_size - (train.batch_ramp_start or 0)
    unit = _unit(job) or 1
    return tuple(size for size in divisors(rise) if size % unit == 0) if rise > 0 else ()


def _nearest(sizes: tuple[int, ...], size: int) -> tuple[int, ...]:
    return tuple(sorted(sorted(sizes, key=lambda other: abs(other - size))[:_MOST_SIZES]))


RULES: tuple[Rule, ...] = (
    batch_splits_evenly,
    batch_ramp_is_whole,
    batch_ramp_splits_evenly,
    batch_ramp_arrives,
)
