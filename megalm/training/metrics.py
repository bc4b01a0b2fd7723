"""Meters: time, throughput, utilisation and memory of a training step."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

GIB = 2**30


class StepTimer:
    """Wall time of a step and, within it, the time spent waiting for data.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._start = clock()
        self._data_seconds = 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the body as time spent waiting for data."""
        start = self._clock()
        try:
            yield
        finally:
            self._data_seconds += self._clock() - start

    def restart(self) -> None:
        """Begin a step now: what came since the last one (a validation, a checkpoint) is not part of it."""
        self._start = self._clock()
        self._data_seconds = 0.0

    def lap(self) -> tuple[float, float]:
        """``(step_seconds, data_seconds)`` since the last lap or restart; begins the next step."""
        now = self._clock()
        lap = now - self._start, self._data_seconds
        self._start, self._data_seconds = now, 0.0
        return lap


def tokens_per_second(tokens: int, seconds: float) -> float:
    """Throughput over all ranks; 0 where no time was measured."""
    return tokens / seconds if seconds > 0 else 0.0


def mfu(flops_per_token: float, tokens_per_second: float, ranks: int, peak_flops: float | None) -> float | None:
    """Model FLOPs utilisation (Chowdhery et al. 2022, appendix B): FLOPs the model needs over those the devices have.

    Args:
        flops_per_token: forward and backward FLOPs of the model per token, recomputation excluded.
        tokens_per_second: throughput over all ranks.
        ranks: devices that produce it.
        peak_flops: peak FLOP/s of one device in the run's numeric format; None where it is unknown.

    Returns:
        A fraction, 0 to 1; None where the peak is unknown.
    """
    if peak_flops is None:
        return None
    return flops_per_token * tokens_per_second / (ranks * peak_flops)


def peak_memory_gib(device_type: str) -> float:
    """Most memory this process has held so far: CUDA allocations on ``cuda``, else resident memory."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / GIB
    return _peak_resident_bytes() / GIB


def _peak_resident_bytes() -> int:
    """On Linux from ``/proc``: what ``getrusage`` says there begins with the peak of the parent process."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "VmHWM":
                return int(value.split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)  # macOS counts bytes, others KiB
