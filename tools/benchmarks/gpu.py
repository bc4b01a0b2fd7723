"""Training on one device by the command line's own path: model FLOPs utilisation, and what the time of a step goes to.

Each choice is a process that runs ``megalm train`` on a prepared dataset: loader, copies, reductions, record and all.
Seconds per step are those of the run's ``metrics.jsonl``; one more step is profiled. The process ends there, so that
nothing is saved. Utilisation is model FLOPs (``models.counts.flops_per_token``: neither recomputation nor padding is
progress) over the dense peak of ``megalm/plan/hardware.yaml``.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_data import prepare_own_source
from benchmarks.table import Report, Row

PARTS = ("matmul", "attention", "memory-bound", "optimizer", "copies", "communication", "idle")
"""What the time of a step goes to; together all of it."""

OUT_OF_MEMORY = ("out of memory", "OutOfMemoryError")


@dataclass(frozen=True)
class Workload:
    """A model to train.

    Attributes:
        name: in words.
        overrides: of the command line.
        micro_batches: sequences per micro-batch to try; what does not fit is passed over.
        target: least utilisation; None: for information.
    """

    name: str
    overrides: tuple[str, ...]
    micro_batches: tuple[int, ...]
    target: float | None = None


_GPT3 = ("train.global_batch_size=32", "parallel=single", "cluster=local", "engine=bf16_zero1")
WORKLOADS: dict[str, tuple[Workload, ...]] = {
    "cuda": (
        Workload("gpt3_1_3b", ("experiment=gpt3_1_3b", *_GPT3), (16, 8, 4, 2), 0.50),
        Workload("gpt3_125m", ("experiment=gpt3_125m", *_GPT3), (32, 16, 8), 0.40),
    ),
    "cpu": (
        Workload(
            "toy",
            (
                "experiment=quickstart",
                "parallel=single",
                "model.num_layers=2",
                "model.hidden_size=64",
                "model.num_heads=2",
                "model.sequence_length=64",
                "train.global_batch_size=4",
            ),
            (4, 2),
        ),
    ),
}
"""By kind of device; the CPU's shows that the bench works."""

_COMMON = (
    "run.name=bench",
    "train.steps=100000",  # the process ends long before
    "train.validate_every=0",
    "checkpoint.every=0",
    "logging=plain",
    "report.plot=false",
    "report.prompt=null",
)


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        steps: timed steps of each choice, of which the median counts.
        warm_up: steps before, in which ``torch.compile`` does its work.
        device: ``cuda`` or ``cpu``.
        seconds: longest that one choice may take.
    """

    steps: int = 8
    warm_up: int = 4
    device: str = "cuda"
    seconds: float = 600.0


@dataclass(frozen=True)
class Choice:
    """One way to train a workload."""

    workload: Workload
    micro_batch: int
    compiled: bool

    def __str__(self) -> str:
        return f"{self.workload.name}, micro-batch {self.micro_batch}, {'compiled' if self.compiled else 'eager'}"


@dataclass(frozen=True)
class Measured:
    """What a choice gave.

    Attributes:
        choice: what was measured.
        seconds: of a step, the median.
        tokens_per_second: at that pace.
        mfu: utilisation, 0 to 1; None where the device's peak is unknown.
        memory_gib: most that was allocated.
        kernels: launched in the profiled step.
        shares: of the profiled step, by what its time goes to.
    """

    choice: Choice
    seconds: float
    tokens_per_second: float
    mfu: float | None
    memory_gib: float
    kernels: int
    shares: dict[str, float]


class NoRoomError(Exception):
    """A choice needs more memory than the device has."""


def run(options: Options) -> Report:
    """Time every choice of all workloads."""
    if (reason := missing(options.device)) is not None:
        return Report("gpu", skipped=reason)
    with tempfile.TemporaryDirectory(prefix="megalm-bench-") as name:
        dataset = prepare_own_source(Path(name) / "data")
        found = [
            measured for workload in WORKLOADS[options.device] for measured in _all_choices(workload, dataset, options)
        ]
    return Report("gpu", rows_of(found, WORKLOADS[options.device]), text=table_of(found))


def missing(device: str) -> str | None:
    """Why nothing can be measured on a device; None: it can."""
    import torch

    from megalm.plan.hardware import match_device

    if device == "cpu":
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    name = torch.cuda.get_device_name()
    return None if match_device(name) else f"{name} has no peak in megalm/plan/hardware.yaml"


def _all_choices(workload: Workload, dataset: Path, options: Options) -> Iterator[Measured]:
    for compiled in (False, True):
        for micro_batch in workload.micro_batches:
            try:
                yield measure(Choice(workload, micro_batch, compiled), dataset, options)
            except NoRoomError:
                continue


def largest_that_fits(workload: Workload, compiled: bool, dataset: Path, options: Options) -> Measured:
    """Of a workload's micro-batches the first that the device has room for.

    Raises:
        NoRoomError: none does.
    """
    for micro_batch in workload.micro_batches:
        try:
            return measure(Choice(workload, micro_batch, compiled), dataset, options)
        except NoRoomError:
            continue
    raise NoRoomError(f"{workload.name}: no micro-batch of {workload.micro_batches} fits")


def measure(choice: Choice, dataset: Path, options: Options) -> Measured:
    """Train a choice in a process of its own for a few steps.

    Raises:
        NoRoomError: the device has too little memory.
        RuntimeError: it failed otherwise; with the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="megalm-bench-") as name:
        result = Path(name) / "result.json"
        overrides = [
            *choice.workload.overrides,
            *_COMMON,
            f"train.micro_batch_size={choice.micro_batch}",
            f"engine.compile={str(choice.compiled).lower()}",
            f"data.path={dataset}",
            f"run.dir={name}",
            f"launch.device={options.device}",
        ]
        tools = Path(__file__).resolve().parents[1]
        path = os.pathsep.join([str(tools), str(tools.parent), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks.gpu_run"),
                *(str(result), str(options.warm_up), str(options.steps), *overrides),
            ],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
            timeout=options.seconds,
        )
        if not result.exists():
            said = done.stdout + done.stderr
            if any(words in said for words in OUT_OF_MEMORY):
                raise NoRoomError(str(choice))
            tail = "\n".join(said.splitlines()[-12:])
            raise RuntimeError(f"{choice}: ended with exit code {done.returncode}:\n{tail}")
        return _measured(choice, json.loads(result.read_text(encoding="utf-8")))


def _measured(choice: Choice, found: dict[str, list[dict[str, float | None]] | dict[str, float] | int]) -> Measured:
    rows, shares, kernels = found["steps"], found["shares"], found["kernels"]
    assert isinstance(rows, list) and isinstance(shares, dict) and isinstance(kernels, int)
    seconds = statistics.median(float(row["step_seconds"] or 0.0) for row in rows)
    pace = [(float(row["step_seconds"] or 0.0), row) for row in rows]
    median = min(pace, key=lambda each: abs(each[0] - seconds))[1]
    mfu = median["mfu"]
    return Measured(
        choice=choice,
        seconds=seconds,
        tokens_per_second=float(median["tokens_per_second"] or 0.0),
        mfu=None if mfu is None else float(mfu),
        memory_gib=max(float(row["memory_gib"] or 0.0) for row in rows),
        kernels=kernels,
        shares=shares,
    )


def rows_of(found: Sequence[Measured], workloads: Sequence[Workload]) -> list[Row]:
    """Each choice's figure, and the best of each workload beside its target."""
    rows = []
    for workload in workloads:
        own = [each for each in found if each.choice.workload is workload]
        if not own:
            target = None if workload.target is None else 100 * workload.target
            rows.append(Row(f"{workload.name}: no micro-batch fits", 0.0, "% MFU", target))
            continue
        rows += [_row(str(each.choice), each, None) for each in own]
        best = min(own, key=lambda each: each.seconds)
        rows.append(_row(f"{workload.name}, best", best, workload.target))
    return rows


def _row(name: str, measured: Measured, target: float | None) -> Row:
    note = f"{measured.seconds:.3f} s a step"
    if measured.mfu is None:
        return Row(name, measured.tokens_per_second, "tokens/s", note=note)
    return Row(name, 100 * measured.mfu, "% MFU", None if target is None else 100 * target, note=note)


def table_of(found: Sequence[Measured]) -> str:
    """One line per choice: pace, utilisation, memory, kernels, and the share of each part in percent."""
    head = ("", "s/step", "tokens/s", "MFU %", "GiB", "kernels", *(f"{part} %" for part in PARTS))
    lines = [
        (
            str(each.choice),
            f"{each.seconds:.3f}",
            f"{each.tokens_per_second:,.0f}",
            "-" if each.mfu is None else f"{100 * each.mfu:.1f}",
            f"{each.memory_gib:.1f}",
            f"{each.kernels:,}",
            *(f"{100 * each.shares[part]:.1f}" for part in PARTS),
        )
        for each in found
    ]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *lines)
    )
