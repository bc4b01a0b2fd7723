"""Which library carries the collectives of tensors on a device. No torch."""

from __future__ import annotations

GLOO, NCCL = "gloo", "nccl"


def transport_of(device: str) -> str:
    """``nccl`` for ``cuda:N``, ``gloo`` for ``cpu``: the one place that derives the one from the other.

    Everything else asks ``ParallelContext.transport``, which a dry run sets to what it stands for.
    """
    return NCCL if device.partition(":")[0] == "cuda" else GLOO
