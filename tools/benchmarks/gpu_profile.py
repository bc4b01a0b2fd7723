"""What the time of a step goes to, from a profile: kinds of kernels on a GPU, kinds of operations on the CPU."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


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
    ("communication", ("nccl", "gloo")),
    ("copies", ("memcpy htod", "memcpy dtoh", "memcpy htoh")),
    ("optimizer", ("adam",)),
    ("attention", ("flash", "fmha", "attention", "sdpa", "mha_")),
    ("matmul", ("gemm", "cutlass", "cublas", "nvjet", "xmma", "matmul", "triton_tem", "::mm", "::addmm", "bmm")),
)
"""What a kernel's name contains, first match."""

OTHERWISE = "memory-bound"
"""Every other kernel: element-wise operations, norms."""


def kind_of(name: str) -> str:
    """What a kernel spends its time on."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS if any(part in lower for part in parts)), OTHERWISE)


def shares_of_step(kernels: Iterable[Kernel], seconds: float) -> dict[str, float]:
    """Share of a step by kind of kernel; idle is the time in which none ran.

    Where kernels overlap, the time goes to the one that began first, so that shares add up to one.
    """
    shares = dict.fromkeys((*(kind for kind, _ in KINDS), OTHERWISE), 0.0)
    covered = float("-inf")
    for kernel in sorted(kernels, key=lambda k: (k.start, k.end)):
        shares[kind_of(kernel.name)] += max(0.0, kernel.end - max(kernel.start, covered)) / (1e6 * seconds)
        covered = max(covered, kernel.end)
    return {**shares, "idle": max(0.0, 1.0 - sum(shares.values()))}


class StepProfile:
    """A profile from now on.

    Args:
        device: ``cuda`` or ``cpu``.
    """

    def __init__(self, device: str) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._on_gpu = device == "cuda"
        self._profiler: Any = profile(activities=[ProfilerActivity.CUDA if self._on_gpu else ProfilerActivity.CPU])
        self._synchronise()
        self._profiler.start()
        self._began = time.perf_counter()

    def end(self) -> tuple[dict[str, float], int]:
        """Shares since the beginning, and how many kernels ran."""
        self._synchronise()
        seconds = time.perf_counter() - self._began
        self._profiler.stop()
        kernels = list(self._kernels())
        return shares_of_step(kernels, seconds), len(kernels)

    def _kernels(self) -> Iterable[Kernel]:
        from torch.autograd import DeviceType

        for event in self._profiler.events():
            on_gpu = event.device_type == DeviceType.CUDA
            # On the CPU operations call others: those that call none do the work, and products with all that they call.
            works = event.name.startswith("aten::") and (not event.cpu_children or kind_of(event.name) != OTHERWISE)
            if on_gpu if self._on_gpu else works:
                yield Kernel(event.name, event.time_range.start, event.time_range.end)

    def _synchronise(self) -> None:
        import torch

        if self._on_gpu:
            torch.cuda.synchronize()
