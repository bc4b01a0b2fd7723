"""Who reads what of a checkpoint when a run resumes: every byte once over the replicas. No torch.

What ZeRO splits over replicas, each reads its own part of. What every replica holds whole (ZeRO-0; parameters that are
not trained, and buffers; tied embeddings, on two stages), they read equal shares of and give each other. A parameter
that tensor-parallel ranks hold copies of (norms, some biases) is read by each of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from megalm.engine.bucket_size import bucket_elements, bucket_slices
from megalm.mesh.parameter import ParameterRecord, StateRun
from megalm.mesh.topology import Topology

MOMENTS = ("exp_avg", "exp_avg_sq")
"""State of AdamW per element, as torch names it."""

_ALIGNMENT = 2
"""DeepSpeed pads a bucket to a multiple of so many elements per replica."""


def is_shared(record: ParameterRecord, *, splits_state: bool, splits_weights: bool) -> bool:
    """Whether the ranks that hold a slice read shares of it and give each other all, or each reads its own part.

    Args:
        record: of the tensor.
        splits_state: whether replicas hold different parts of masters and moments (ZeRO-1 and more).
        splits_weights: whether they hold different parts of the weights (ZeRO-3).
    """
    if record.is_buffer or record.copies:
        return True
    return not (splits_weights or (record.trainable and splits_state))


def kinds_of(record: ParameterRecord, *, moments: bool) -> tuple[str, ...]:
    """What is read of a tensor; ``moments``: whether those of the optimizer, too."""
    if record.is_buffer:
        return ("buffer",)
    return ("weight", *(MOMENTS if moments and record.trainable else ()))


def share_of(numel: int, index: int, members: int) -> tuple[int, int]:
    """(first element, length) that one of some members reads of a flattened local tensor."""
    share = -(-numel // members)
    start = min(index * share, numel)
    return start, min(share, numel - start)


def runs_of_rank(
    records: Sequence[ParameterRecord],
    topology: Topology,
    rank: int,
    *,
    zero_stage: int,
    bucket_mib: float,
    moments: bool = True,
) -> list[StateRun]:
    """Everything that one rank reads.

    Args:
        records: of the tensors that the rank holds, in the order of its model.
        topology: of the run that resumes.
        rank: which.
        zero_stage: of the run that resumes.
        bucket_mib: ``engine.bucket_mib`` of the run that resumes.
        moments: whether the optimizer's state is read, too; not for weights alone.
    """
    runs: list[StateRun] = []
    split = []
    for record in records:
        if not is_shared(record, splits_state=zero_stage > 0, splits_weights=zero_stage == 3):
            split.append(record)
            continue
        start, length = share_of(record.shard.local_numel, *_place_among_holders(record, topology, rank))
        runs += [StateRun(record, kind, start, length) for kind in kinds_of(record, moments=moments)]
    places = _parts(split, topology, rank) if zero_stage == 3 else _pieces(split, topology, rank, bucket_mib)
    for record, start, stop in places:
        if start < stop:
            runs += [StateRun(record, kind, start, stop - start) for kind in kinds_of(record, moments=moments)]
    return runs


def _place_among_holders(record: ParameterRecord, topology: Topology, rank: int) -> tuple[int, int]:
    """(index, number) among the ranks that hold the same slice: the replicas, and those of the stage of a copy."""
    index, replicas = 0, 1
    for axis in record.replicated_over:
        degree = topology.degree(axis)
        index, replicas = index * degree + topology.coordinate(rank, axis), replicas * degree
    if not record.copies:
        return index, replicas
    stages = topology.first_and_last_pp_ranks
    return stages.index(topology.coordinates(rank).pp) * replicas + index, len(stages) * replicas


def _parts(
    records: Iterable[ParameterRecord], topology: Topology, rank: int
) -> Iterator[tuple[ParameterRecord, int, int]]:
    """ZeRO-3: an equal part of each parameter."""
    for record in records:
        start, length = share_of(record.shard.local_numel, *_place_among_holders(record, topology, rank))
        yield record, start, start + length


def _pieces(
    records: Sequence[ParameterRecord], topology: Topology, rank: int, bucket_mib: float
) -> Iterator[tuple[ParameterRecord, int, int]]:
    """ZeRO-1 and 2: an equal piece of each bucket; as ``optimizer.parameter_groups`` and ``layout`` make them."""

    def group_of(record: ParameterRecord) -> tuple[object, ...]:
        owned = record.is_owned_by(topology, rank, among_replicas=False)
        split, partial = topology.tp > 1 and "tp" in record.split_over, bool(record.partial_over)
        return record.replicated_over, record.decays, split, partial, owned

    for _, found in groupby(sorted(records, key=group_of), key=group_of):
        members = list(found)
        index, replicas = _place_among_holders(members[0], topology, rank)
        for cut in bucket_slices(members, bucket_elements(bucket_mib, replicas)):
            bucket = members[cut]
            padded = _ALIGNMENT * replicas
            part = -(-sum(record.shard.local_numel for record in bucket) // padded) * padded // replicas
            low, high, offset = index * part, (index + 1) * part, 0
            for record in bucket:
                numel = record.shard.local_numel
                yield record, max(low - offset, 0), min(high - offset, numel)
                offset += numel
