"""Training on CUDA: runs where there is a GPU, and says why where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_runs import losses_of, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_cuda_trains_like_the_cpu(tiny_dataset: Path, tmp_path: Path) -> None:
    common = [f"data.path={tiny_dataset}", f"run.dir={tmp_path}", "parallel.tp=1", "parallel.pp=1", "train.steps=6"]
    for device in ("cpu", "cuda"):
        code, output = run([*common, f"run.name={device}", f"launch.device={device}"])
        assert code == 0, output
    for (loss, norm), (want_loss, want_norm) in zip(
        losses_of(tmp_path / "cuda"), losses_of(tmp_path / "cpu"), strict=True
    ):
        assert loss == pytest.approx(want_loss, abs=1e-3)
        assert norm == pytest.approx(want_norm, abs=1e-3)


def test_bf16_on_cuda_learns(tiny_dataset: Path, tmp_path: Path) -> None:
    code, output = run(
        [
            f"data.path={tiny_dataset}",
            f"run.dir={tmp_path}",
            "run.name=bf16",
            "launch.device=cuda",
            "engine.dtype=bf16",
            "parallel.tp=1",
            "parallel.pp=1",
            "train.steps=30",
        ]
    )
    assert code == 0, output
    losses = [loss for loss, _ in losses_of(tmp_path / "bf16")]
    assert losses[-1] < losses[0] - 0.3
