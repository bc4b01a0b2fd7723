"""A config small enough to train on CPU ranks in seconds, with every choice that parallelism could get wrong. No torch.

Sizes shrink; what decides which code runs stays: wiring, norms, positions and their scaling, grouping of key/value
heads, windows, dropout, tying, z-loss, number format, ZeRO stage, schedule, recomputation, and which axes are split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from megalm.config.check import violations
from megalm.config.job import topology_of
from megalm.config.schema import Config, Engine, Model, Parallel
from megalm.mesh.topology import Topology

STEPS = 6
SEQUENCE_LENGTH = 32
"""A multiple of what any layout of degrees up to 2 splits a sequence into."""
VOCAB_SIZE = 61
"""Divided by no degree, so that the last tensor-parallel rank's rows are padded."""
MICRO_BATCH = 2
GLOBAL_BATCH = 16
"""At dp 2 four micro-batches: twice as many as pipeline ranks."""
MOST_RANKS = 8

_HEADS = 4
_HEAD_DIMS = (8, 16, 32, 64, 128, 256)
_LEAST_LAYERS = 4
_LOSS_CHUNK = 12
"""Tokens: several chunks to a micro-batch, the last one shorter."""
_BUCKET_MIB = 0.02
_LOSS_SCALE = 1024.0
_LEARNING_RATE = {"fp32": 1e-4}
"""At 1e-3 Adam alone turns the rounding of fp32 gradients into steps of 2e-5; 16-bit weights need it to move at all."""


@dataclass(frozen=True)
class Case:
    """One layout to be proven.

    Attributes:
        config: a shrunk config that has it.
        dp: data-parallel degree.
    """

    config: Config
    dp: int

    @property
    def topology(self) -> Topology:
        """The mesh of ranks."""
        parallel = self.config.parallel
        return Topology(
            tp=parallel.tp, pp=parallel.pp, cp=parallel.cp, dp=self.dp, virtual_stages=parallel.virtual_stages
        )

    def __str__(self) -> str:
        parallel = self.config.parallel
        parts = [
            f"{axis}{degree}" for axis in ("tp", "pp", "cp", "dp") if (degree := self.topology.degree(axis)) > 1
        ] or ["one rank"]
        if parallel.sequence_parallel and parallel.tp > 1:
            parts.append("sp")
        if parallel.tp_overlap_parts > 1 and parallel.tp > 1:
            parts.append(f"{parallel.tp_overlap_parts} overlapping parts")
        if parallel.cp > 1:
            parts.append(parallel.cp_attention)
        if parallel.virtual_stages > 1:
            parts.append(f"v{parallel.virtual_stages}")
        if parallel.pp > 1:
            parts.append(parallel.schedule)
        return " ".join(parts)


@dataclass(frozen=True)
class Shrunk:
    """A user's config at CPU size.

    Attributes:
        layout: the config's own layout, its degrees cut.
        notes: what the proof leaves out of the layout or changes in the engine, in words.
    """

    layout: Case
    notes: tuple[str, ...]


def shrink(config: Config, world_size: int) -> Shrunk:
    """Cut a valid config for ``world_size`` ranks down to at most eight ranks and a model of some thousand weights."""
    topology = topology_of(config, world_size)
    parallel, dp = _shrink_parallel(config.parallel, topology)
    small = replace(
        config,
        model=_shrink_model(config, parallel),
        parallel=parallel,
        engine=_shrink_engine(config.engine),
        optim=replace(
            config.optim,
            lr=_LEARNING_RATE.get(config.engine.dtype, 1e-3),
            schedule="constant",
            warmup_tokens=0,
            decay_tokens=None,
            cooldown_tokens=None,
            cooldown="linear",
        ),
        train=replace(
            config.train,
            steps=STEPS,
            micro_batch_size=MICRO_BATCH,
            global_batch_size=GLOBAL_BATCH,
            batch_ramp_start=None,
            batch_ramp_increment=None,
            batch_ramp_tokens=0,
        ),
        launch=replace(config.launch, ranks=0, device="cpu"),
        cluster=replace(config.cluster, gpus=0, gpu=None),
        data=replace(config.data, path=("synthetic",), weights=(), max_epochs=()),
    )
    layout = _checked(Case(small, dp))
    return Shrunk(layout, tuple(_notes(config, topology, layout)))


def related_layouts(layout: Case) -> list[Case]:
    """What is proven besides one rank: each axis alone, data parallelism always among them, then the layout itself.

    A 16-bit layout is proven a second time in fp32, where nothing but rounding separates it from the reference.
    """
    parallel = layout.config.parallel
    alone = Parallel(schedule="1f1b" if parallel.virtual_stages > 1 else parallel.schedule)
    over_tp = {name: getattr(parallel, name) for name in ("tp", "sequence_parallel", "tp_overlap_parts")}
    one_axis = [
        (parallel.tp > 1, replace(alone, **over_tp), 1),
        (parallel.pp > 1, replace(parallel, tp=1, cp=1, sequence_parallel=False, tp_overlap_parts=1), 1),
        (parallel.cp > 1, replace(alone, cp=parallel.cp, cp_attention=parallel.cp_attention), 1),
        (True, alone, 2),
    ]
    cases = [Case(replace(layout.config, parallel=alone), 1)]
    cases += [Case(replace(layout.config, parallel=axis), dp) for wanted, axis, dp in one_axis if wanted]
    cases.append(layout)
    if layout.config.engine.dtype != "fp32":
        cases += _in_fp32(layout)
    return [_checked(case) for case in dict.fromkeys(cases)]


def _in_fp32(layout: Case) -> Iterator[Case]:
    config = layout.config
    optim = replace(config.optim, lr=_LEARNING_RATE["fp32"])
    case = replace(layout, config=replace(config, engine=replace(config.engine, dtype="fp32"), optim=optim))
    if not violations(case.config, case.topology.world_size):
        yield case


def _checked(case: Case) -> Case:
    problems = violations(case.config, case.topology.world_size)
    assert not problems, f"shrinking a valid config broke it: {problems}"
    return case


def _shrink_parallel(parallel: Parallel, topology: Topology) -> tuple[Parallel, int]:
    """Each degree at most 2, data parallelism given up where that leaves more than eight ranks."""
    small = replace(
        parallel,
        tp=min(parallel.tp, 2),
        pp=min(parallel.pp, 2),
        cp=min(parallel.cp, 2),
        virtual_stages=min(parallel.virtual_stages, 2),
    )
    if parallel.stage_layers is not None:
        small = replace(small, stage_layers=_uneven(len(set(parallel.stage_layers)) > 1, small))
    dp = min(topology.dp, 2)
    return small, dp if small.tp * small.pp * small.cp * dp <= MOST_RANKS else 1


def _uneven(uneven: bool, parallel: Parallel) -> tuple[int, ...]:
    """A split of the shrunk layers that is uneven where the user's is."""
    stages = parallel.pp * parallel.virtual_stages
    sizes = [_num_layers(parallel) // stages] * stages
    if uneven and stages > 1:
        sizes[0], sizes[-1] = sizes[0] - 1, sizes[-1] + 1
    return tuple(sizes)


def _num_layers(parallel: Parallel) -> int:
    return max(_LEAST_LAYERS, 2 * parallel.pp * parallel.virtual_stages)


def _shrink_model(config: Config, parallel: Parallel) -> Model:
    model, layers = config.model, _num_layers(parallel)
    # A head in which the rotated share is whole pairs; at least one size is, the user's own.
    dims = (*_HEAD_DIMS, model.head_size)
    head_dim = next(dim for dim in dims if model.position != "rotary" or _rotates_pairs(dim * model.rotary_fraction))
    hidden = _hidden_size(model, _HEADS * head_dim)
    original = model.rotary_original_length
    return replace(
        model,
        num_layers=layers,
        hidden_size=hidden,
        num_heads=_HEADS,
        head_dim=None if model.head_dim is None else head_dim,
        num_kv_heads=None if model.num_kv_heads is None else _kv_heads(model, config.parallel.tp),
        ffn_hidden_size=None if model.ffn_hidden_size is None else 3 * hidden // 2,
        vocab_size=VOCAB_SIZE,
        sequence_length=SEQUENCE_LENGTH,
        rotary_original_length=None if original is None else max(1, _scaled(original, model)),
        attention_windows=_windows(model, layers),
    )


def _hidden_size(model: Model, attention_size: int) -> int:
    """As wide as all heads together, or narrower or wider where the model is."""
    if model.attention_size == model.hidden_size:
        return attention_size
    return attention_size // 2 if model.attention_size > model.hidden_size else 3 * attention_size // 2


def _rotates_pairs(elements: float) -> bool:
    return elements == int(elements) and int(elements) >= 2 and int(elements) % 2 == 0


def _kv_heads(model: Model, tp: int) -> int:
    """As many as query heads, or one, or some; one also where the tensor-parallel ranks share heads."""
    if model.kv_heads == model.num_heads:
        return _HEADS
    return 1 if model.kv_heads == 1 or tp > model.kv_heads else _HEADS // 2


def _windows(model: Model, layers: int) -> tuple[int, ...]:
    """The pattern, as far as there are layers, at widths that still leave something out."""
    given = model.attention_windows
    if len(given) > layers:
        given = tuple(given[layer * len(given) // layers] for layer in range(layers))
    return tuple(0 if width == 0 else min(max(2, _scaled(width, model)), SEQUENCE_LENGTH // 2) for width in given)


def _scaled(length: int, model: Model) -> int:
    return length * SEQUENCE_LENGTH // model.sequence_length


def _shrink_engine(engine: Engine) -> Engine:
    return replace(
        engine,
        compile=False,
        recompute_every=min(engine.recompute_every, 2),
        bucket_mib=_BUCKET_MIB,
        loss_chunk_tokens=_LOSS_CHUNK if engine.loss_chunk_tokens else 0,
        initial_loss_scale=_LOSS_SCALE,
        loss_scale_window=1000,
    )


def _notes(config: Config, topology: Topology, layout: Case) -> Iterator[str]:
    small = layout.topology
    cut = [
        f"{axis} {topology.degree(axis)} to {small.degree(axis)}"
        for axis in ("tp", "pp", "cp", "dp")
        if topology.degree(axis) != small.degree(axis)
    ]
    if topology.virtual_stages != small.virtual_stages:
        cut.append(f"virtual stages {topology.virtual_stages} to {small.virtual_stages}")
    if cut:
        yield f"degrees are cut: {', '.join(cut)}"
    if config.engine.compiles:
        yield "torch.compile is left out: it needs a C++ compiler on a CPU, and changes no sum over ranks"
