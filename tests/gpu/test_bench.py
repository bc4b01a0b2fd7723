"""The bench's way to profile a step on CUDA: through the trainer, on a model small enough for any device."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(__file__).resolve().parents[2] / "tools"), *sys.path])
    from benchmarks import gpu

    return gpu


def test_a_profiled_step_is_accounted_for(gpu, tiny_dataset: Path) -> None:
    toy = gpu.WORKLOADS["cpu"][0]
    workload = gpu.Workload("toy", (*toy.overrides, "engine=bf16_zero1"), (2,))
    found = gpu.measure(gpu.Choice(workload, 2, False), tiny_dataset, gpu.Options(steps=3, warm_up=2))
    assert 0.0 < found.seconds < 10.0
    assert found.kernels > 100
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert min(found.shares[part] for part in ("matmul", "attention", "memory-bound", "optimizer")) > 0.0
