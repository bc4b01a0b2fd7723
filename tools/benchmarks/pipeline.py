"""Pipeline schedules on stages that sleep: what of the time is bubble, and how DeepSpeed's own pipeline compares.

Stages sleep and do not compute, so that ranks which outnumber the cores measure the schedule and not the cores.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.table import Report, Row
from megalm.launch.function_ranks import call_on_ranks

SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved_1f1b", 2), ("zb_h1", 1))
"""Name and virtual stages."""

SHAPE = (1, 8, 16)
"""[B, S, H] of what passes between stages."""

TOLERANCE = 0.05


@dataclass(frozen=True)
class Options:
    """Size of the pipeline.

    Attributes:
        ranks: pipeline ranks p.
        micro_batches: per step, m.
        milliseconds: each of a rank's forward, input gradient and weight gradient of a micro-batch.
        rounds: steps of each schedule, of which the median counts.
        race_milliseconds: the same as ``milliseconds`` against DeepSpeed: short, so that each one's own work shows.
        race_rounds: pairs of steps of megalm and DeepSpeed, of which the median ratio counts.
    """

    ranks: int = 4
    micro_batches: int = 16
    milliseconds: float = 40.0
    rounds: int = 3
    race_milliseconds: float = 5.0
    race_rounds: int = 10


def run(options: Options) -> Report:
    """Measure every schedule, then megalm's runner and DeepSpeed's engine in turn."""
    from megalm.core.pipeline.schedule import SCHEDULES as BY_NAME
    from megalm.core.pipeline.schedule import Shape
    from megalm.core.pipeline.timing import bubble_fraction

    measured = call_on_ranks(options.ranks, _measure, options)
    rows = []
    bubbles = {}
    for name, virtual in SCHEDULES:
        steps = zip(*(figures[name] for figures in measured), strict=True)  # by step: (busy, total) of each rank
        bubble = statistics.median(
            1.0 - sum(busy for busy, _ in ranks) / (len(ranks) * max(total for _, total in ranks)) for ranks in steps
        )
        bubbles[name] = bubble
        formula = bubble_fraction(BY_NAME[name], Shape(options.ranks, options.micro_batches, virtual))
        rows.append(Row(f"{name}: bubble", 100 * bubble, "%", note=f"formula {100 * formula:.1f} %"))
        rows.append(Row(f"{name}: |bubble − formula|", 100 * abs(bubble - formula), "points", 100 * TOLERANCE, True))
    rows.append(Row("zb_h1 bubble / 1f1b bubble", bubbles["zb_h1"] / bubbles["1f1b"], "×", 1.0, True))
    pairs = [
        (max(f["megalm"][i] for f in measured), max(f["deepspeed"][i] for f in measured))
        for i in range(options.race_rounds)
    ]
    rows.append(Row("1f1b step, megalm", 1e3 * statistics.median(ours for ours, _ in pairs), "ms"))
    rows.append(Row("1f1b step, DeepSpeed PipelineEngine", 1e3 * statistics.median(t for _, t in pairs), "ms"))
    rows.append(Row("DeepSpeed / megalm, time", statistics.median(t / ours for ours, t in pairs), "×", 1.0))
    return Report("pipeline", rows)


def _measure(options: Options) -> dict[str, list[Any]]:
    """On each rank: (busy, total) seconds per step of each schedule; step seconds of megalm and of DeepSpeed."""
    result: dict[str, list[Any]] = {}
    for name, virtual in SCHEDULES:
        ours = _Megalm(name, virtual, options)
        ours.step()
        result[name] = [ours.step() for _ in range(options.rounds)]
    race = replace(options, milliseconds=options.race_milliseconds)
    ours, theirs = _Megalm("1f1b", 1, race), _DeepSpeed(race)
    ours.step(), theirs.step()
    result["megalm"], result["deepspeed"] = [], []
    for _ in range(options.race_rounds):
        result["megalm"].append(ours.step()[1])
        result["deepspeed"].append(theirs.step())
    return result


class _Sleep(torch.autograd.Function):
    """x·(1 + 0·weight): sleeps in forward, for the gradient of x and for that of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, seconds: float, clock: _Clock, postponed: Any) -> Tensor:
        ctx.parameter, ctx.seconds, ctx.clock, ctx.postponed = weight, seconds, clock, postponed
        clock.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:  # type: ignore[override]
        ctx.clock.sleep(ctx.seconds)
        product = _Product(ctx.parameter, ctx.seconds, ctx.clock)
        if ctx.postponed is not None and ctx.postponed.postpones:
            ctx.postponed.postpone(ctx.parameter, product)
            return gradient.clone(), None, None, None, None
        return gradient.clone(), product(), None, None, None


class _Clock:
    """Sleeps, and knows how long it really slept: a busy machine wakes a process late."""

    def __init__(self) -> None:
        self.slept = 0.0

    def sleep(self, seconds: float) -> None:
        started = time.perf_counter()
        time.sleep(seconds)
        self.slept += time.perf_counter() - started


@dataclass(frozen=True)
class _Product:
    """The weight gradient of one micro-batch."""

    weight: nn.Parameter
    seconds: float
    clock: _Clock

    def start(self) -> None:
        """Nothing to communicate."""

    def __call__(self) -> Tensor:
        self.clock.sleep(self.seconds)
        return torch.zeros_like(self.weight)


class _Megalm:
    """megalm's runner over sleeping stages."""

    def __init__(self, schedule: str, virtual_stages: int, options: Options) -> None:
        from megalm.core.pipeline.p2p import Tensors, TensorSpec
        from megalm.core.pipeline.runner import PipelineRunner
        from megalm.core.weight_gradients import WeightGradients
        from megalm.mesh.groups import ParallelContext
        from megalm.mesh.topology import Topology

        context = ParallelContext.create(Topology(pp=options.ranks, virtual_stages=virtual_stages))
        last = context.topology.num_stages - 1
        weight = nn.Parameter(torch.zeros(1))
        seconds = 1e-3 * options.milliseconds / virtual_stages
        postponed = WeightGradients() if schedule == "zb_h1" else None
        self._clock = clock = _Clock()

        def stages(stage: int, received: Tensors | None, micro_batch: Tensor) -> Tensors:
            x = micro_batch if received is None else received["hidden"]
            y = _Sleep.apply(x, weight, seconds, clock, postponed)
            return {"loss": y.sum()} if stage == last else {"hidden": y}

        self._runner = PipelineRunner(
            stages,
            context,
            schedule=schedule,
            between_stages={"hidden": TensorSpec(SHAPE, torch.float32)},
            weight_gradients=postponed,
        )
        self._optimizer = torch.optim.SGD([weight], lr=0.0)
        self._micro_batches = [torch.ones(SHAPE) for _ in range(options.micro_batches)]

    def step(self) -> tuple[float, float]:
        """(seconds of sleep, seconds of the step)."""
        dist.barrier()
        self._clock.slept, started = 0.0, time.perf_counter()
        self._runner.train(self._micro_batches)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return self._clock.slept, time.perf_counter() - started


class _SleepingLayer(nn.Module):
    """The same stage as a module, for DeepSpeed."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self._seconds, self._clock = seconds, _Clock()

    def forward(self, x: Tensor) -> Tensor:
        return _Sleep.apply(x, self.weight, self._seconds, self._clock, None)


class _DeepSpeed:
    """DeepSpeed's PipelineEngine (1F1B) over one sleeping layer per rank."""

    def __init__(self, options: Options) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ["LOCAL_RANK"] = "0"
        warnings.simplefilter("ignore")
        import deepspeed
        from deepspeed.pipe import PipelineModule

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled here and now
        deepspeed.init_distributed(dist_backend="gloo")
        with contextlib.redirect_stdout(io.StringIO()):  # it describes every stage
            module = PipelineModule(
                layers=[_SleepingLayer(1e-3 * options.milliseconds) for _ in range(options.ranks)],
                num_stages=options.ranks,
                loss_fn=lambda output, _: output.sum(),
                partition_method="uniform",
            )
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=torch.optim.SGD(list(module.parameters()), lr=0.0),
            config={
                "train_micro_batch_size_per_gpu": SHAPE[0],
                "gradient_accumulation_steps": options.micro_batches,
                "steps_per_print": 10**9,
            },
        )
        self._micro_batches = [(torch.ones(SHAPE), torch.ones(SHAPE)) for _ in range(options.micro_batches)]

    def step(self) -> float:
        """Seconds of one step."""
        dist.barrier()
        started = time.perf_counter()
        self._engine.train_batch(iter(self._micro_batches))
        return time.perf_counter() - started
