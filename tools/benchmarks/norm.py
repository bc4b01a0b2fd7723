"""The gradient norm: how exact it is and what it costs, at up to a billion elements on one partition.

The truth is a sum in fp64. Gradients are drawn from a normal distribution, a part at a time, into one fp32 buffer, as
ZeRO keeps them: 4 GB for a billion. Where there is a CUDA device it is measured there too.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.table import Report, Row
from megalm.core.sums import sum_of_squares

LARGEST_ERROR = 1e-6
LARGEST_COST = 1.25
"""Times ``torch.linalg.vector_norm``, which reads the same memory once."""
_PART = 2**24


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        rounds: repetitions that a median is taken of.
        sizes: elements of the gradient.
    """

    rounds: int = 5
    sizes: tuple[int, ...] = (10**6, 10**7, 10**8, 10**9)


def run(options: Options) -> Report:
    """Measure every size on every device there is; on the CPU in one thread, as a rank that shares the machine has."""
    torch.set_num_threads(1)  # more of them wait for each other where something else runs, and measure that
    devices = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    return Report("norm", [row for device in devices for size in options.sizes for row in _rows(size, device, options)])


def _rows(size: int, device: torch.device, options: Options) -> list[Row]:
    values = torch.empty(size, device=device)
    generator = torch.Generator(device).manual_seed(0)
    truth = torch.zeros((), dtype=torch.float64, device=device)
    for part in values.split(_PART):
        part.normal_(std=1e-3, generator=generator)
        truth += part.double().square().sum()
    exact = math.sqrt(float(truth))
    ways: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: sum_of_squares(values).sqrt(),
        "vector_norm": lambda: torch.linalg.vector_norm(values),
    }
    errors = {name: abs(float(way()) / exact - 1.0) for name, way in ways.items()}
    # Of the processor, not of the wall: what else a shared machine does would be taken for the norm's cost.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.rounds):
        for name, way in ways.items():
            start = clock()
            float(way())
            seconds[name].append(clock() - start)
    cost = {name: statistics.median(taken) for name, taken in seconds.items()}
    label = f"{size:.0e} elements, {device.type}"
    return [
        Row(
            f"{label}: relative error",
            errors["ours"],
            "",
            LARGEST_ERROR,
            True,
            f"vector_norm {errors['vector_norm']:.1e}",
        ),
        Row(f"{label}: per step", 1e3 * cost["ours"], "ms", note=f"vector_norm {1e3 * cost['vector_norm']:.3g} ms"),
        Row(
            "  beside vector_norm",
            cost["ours"] / cost["vector_norm"],
            "×",
            LARGEST_COST if size >= 10**7 else None,
            True,
        ),
    ]
