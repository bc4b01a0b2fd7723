"""What ``megalm check`` prints: the sizes that follow from a valid config. No torch."""

from __future__ import annotations

from megalm.config.job import Job, topology_of
from megalm.config.schema import Config
from megalm.config.unused import unused_settings
from megalm.data.stream.batch_size import BatchSize
from megalm.engine.lr_schedule import LearningRate
from megalm.mesh.topology import Topology
from megalm.models.counts import parameter_count
from megalm.plan.pipeline import pipeline_rows
from megalm.runs.history import length_notes

_UNITS = ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k"))


def summary_lines(config: Config, world_size: int) -> list[str]:
    """A short table of a valid config on ``world_size`` ranks."""
    topology = topology_of(config, world_size)
    rows = {
        "model": _model(config),
        "parameters": _parameters(config),
        "layout": f"tp {topology.tp} · pp {topology.pp} · cp {topology.cp} · dp {topology.dp} = {world_size:,} ranks",
        **(pipeline_rows(config, topology) if topology.pp > 1 else {}),
        "batch": _batch(config, topology),
        "tokens": _tokens(config),
        "learning rate": _learning_rate(config),
        "engine": _engine(config, topology),
    }
    return [f"{name:15}{text}" for name, text in rows.items()]


def note_lines(config: Config, world_size: int) -> list[str]:
    """What of a valid config has no effect, or does not fit the length of the run, from its beginning."""
    notes = [*length_notes(config, None), *unused_settings(Job(config, world_size), is_launched=False)]
    return [f"{'note':15}{note}" for note in notes]


def _model(config: Config) -> str:
    model = config.model
    width = "" if model.head_dim is None else f" of {model.head_dim}"
    return (
        f"{model.num_layers} layers, hidden {model.hidden_size:,}, {model.num_heads} heads{width}, "
        f"sequence {model.sequence_length:,}"
    )


def _parameters(config: Config) -> str:
    if config.model.vocab_size is not None:
        total = parameter_count(config.model).total
        return f"{total:,} ({rounded(total)})"
    total = parameter_count(config.model, 0).total
    return f"{total:,} ({rounded(total)}) and {config.model.hidden_size:,} per word of the data's vocabulary"


def _batch(config: Config, topology: Topology) -> str:
    train = config.train
    micro_batches = train.global_batch_size // (train.micro_batch_size * topology.dp)
    sizes = BatchSize.of(train, config.model.sequence_length).sizes
    ramp = ""
    if len(sizes) > 1:
        ramp = f", rising from {sizes[0]:,} by {sizes.step:,} over {rounded(train.batch_ramp_tokens)} tokens"
    return (
        f"{train.global_batch_size:,} sequences = {topology.dp} replicas · {micro_batches} micro-batches · "
        f"{train.micro_batch_size}{ramp}"
    )


def _engine(config: Config, topology: Topology) -> str:
    engine = config.engine
    parts = [engine.dtype, f"ZeRO-{engine.zero_stage}"]
    if engine.offload_optimizer:
        parts.append("optimizer in host memory")
    if engine.recompute != "none":
        every = f" every {engine.recompute_every} layers" if engine.recompute_every > 1 else ""
        parts.append(f"{engine.recompute} recomputation{every}")
    if config.parallel.sequence_parallel and topology.tp > 1:
        parts.append("sequence parallel")
    return ", ".join(parts)


def _tokens(config: Config) -> str:
    per_step = config.train.global_batch_size * config.model.sequence_length
    total = BatchSize.of(config.train, config.model.sequence_length).tokens_after(config.train.steps)
    return f"{per_step:,} per step, {rounded(total)} in {config.train.steps:,} steps"


def _learning_rate(config: Config) -> str:
    optim = config.optim
    warmup = f", warm-up over {rounded(optim.warmup_tokens)} tokens" if optim.warmup_tokens else ""
    if optim.schedule == "constant":
        return f"{optim.lr:g}{warmup}, constant"
    if optim.schedule == "wsd":
        total = BatchSize.of(config.train, config.model.sequence_length).tokens_after(config.train.steps)
        course = LearningRate(optim, total).course
        cooldown = max(course.decay_end - course.decay_start, 0)
        fall = f"{optim.cooldown} to {optim.min_lr_ratio:g} of it over the last {rounded(cooldown)} tokens"
        return f"{optim.lr:g}{warmup}, constant, then {fall}"
    decay = "" if optim.decay_tokens is None else f" over {rounded(optim.decay_tokens)} tokens"
    return f"{optim.lr:g}{warmup}, {optim.schedule} to {optim.min_lr_ratio:g} of it{decay}"


def rounded(number: int) -> str:
    """``174.6B``."""
    for size, unit in _UNITS:
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)
