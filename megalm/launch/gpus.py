"""Which GPUs a process sees, and which this machine has. torch is imported here, in functions."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_HIDDEN = ("", "-1")
"""What ``CUDA_VISIBLE_DEVICES`` is set to by somebody who wants none. SLURM writes ``NoDevFiles`` by itself."""


@dataclass(frozen=True)
class Gpus:
    """GPUs of one process.

    Attributes:
        machine: name of the machine, the same for its processes and no others.
        ids: of each GPU that torch sees, in the order of ``cuda:0``, ``cuda:1``, …; the same physical GPU has the same
            id in every process, whatever its number there.
        unused: how many GPUs the machine has if torch sees none of them; 0 also where they were hidden on purpose.
        reason: why it sees none, in words.
    """

    machine: str
    ids: tuple[str, ...] = ()
    unused: int = 0
    reason: str = ""


def visible_gpus(environ: Mapping[str, str], devices: Path = Path("/dev")) -> Gpus:
    """The GPUs of this process.

    Args:
        environ: where ``CUDA_VISIBLE_DEVICES`` is.
        devices: folder of the machine's device files.
    """
    import torch

    machine = _machine()
    if torch.cuda.is_available():
        return Gpus(machine, tuple(_id(number) for number in range(torch.cuda.device_count())))
    if environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in _HIDDEN:
        return Gpus(machine)
    # Device files are there even where a scheduler's control group keeps a job from opening them.
    unused = sum(re.fullmatch(r"nvidia\d+", path.name) is not None for path in devices.glob("nvidia*"))
    built_for_gpus = torch.version.cuda is not None or torch.version.hip is not None
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if not built_for_gpus:
        reason = f"torch {torch.__version__} is built without CUDA"
    else:
        reason = f"torch can use none of them (CUDA_VISIBLE_DEVICES={'unset' if visible is None else visible})"
    return Gpus(machine, unused=unused, reason=reason)


def _id(number: int) -> str:
    """The UUID of a GPU, which NVIDIA's driver knows it by in every process; its place on the bus where torch has none.

    Asking for a device's properties makes no context on it, which would take memory of a GPU that is another rank's.
    """
    import torch

    properties = torch.cuda.get_device_properties(number)
    uuid = getattr(properties, "uuid", None)
    if uuid is not None:
        return f"GPU-{uuid}"
    place = [getattr(properties, name, None) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
    return f"{_machine()}/{':'.join(map(str, place))}" if None not in place else f"{_machine()}/{number}"


def _machine() -> str:
    """Host name and boot: containers of one machine may share the one, machines of one image the other."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()}/{boot.read_text().strip() if boot.exists() else ''}"
