"""Where values cross between the host and a device: the functions through which a training step does so.

A read makes the host wait for all that the device was asked to do before, and meanwhile nothing more is asked of it. So
a step reads once, and may do so late (:class:`Reading`). What the host writes is copied from page-locked memory, which
needs no wait at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Reading:
    """Values on their way to the host.

    Args:
        host: where they arrive, on the host.
        arrived: happens when they have; None: they are there.
    """

    def __init__(self, host: Tensor, arrived: torch.cuda.Event | None = None) -> None:
        self._host, self._arrived = host, arrived

    def values(self) -> list[float]:
        """The values, flat; waits for them, and not for what the device was asked to do later."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return host_values(self._host)


def start_reading(values: Tensor) -> Reading:
    """Begin to copy a few values to the host.

    On the CPU nothing is copied: the tensor must not change until the values are taken.
    """
    if values.device.type != "cuda":
        return Reading(values)
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return Reading(host, arrived)


def read(values: Tensor) -> list[float]:
    """A few values of a device, flat; the host waits."""
    return start_reading(values).values()


def host_values(values: Tensor) -> list[float]:
    """The elements of a tensor on the host, flat: the one place where a step looks at a value.

    A dry run, whose tensors have none, answers in its stead.
    """
    found: list[float] = values.reshape(-1).tolist()
    return found


def staging(nbytes: int, device: torch.device) -> Tensor:
    """Host memory, [nbytes] uint8, from which :func:`to_device` copies to ``device`` without a wait."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; on the CPU the tensor itself.

    The host does not wait if the tensor is in page-locked memory (:func:`staging`). That memory is used for nothing
    else before the copy is done, also if the tensor is forgotten at once: torch's allocator of such memory sees to it.
    """
    return values.to(device, non_blocking=True)


def numbers_to_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """A few numbers, [N] fp64, on a device; the host does not wait."""
    host = torch.tensor(numbers, dtype=torch.float64)
    return to_device(host.pin_memory() if device.type == "cuda" else host, device)
