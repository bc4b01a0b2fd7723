from __future__ import annotations

import pytest

from megalm.config.compose import compose
from megalm.plan.hardware import device_violations, devices, match_device, peak_flops


@pytest.mark.parametrize(
    ("torch_name", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100_80gb"),
        ("NVIDIA A100-SXM4-40GB", "a100_40gb"),
        ("NVIDIA A100 80GB PCIe", "a100_pcie_80gb"),
        ("NVIDIA H100 80GB HBM3", "h100_80gb"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H200", "h200"),
        ("Tesla V100-SXM2-32GB", "v100_32gb"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H2000", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_devices_are_recognised_by_their_whole_name(torch_name: str, key: str | None) -> None:
    assert match_device(torch_name) == key


def test_peaks_are_dense_and_never_guessed() -> None:
    assert peak_flops("a100_80gb", "bf16") == 312e12
    assert peak_flops("h100_80gb", "bf16") == pytest.approx(989.4e12)
    assert peak_flops("v100_32gb", "bf16") is None
    assert peak_flops("v100_32gb", "fp16") == 125e12
    assert peak_flops("unheard_of", "bf16") is None
    assert peak_flops(None, "bf16") is None
    assert peak_flops("a100_80gb", "fp12") is None


@pytest.mark.parametrize("name", sorted(devices()))
def test_entries_are_plausible(name: str) -> None:
    device = devices()[name]
    peaks = device.teraflops
    assert device.source and device.matches
    assert set(peaks) <= {"bf16", "fp16", "tf32", "fp32"} and {"fp16", "fp32"} <= set(peaks)
    assert peaks["fp32"] <= peaks.get("tf32", peaks["fp16"]) <= peaks["fp16"]
    assert peaks.get("bf16", peaks["fp16"]) == peaks["fp16"]
    assert 0 < device.link_gbps < device.memory_gbps


def test_a_misspelt_device_is_named() -> None:
    assert device_violations(compose(["model=gpt3_125m", "cluster.gpu=a100_80g"])) == [
        "cluster.gpu=a100_80g: not in hardware.yaml; "
        "cluster.gpu=a100_80gb, h100_80gb or a100_40gb, or null where it is another"
    ]
    assert device_violations(compose(["model=gpt3_125m", "cluster.gpu=null"])) == []
