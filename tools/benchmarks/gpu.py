"""Training on one CUDA device: model FLOPs utilisation, and what bounds the step.

Utilisation is model FLOPs (``models.counts.flops_per_token``: recomputation is no progress) over the dense bf16 peak of
``megalm/plan/hardware.yaml``. The time between steps is the device's, from CUDA events.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.cpu import bench_config
from benchmarks.table import Report, Row
from megalm.config.compose import compose
from megalm.config.schema import Model
from megalm.models.counts import flops_per_token
from megalm.plan.hardware import devices, match_device

TARGETS = {"gpt3_1_3b": 0.50, "gpt3_125m": 0.40}
"""Experiment ▶ least utilisation."""

MICRO_BATCHES = {"gpt3_1_3b": (16, 8, 4, 2), "gpt3_125m": (32, 16, 8)}
"""Micro-batch sizes to try, in sequences; those that do not fit are passed over."""

GLOBAL_BATCH = 32
"""Sequences per step."""


@dataclass(frozen=True)
class Options:
    """How long to measure.

    Attributes:
        steps: timed steps of each choice, of which the median counts.
        warm_up: steps before, in which ``torch.compile`` does its work.
    """

    steps: int = 8
    warm_up: int = 4


def run(options: Options) -> Report:
    """Time every choice of both models, and profile a step of the fastest."""
    if not torch.cuda.is_available():
        return Report("gpu", skipped="no CUDA device")
    name = match_device(torch.cuda.get_device_name())
    peak = devices()[name].peak_flops("bf16") if name else None
    if peak is None:
        return Report("gpu", skipped=f"{torch.cuda.get_device_name()} has no bf16 peak in megalm/plan/hardware.yaml")
    rows: list[Row] = []
    if not dist.is_initialized():
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    torch.cuda.set_device(0)
    for experiment, target in TARGETS.items():
        rows += _experiment(experiment, target, peak, options)
    return Report("gpu", rows)


def _experiment(experiment: str, target: float, peak: float, options: Options) -> list[Row]:
    model = compose([f"experiment={experiment}"]).model
    flops = flops_per_token(model) * GLOBAL_BATCH * model.sequence_length
    rows, timed = [], {}
    for compiled in (False, True):
        for micro_batch_size in MICRO_BATCHES[experiment]:
            choice = micro_batch_size, compiled
            try:
                timed[choice] = _seconds(model, *choice, options)
            except torch.cuda.OutOfMemoryError:
                continue
            finally:
                _free()
            label = f"{experiment}, micro-batch {micro_batch_size}, {'compiled' if compiled else 'eager'}"
            rows.append(Row(label, 100 * flops / timed[choice] / peak, "% MFU", note=f"{timed[choice]:.3f} s a step"))
    if not timed:
        return [Row(f"{experiment}: no micro-batch fits", 0.0, "% MFU", 100 * target)]
    best = min(timed, key=timed.__getitem__)
    rows.append(Row(f"{experiment}, best", 100 * flops / timed[best] / peak, "% MFU", 100 * target))
    step = _make_step(model, *best)
    for _ in range(options.warm_up):
        step()
    shares = _profile(step)
    del step
    _free()
    return rows + [Row(f"  {what}", 100 * share, "% of step") for what, share in shares.items()]


def _seconds(model: Model, micro_batch_size: int, compiled: bool, options: Options) -> float:
    step = _make_step(model, micro_batch_size, compiled)
    for _ in range(options.warm_up):
        step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(options.steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(1e-3 * a.elapsed_time(b) for a, b in pairwise(events))


def _make_step(model: Model, micro_batch_size: int, compiled: bool) -> Callable[[], Any]:
    """One optimizer step on random tokens, through the engine that users train with."""
    from megalm.core.place import Place
    from megalm.engine.deepspeed_engine import DeepSpeedEngine
    from megalm.mesh.groups import ParallelContext
    from megalm.mesh.topology import Topology
    from megalm.models.counts import resolve_vocab_size
    from megalm.models.micro_batch import MicroBatch
    from megalm.models.transformer import build_transformer
    from megalm.objectives.registry import make_objective

    config = bench_config(model, micro_batch_size=micro_batch_size, global_batch_size=GLOBAL_BATCH, compiled=compiled)
    context = ParallelContext.create(Topology(), "cuda:0")
    vocab = resolve_vocab_size(model)
    stage = build_transformer(
        config, vocab, context=context, dtype=torch.bfloat16, objective=make_objective(config.objective)
    )
    engine = DeepSpeedEngine(stage, context, config)
    length = model.sequence_length
    rows = torch.randint(0, vocab, (GLOBAL_BATCH, length + 1), device=context.device)
    weight = torch.full((GLOBAL_BATCH, length), 1.0 / (GLOBAL_BATCH * length), device=context.device)
    positions = torch.arange(length, device=context.device)
    micro_batches = [
        MicroBatch(r[:, :-1].contiguous(), r[:, 1:].contiguous(), w, Place(positions, s))
        for r, w, s in zip(
            rows.split(micro_batch_size),
            weight.split(micro_batch_size),
            torch.arange(GLOBAL_BATCH, device=context.device).split(micro_batch_size),
            strict=True,
        )
    ]
    return lambda: engine.train_step(micro_batches, 1e-4)


def _free() -> None:
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()


@dataclass(frozen=True)
class Kernel:
    """What a device did for a while.

    Attributes:
        name: as the profiler names it.
        start: microseconds.
        end: microseconds.
    """

    name: str
    start: float
    end: float


KINDS = (
    ("communication", ("nccl",)),
    ("attention", ("flash", "fmha", "attention", "sdpa", "mha_")),
    ("matmul", ("gemm", "cutlass", "cublas", "nvjet", "xmma", "matmul", "triton_tem")),
)
"""What a kernel's name contains, first match; every other kernel is bound by memory: element-wise, norms, optimizer."""


def kind_of(name: str) -> str:
    """What a kernel spends its time on."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS if any(part in lower for part in parts)), "memory-bound")


def shares_of_step(kernels: Iterable[Kernel], seconds: float) -> dict[str, float]:
    """Share of a step by kind of kernel; idle is the time in which none ran.

    Where kernels overlap, the time goes to the one that began first, so that shares add up to one.
    """
    shares = dict.fromkeys((*(kind for kind, _ in KINDS), "memory-bound"), 0.0)
    covered = float("-inf")
    for kernel in sorted(kernels, key=lambda k: (k.start, k.end)):
        shares[kind_of(kernel.name)] += max(0.0, kernel.end - max(kernel.start, covered)) / (1e6 * seconds)
        covered = max(covered, kernel.end)
    return {**shares, "idle": max(0.0, 1.0 - sum(shares.values()))}


def _profile(step: Callable[[], Any]) -> dict[str, float]:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    kernels = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
    return shares_of_step(kernels, seconds)
