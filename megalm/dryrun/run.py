"""Executes one rank's step without values, and reports what it found."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from megalm.config.schema import Config
from megalm.core.dtype import DTYPES
from megalm.core.pipeline.schedule import Kind
from megalm.data.stream.batch import Batch
from megalm.dryrun.communication import NCCL_ALGORITHMS, GroupNames, Message, traced_waits
from megalm.dryrun.fake_rank import fake_rank
from megalm.dryrun.ledger import ACTIVATIONS, BATCH, GRADIENTS, KINDS, OPTIMIZER, PARAMETERS, Ledger, Usage
from megalm.dryrun.replay import Replayed, Trace, TracedRunner, Turn, replay
from megalm.dryrun.report import GIB, LayerWork, Moment, RankReport, Traffic
from megalm.dryrun.tracer import Overlap, Record, Tracer, Work, layer_scopes
from megalm.engine.deepspeed_engine import DeepSpeedEngine
from megalm.engine.feed import Feed
from megalm.engine.micro_batches import training_micro_batches
from megalm.mesh.groups import ParallelContext
from megalm.models.transformer import build_transformer
from megalm.objectives.registry import make_objective
from megalm.plan.hardware import devices
from megalm.training.step_report import OwnNumbers, StepReport


def dry_run(config: Config, rank: int, world_size: int, *, device: str, whole: bool = False) -> RankReport:
    """One rank's step; for a process that has no process group.

    Args:
        config: of the job, with a vocabulary size; valid for ``world_size`` ranks.
        rank: which rank.
        world_size: ranks of the job.
        device: ``cuda``, with NCCL, or ``cpu``, with gloo.
        whole: execute every micro-batch instead of replaying three.
    """
    began = time.perf_counter()
    # What compiled blocks would do is the compiler's business: what is counted is the step that it begins with.
    config = replace(config, engine=replace(config.engine, compile=False))
    with fake_rank(config, rank, world_size, device=device) as fake:
        names, ledger = GroupNames(fake.context), Ledger(PARAMETERS)
        tracer = Tracer(names, ledger)
        with tracer, tracer.reads, traced_waits(tracer):
            engine = _build(config, fake.context, tracer)
            start_peak = ledger.peak
            step = _trace(config, engine, tracer, whole=whole)
        return _report(config, engine, names, step, start_peak, device, time.perf_counter() - began)


def take_steps(config: Config, context: ParallelContext, steps: int) -> None:
    """Steps of a real rank, on whatever process group there is, with the batch of a dry run; nothing is traced."""
    tracer = Tracer(GroupNames(context))
    engine = _build(config, context, tracer)
    for _ in range(steps):
        _step(config, engine, rows=config.train.global_batch_size // context.topology.dp, tracer=tracer)


def message_log(config: Config, context: ParallelContext) -> list[Message]:
    """What one step of this rank sends and receives, in its order, on whatever process group there is.

    On a real group it is what a real rank does; a dry run does the same, message by message.
    """
    tracer = Tracer(GroupNames(context))
    with tracer, tracer.reads:
        engine = _build(config, context, tracer)
        rows = config.train.global_batch_size // context.topology.dp
        with tracer.recording() as record:
            _step(config, engine, rows=rows, tracer=tracer)
    return record.messages


def _build(config: Config, context: ParallelContext, tracer: Tracer) -> DeepSpeedEngine:
    """The engine of a rank, as ``megalm train`` builds it, without initial weights."""
    assert config.model.vocab_size is not None
    model = build_transformer(
        config,
        config.model.vocab_size,
        context=context,
        dtype=DTYPES[config.engine.dtype],
        objective=make_objective(config.objective),
        with_values=False,
    )
    layer_scopes(tracer, iter(model.blocks.items()))
    with tracer.allocating(GRADIENTS):
        engine = DeepSpeedEngine(model, context, config)
    if tracer.ledger is not None:
        _name_state(engine, tracer.ledger)
    return engine


def _name_state(engine: DeepSpeedEngine, ledger: Ledger) -> None:
    """Tell the ledger what of the memory are parameters and state of the optimizer."""
    ledger.note_all((piece.values for piece in engine.held_pieces()), OPTIMIZER)
    # fp32 weights may be their own masters.
    ledger.note_all((p for p in engine.model.parameters() if p.numel()), PARAMETERS)


@dataclass(frozen=True)
class _Step:
    """What a step did.

    Attributes:
        trace: of the schedule.
        pipeline: the schedule as a whole, replayed.
        record: what the step did besides: batch, reduction, update, report.
        memory: at the step's peak.
        moments: over the step.
    """

    trace: Trace
    pipeline: Replayed
    record: Record
    memory: Usage
    moments: tuple[Moment, ...]


def _trace(config: Config, engine: DeepSpeedEngine, tracer: Tracer, *, whole: bool) -> _Step:
    """Trace a step in which everything is there that the first step makes, such as the optimizer's moments."""
    ledger, context = tracer.ledger, engine.context
    assert ledger is not None
    runner = engine.runner
    with tracer.allocating(ACTIVATIONS):
        # ZeRO-3 learns the order of modules from its first micro-batches, and fetches ahead from then on.
        micro_batches = 3 if config.engine.zero_stage == 3 else 1
        _step(config, engine, rows=micro_batches * config.train.micro_batch_size, tracer=tracer)
    _name_state(engine, ledger)
    traced = TracedRunner(runner, tracer, whole=whole)
    engine.runner = traced  # type: ignore[assignment]
    rows = config.train.global_batch_size // context.topology.dp
    with tracer.recording() as record, tracer.allocating(ACTIVATIONS):
        _step(config, engine, rows=rows, tracer=tracer)
    assert traced.trace is not None
    pipeline = replay(traced.trace, context, early=runner.early)
    update = Moment(len(traced.trace.ticks), ledger.usage.by_kind, ledger.peak.by_kind)
    memory = max(pipeline.peak, ledger.peak, key=lambda usage: usage.total)
    return _Step(traced.trace, pipeline, record, memory, (*pipeline.moments, update))


def _step(config: Config, engine: DeepSpeedEngine, *, rows: int, tracer: Tracer) -> None:
    """What :class:`megalm.training.trainer.Trainer` does in a step, after the batch has been read."""
    feed = Feed(engine.context, config.data.readers, _batch(config, 1))
    with tracer.allocating(BATCH):
        micro_batches, units = training_micro_batches(
            feed.deliver(_batch(config, rows) if feed.reads else None, rows),
            config.train.micro_batch_size,
            engine.context,
            engine.model.context_parallel,
        )
    result = engine.train_step(micro_batches, config.optim.lr)
    own = OwnNumbers(
        step_seconds=0.0, data_seconds=0.0, memory_gib=0.0, stop=0, save_failed=False, minutes_are_up=False
    )
    StepReport(result, units, own, engine.context).read()


def _batch(config: Config, rows: int) -> Batch:
    """Rows of one document each, in which every token carries loss."""
    shape = rows, config.model.sequence_length
    starts = None
    if config.data.reset_at_documents:
        starts = np.zeros(shape, dtype=np.bool_)
        starts[:, 0] = True
    tokens = np.zeros(shape, dtype=np.int64)
    return Batch(tokens, tokens, np.ones(shape, dtype=np.float32), np.arange(rows, dtype=np.int64), starts)


def _report(
    config: Config,
    engine: DeepSpeedEngine,
    names: GroupNames,
    step: _Step,
    start_peak: Usage,
    device: str,
    seconds: float,
) -> RankReport:
    context, trace = engine.context, step.trace
    record = Record()
    record.add_times(step.record, 1)
    record.add_times(step.pipeline.record, 1)
    messages = Counter(step.record.messages) + step.pipeline.messages
    total = Work()
    for work in record.work.values():
        total.add_times(work, 1)
    gpu = config.cluster.gpu if device == "cuda" else None
    known = devices().get(gpu) if gpu is not None else None
    return RankReport(
        rank=context.rank,
        world_size=context.topology.world_size,
        place=_place(context),
        stages={stage: len(blocks) for stage, blocks in engine.model.part.stages.items()},
        device=device,
        gpu=gpu,
        memory_limit_gib=None if known is None else known.memory_gib,
        seconds=seconds,
        tool_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB,
        ticks_traced=trace.traced,
        ticks=len(trace.ticks),
        parameters=sum(t.shard.numel for t in engine.tensors if not t.record.is_buffer),
        flops=_nonzero(total.flops),
        kernels=_nonzero(total.kernels),
        memory=_in_order(step.memory),
        start_peak=start_peak.total,
        retained=_retained(engine, trace),
        moments=step.moments,
        traffic=tuple(_traffic(messages, record.overlaps, names)),
        host_syncs=dict(record.host_reads),
        layers=_layers(record, trace.count),
        resume_bytes=4 * sum(run.length for run in engine.runs_to_read(moments=True)),
    )


def _place(context: ParallelContext) -> str:
    at = context.coordinates
    return f"tp {at.tp} · pp {at.pp} · cp {at.cp} · dp {at.dp} in {context.topology.describe()}"


def _in_order(usage: Usage) -> dict[str, int]:
    return {kind: usage.by_kind.get(kind, 0) for kind in KINDS}


def _nonzero(counts: Counter[str]) -> dict[str, int]:
    return {kind: count for kind, count in counts.items() if count}


def _retained(engine: DeepSpeedEngine, trace: Trace) -> dict[int, int]:
    """What a forward leaves in memory, with what it was given and without what it passes on, by stage."""
    last = engine.context.topology.num_stages - 1
    passed = sum(Ledger.rounded(spec.nbytes) for spec in trace.between_stages.values())
    turn = Turn.STEADY if trace.count > 2 else Turn.FIRST
    found = {}
    for stage in engine.model.part.stages:
        growth = trace.effects[Kind.FORWARD, stage, turn].growth.total
        found[stage] = growth + passed * ((stage > 0) - (stage < last))
    return found


def _traffic(
    messages: Counter[Message], overlaps: dict[tuple[str, str], Overlap], names: GroupNames
) -> Iterator[Traffic]:
    """Messages by group and kind, the largest first."""
    found: dict[tuple[str, str], list[int]] = {}
    for message, times in messages.items():
        entry = found.setdefault((message.group, message.kind), [0, 0])
        entry[0] += times
        entry[1] += times * message.nbytes
    for (group, kind), (count, nbytes) in sorted(found.items(), key=lambda item: -item[1][1]):
        overlap = overlaps.get((group, kind), Overlap())
        algorithms = NCCL_ALGORITHMS[kind]
        yield Traffic(group, names.sizes[group], kind, count, nbytes, algorithms, overlap.count, overlap.hidden)


def _layers(record: Record, micro_batches: int) -> dict[str, LayerWork]:
    """A block's work by direction: the mean over this rank's blocks and micro-batches."""
    layers = {layer for layer, _ in record.work if layer}
    found = {}
    for direction in ("forward", "backward"):
        total = Work()
        for (layer, of), work in record.work.items():
            if layer and of == direction:
                total.add_times(work, 1)
        share = len(layers) * micro_batches
        found[direction] = LayerWork(
            {kind: count / share for kind, count in total.kernels.items()},
            sum(total.flops.values()) / share,
            total.nbytes["memory_bound"] / share,
        )
    return found
