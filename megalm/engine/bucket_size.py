"""Where gradients are cut into buckets; see ``layout.py``. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megalm.mesh.parameter import ParameterRecord

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


def bucket_slices(records: Sequence[ParameterRecord], elements: int) -> Iterator[slice]:
    """Cut at stages, and where a bucket is full; no parameter is cut, and the order is kept.

    Args:
        records: of parameters of one kind.
        elements: of :func:`bucket_elements`.
    """
    start, held = 0, 0
    for number, record in enumerate(records):
        if number > start and (held >= elements or records[number - 1].stage != record.stage):
            yield slice(start, number)
            start, held = number, 0
        # Without the padding of vocabularies, so that it moves no parameter to another bucket.
        held += record.shard.saved.local_numel
    yield slice(start, len(records))
