"""The bench's way to time and to profile a step on CUDA, on a model small enough for any device."""

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


def test_a_profiled_step_is_accounted_for(gpu, monkeypatch) -> None:
    import torch.distributed as dist

    from megalm.config.schema import Model

    monkeypatch.setattr(gpu, "GLOBAL_BATCH", 8)
    model = Model(num_layers=2, hidden_size=128, num_heads=2, sequence_length=128, vocab_size=512)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert 0.0 < gpu._seconds(model, 4, False, gpu.Options(steps=3, warm_up=2)) < 10.0
        step = gpu._make_step(model, 4, False)
        step()
        shares = gpu._profile(step)
    finally:
        dist.destroy_process_group()
    assert sum(shares.values()) == pytest.approx(1.0)
    assert min(shares["matmul"], shares["attention"], shares["memory-bound"]) > 0.0
