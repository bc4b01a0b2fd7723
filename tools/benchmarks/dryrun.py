"""The peak memory that a dry run says, beside that of real steps on this machine's CPU.

A real rank's memory is its resident memory at the peak, less that before it builds the model. Both count the engine's
start and two steps. What a real process has besides (malloc's fragments, gloo's buffers) is in it.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.table import Report, Row
from megalm.config.compose import compose
from megalm.config.schema import Config
from megalm.launch.function_ranks import call_on_ranks

TOLERANCE = 0.07
LEAST_GIB = 2.0
_KIB = 2**20
"""KiB of a GiB."""


@dataclass(frozen=True)
class Case:
    """One job that runs on this machine.

    Attributes:
        name: in the report.
        ranks: of the job.
        overrides: its config.
    """

    name: str
    ranks: int
    overrides: tuple[str, ...]

    @property
    def config(self) -> Config:
        """The config. Its tensors are large: from 32 MiB on malloc maps each apart, and gives it back when freed."""
        return compose([*_MODEL, "model.num_layers=2", "model.hidden_size=2048", "model.num_heads=16", *self.overrides])


_MODEL = (
    "experiment=gpt3_125m",
    "train.batch_ramp_start=null",
    "launch.device=cpu",
    "model.vocab_size=32000",
    "model.sequence_length=1024",
    "train.micro_batch_size=4",
)
CASES = (
    Case("fp32, ZeRO-1", 1, ("engine=fp32_zero1", "train.global_batch_size=8")),
    # Twice the sequences: activations of 16 bits are as large again, and not in malloc's heap, which has gaps.
    Case("bf16, ZeRO-1", 1, ("engine=bf16_zero1", "train.micro_batch_size=8", "train.global_batch_size=8")),
    Case(
        "fp32, ZeRO-0, full recomputation",
        1,
        ("engine=fp32_zero0", "engine.recompute=full", "train.global_batch_size=8"),
    ),
    Case("bf16, ZeRO-1, dp 2, with gloo's own buffers", 2, ("engine=bf16_zero1", "train.global_batch_size=16")),
)


def run(cases: Sequence[Case] = CASES) -> Report:
    """Run each case, really and dry, and compare its first rank."""
    from megalm.dryrun.processes import reports

    rows = []
    for case in cases:
        measured = call_on_ranks(case.ranks, _measure, case.config, timeout_seconds=1800.0)[0]
        began = time.perf_counter()
        (found,) = reports(case.config, [0], case.ranks, device="cpu")
        seconds = time.perf_counter() - began
        rows.append(Row(f"{case.name}: measured", measured, "GiB", LEAST_GIB))
        rows.append(Row("  dry run", found.peak_gib, "GiB", note=f"{seconds:.0f} s with the start of Python"))
        # Gloo copies what it reduces, which is none of the step's memory.
        target = 100 * TOLERANCE if case.ranks == 1 else None
        rows.append(Row("  difference", 100 * abs(found.peak_gib / measured - 1), "%", target, at_most=True))
    return Report("dryrun", rows)


def _measure(config: Config) -> float:
    """GiB of resident memory at the peak of start and two steps, less those before; on every rank."""
    from megalm.dryrun.run import take_steps
    from megalm.mesh.groups import ParallelContext

    context = ParallelContext.create(_topology(config))
    tiny = replace(config.model, hidden_size=64, num_heads=2, vocab_size=256, sequence_length=64)
    take_steps(replace(config, model=tiny), context, 2)  # code that is loaded when it is used is no memory of a step
    gc.collect()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is now's
    take_steps(config, context, 2)
    return (_resident("VmHWM") - before) / _KIB


def _topology(config: Config):  # noqa: ANN202 - as megalm.config.job gives it
    import torch.distributed as dist

    from megalm.config.job import topology_of

    return topology_of(config, dist.get_world_size())


def _resident(name: str) -> int:
    """KiB, as the kernel counts them."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise AssertionError(f"/proc/self/status has no {name}")
