"""Weight gradients that add to the fp32 sum by CUDA's product of 16-bit operands; where there is a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_runs import losses_of, run

from megalm.core.weight_gradients import add_product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 128), (33, 40)], ids=["aligned", "odd"])
def test_the_product_adds_in_fp32(dtype: torch.dtype, outputs: int, inputs: int) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    gradients = torch.randn(4096, outputs, device="cuda", generator=generator).to(dtype)
    x = torch.randn(4096, inputs, device="cuda", generator=generator).to(dtype)
    exact = gradients.double().t() @ x.double()
    whole = torch.full((outputs * inputs + 6,), float("nan"), device="cuda")
    total = whole[2:-4].view(outputs, inputs)  # a parameter's place in a bucket
    add_product(total, gradients, x, replace=True)
    for times in (1, 2, 3):
        error = (total.double() - times * exact).abs().max() / exact.abs().max()
        # TF32 products of fp32 operands are off by 1e-3 where a user allows them; a sum in 16 bits is off by 4e-3.
        assert float(error) < 2e-5, f"{dtype} after {times}"
        add_product(total, gradients, x, replace=False)
    assert int(whole.isnan().sum()) == 6, "nothing else"


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_training_with_it_is_training_without(tiny_dataset: Path, tmp_path: Path, dtype: str) -> None:
    common = [
        f"data.path={tiny_dataset}",
        f"run.dir={tmp_path}",
        "launch.device=cuda",
        f"engine.dtype={dtype}",
        "parallel.tp=1",
        "parallel.pp=1",
        "train.steps=6",
    ]
    for name, fusion in (("plain", "false"), ("fused", "true"), ("again", "true")):
        code, output = run([*common, f"run.name={name}", f"engine.gradient_accumulation_fusion={fusion}"])
        assert code == 0, output
    bound = 1e-4 if dtype == "fp32" else 5e-3
    for (loss, norm), (want_loss, want_norm) in zip(
        losses_of(tmp_path / "fused"), losses_of(tmp_path / "plain"), strict=True
    ):
        assert loss == pytest.approx(want_loss, rel=bound)
        assert norm == pytest.approx(want_norm, rel=bound)
    assert losses_of(tmp_path / "fused") == losses_of(tmp_path / "again"), "the same bits every time"
