"""What devices can do at most: published peaks, memory and links, from ``hardware.yaml``. No torch.

A device that is not in the table has no peak; then MFU is null. A peak is never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import yaml

from megalm.config.schema import Config
from megalm.config.violation import Violation, close_matches, spoken_list


@dataclass(frozen=True, kw_only=True)
class Device:
    """One kind of accelerator; field meanings and units are those of ``hardware.yaml``.

    Attributes:
        name: key in ``hardware.yaml``, which ``cluster.gpu`` names.
        matches: regular expressions for the whole name that torch gives the device.
        teraflops: dense peak by number format.
        memory_gib: memory.
        memory_gbps: memory bandwidth, gigabytes per second.
        link_gbps: bandwidth to a device of the same node, gigabytes per second and direction.
        network_gbit: bandwidth to other nodes, gigabits per second; None where the vendor has no reference node.
        source: where the figures are published.
    """

    name: str
    matches: tuple[str, ...]
    teraflops: Mapping[str, float]
    memory_gib: float
    memory_gbps: float
    link_gbps: float
    network_gbit: float | None
    source: str

    def peak_flops(self, dtype: str) -> float | None:
        """Dense peak in FLOP per second; None where the device has no units for the format."""
        peak = self.teraflops.get(dtype)
        return None if peak is None else peak * 1e12


@cache
def devices() -> Mapping[str, Device]:
    """Every known device by name."""
    table = yaml.safe_load(Path(__file__).with_name("hardware.yaml").read_text(encoding="utf-8"))
    return MappingProxyType({name: _device(name, entry) for name, entry in table["devices"].items()})


def peak_flops(name: str | None, dtype: str) -> float | None:
    """Dense peak of a device in FLOP per second.

    Args:
        name: key in ``hardware.yaml``; None, like any unknown name, has no peak.
        dtype: ``bf16``, ``fp16``, ``tf32`` or ``fp32`` (vector units: no TF32).
    """
    device = devices().get(name) if name is not None else None
    return None if device is None else device.peak_flops(dtype)


def match_device(torch_name: str) -> str | None:
    """The key of the device that ``torch.cuda.get_device_name()`` calls ``torch_name``; None when it is not known."""
    for device in devices().values():
        if any(re.fullmatch(pattern, torch_name) for pattern in device.matches):
            return device.name
    return None


def device_violations(config: Config) -> list[str]:
    """What is wrong with ``cluster.gpu``, in the form of ``rules.violations``; empty when it is known or null."""
    gpu = config.cluster.gpu
    if gpu is None or gpu in devices():
        return []
    names = close_matches(gpu, devices()) or list(devices())
    right = f"cluster.gpu={spoken_list(names)}, or null where it is another"
    return [str(Violation("cluster.gpu", gpu, "not in hardware.yaml", right))]


def _device(name: str, entry: Mapping[str, object]) -> Device:
    known = {"network_gbit": None, **entry}
    matches, teraflops = known.pop("matches"), known.pop("teraflops")
    assert isinstance(matches, list) and isinstance(teraflops, dict)
    return Device(name=name, matches=tuple(matches), teraflops=MappingProxyType(teraflops), **known)  # type: ignore[arg-type]
