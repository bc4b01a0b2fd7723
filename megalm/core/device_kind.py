"""Which kernels compute with a tensor: those of its device, or of the device that it stands for in a dry run."""

from __future__ import annotations

from torch import Tensor


def device_kind(x: Tensor) -> str:
    """``cpu`` or ``cuda``.

    The fake tensors of a dry run have no values and are on the CPU, since torch makes none on a device that it was not
    built for. They stand for tensors of the device that their mode names as ``stands_for``, so that a dry run takes the
    path that the real step takes there.
    """
    mode = getattr(x, "fake_mode", None)
    kind: str = getattr(mode, "stands_for", x.device.type)
    return kind
