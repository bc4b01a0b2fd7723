"""How large a bucket of gradients is; see ``layout.py``. No torch."""

from __future__ import annotations

MIB = 2**20

REPLICAS_OF_A_BUCKET = 128
"""Up to so many replicas share a bucket of ``engine.bucket_mib``."""

_FP32_BYTES = 4


def bucket_elements(bucket_mib: float, replicas: int) -> int:
    """Gradients from which a bucket is full.

    Args:
        bucket_mib: ``engine.bucket_mib``.
        replicas: ranks that share it.
    """
    return int(bucket_mib * MIB / _FP32_BYTES * max(1.0, replicas / REPLICAS_OF_A_BUCKET))
