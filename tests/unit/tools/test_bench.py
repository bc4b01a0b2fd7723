"""What the bench makes of its measurements; the measurements themselves are no tests."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[3] / "tools"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(TOOLS))
    try:
        spec = importlib.util.spec_from_file_location("bench", TOOLS / "bench.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(TOOLS))


@pytest.mark.parametrize(("value", "at_most", "met"), [(2.0, False, True), (0.5, False, False), (0.5, True, True)])
def test_a_target_is_a_floor_or_a_ceiling(bench, value: float, at_most: bool, met: bool) -> None:
    from benchmarks.table import Row

    row = Row("figure", value, "×", target=1.0, at_most=at_most)
    assert row.met is met
    assert ("NOT MET" in str(bench.Report("part", [row]))) is not met
    assert Row("figure", value).met is None


@pytest.mark.parametrize(("arguments", "code"), [([], 0), (["--strict"], 1)])
def test_a_missed_target_fails_a_strict_run_only_and_json_has_it(
    bench, monkeypatch, tmp_path, capsys, arguments: list[str], code: int
) -> None:
    from benchmarks.table import Row

    report = bench.Report("cpu", [Row("speed", 1.2, "×", target=1.5), Row("rate", 3.0, "TFLOP/s")])
    monkeypatch.setattr(bench, "PARTS", {"cpu": lambda options: report})
    assert bench.main(["all", "--json", str(tmp_path / "out.json"), *arguments]) == code
    (written,) = json.loads((tmp_path / "out.json").read_text())
    assert [(row["name"], row["value"], row["met"]) for row in written["rows"]] == [
        ("speed", 1.2, False),
        ("rate", 3.0, None),
    ]
    assert "≥ 1.5: NOT MET" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["speed"], ["cpu", "--rounds", "0"]])
def test_bad_arguments_exit_with_2(bench, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        bench.main(arguments)
    assert exit_.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_the_gpu_part_says_why_it_is_skipped(bench, capsys) -> None:
    assert bench.main(["gpu", "--strict"]) == 0
    assert capsys.readouterr().out == "gpu: skipped: no CUDA device\n"


def test_ratios_are_medians_of_pairs_and_the_rate_is_the_best(bench) -> None:
    from benchmarks import cpu

    from megalm.models.counts import flops_per_token

    rounds = [
        {"megalm": 1.0, "hf": 2.0, "hf_malloc": 1.5, "matmul": 1.0},
        {"megalm": 3.0, "hf": 3.0, "hf_malloc": 3.0, "matmul": 2.0},  # the machine was busy
        {"megalm": 1.0, "hf": 1.8, "hf_malloc": 1.4, "matmul": 1.5},
    ]
    rows = {row.name: row for row in cpu._rows(rounds)}
    assert rows["megalm / Hugging Face"].value == 1.8
    assert rows["megalm / Hugging Face"].met is True
    assert rows["bf16 matmul, best shape and round"].value == 2.0
    share = flops_per_token(cpu.MODEL) * 8 * 512 / 2e12
    assert rows["megalm's share of it"].value == pytest.approx(share)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matmul"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32>", "matmul"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "communication"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "memory-bound"),
        ("triton_per_fused_native_layer_norm_0", "memory-bound"),
        ("Memcpy DtoD (Device -> Device)", "memory-bound"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("Memcpy DtoH (Device -> Pageable)", "copies"),
        ("void at::native::multi_tensor_apply_kernel<..., at::native::FusedAdamMathFunctor<float, 4, 1>>", "optimizer"),
        ("aten::mm", "matmul"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::mul", "memory-bound"),
    ],
)
def test_kernels_are_told_apart(bench, kernel: str, kind: str) -> None:
    from benchmarks.gpu_profile import kind_of

    assert kind_of(kernel) == kind


def test_shares_of_a_step_add_up_to_one_though_kernels_overlap(bench) -> None:
    from benchmarks.gpu_profile import Kernel, shares_of_step

    kernels = [
        Kernel("gemm", 0.0, 40.0),
        Kernel("nccl", 20.0, 60.0),  # 20 of it hidden
        Kernel("elementwise", 25.0, 30.0),  # hidden
        Kernel("flash_fwd", 70.0, 80.0),
    ]
    assert shares_of_step(kernels, 1e-4) == pytest.approx(
        {
            "communication": 0.2,
            "copies": 0.0,
            "optimizer": 0.0,
            "attention": 0.1,
            "matmul": 0.4,
            "memory-bound": 0.0,
            "idle": 0.3,
        }
    )


def test_the_equation_of_memory_is_that_of_the_paper(bench) -> None:
    """Korthikanti et al. 2022, table 2, less dropout's masks and what fused attention never stores."""
    from benchmarks.memory import BATCH, MODEL, Case

    sbh = MODEL.sequence_length * BATCH * MODEL.hidden_size
    assert Case("none").layer_bytes == 32 * sbh
    assert Case("none", tp=2).layer_bytes == (8 + 24 / 2) * sbh
    assert Case("none", tp=2, sequence_parallel=True).layer_bytes == 32 * sbh / 2
    assert Case("full").layer_bytes == Case("full", tp=2).layer_bytes == 2 * sbh
    assert Case("full", tp=2, sequence_parallel=True).layer_bytes == sbh
