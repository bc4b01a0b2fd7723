"""How gradients, masters and weights lie in memory: in buckets, of which each replica owns an equal piece.

A *bucket* is a run of parameters of one kind and one pipeline stage. It has a flat buffer of its own, and ZeRO gives
each replica an equal piece of *every* bucket, so that one reduce-scatter sums a bucket's gradients and one all-gather
distributes its updated weights, however many replicas there are. (Were one buffer of everything cut into a range per
replica, a bucket would lie in the ranges of many replicas, with a reduction to each.)

How large a bucket is (``bucket_size.py``): at least ``engine.bucket_mib`` of fp32 gradients; above 128 replicas, as
much more as there are more replicas. At the default of 32 MiB a replica's piece is thus never below 256 KiB, except
where a stage has no more parameters of a kind: a ring passes pieces on, and what it takes for a piece that is smaller
is latency. Small parameters (norms, biases) of a stage share a bucket, since they are of one kind.

So the reductions of a step number at most ``Σ (bytes of a kind in a stage / bucket size + 1)`` over kinds and stages:
the number of replicas is not in it, but through the bucket's size, which makes it smaller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from megalm.engine.bucket_size import bucket_elements, bucket_slices
from megalm.engine.optimizer import ParameterGroup


def cut_into_buckets(groups: Sequence[ParameterGroup], bucket_mib: float) -> list[ParameterGroup]:
    """Cut groups into buckets, in their order.

    Args:
        groups: of :func:`megalm.engine.optimizer.parameter_groups`.
        bucket_mib: ``engine.bucket_mib``.
    """
    return [
        replace(group, parameters=group.parameters[members])
        for group in groups
        for members in bucket_slices(
            [p.record for p in group.parameters], bucket_elements(bucket_mib, group.replicas.size)
        )
    ]


@dataclass(frozen=True)
class FlatLayout:
    """How a bucket lies in its flat buffer.

    Attributes:
        group: the parameters, one after the other.
        numel: elements of the buffer, padding at its end included.
        partition: elements that each replica owns, in the order of replicas; None: every replica owns all.
    """

    group: ParameterGroup
    numel: int
    partition: int | None

    @classmethod
    def replicated(cls, group: ParameterGroup) -> FlatLayout:
        """Without padding, owned by every replica."""
        return cls(group, sum(p.parameter.numel() for p in group.parameters), None)

    @property
    def stage(self) -> int:
        """Pipeline stage of its parameters."""
        return self.group.parameters[0].record.stage

    @property
    def owned_here(self) -> tuple[int, int]:
        """The range that this replica updates."""
        if self.partition is None:
            return 0, self.numel
        replica = self.group.replicas.index
        return replica * self.partition, (replica + 1) * self.partition

    def of_words(self, owned: Tensor) -> list[Tensor]:
        """What this replica owns of the buffer without the padding of vocabularies, as few pieces as there are."""
        low, high = self.owned_here
        pieces, begin = [], low
        for p, (_, start) in zip(self.group.parameters, self.places(), strict=True):
            padding = start + p.shard.saved.local_numel, start + p.shard.local_numel
            if padding[0] < padding[1] and begin < padding[1] and padding[0] < high:
                pieces.append(owned[begin - low : max(padding[0], begin) - low])
                begin = min(padding[1], high)
        return [*pieces, owned[begin - low :]]

    def places(self) -> Iterator[tuple[nn.Parameter, int]]:
        """(parameter, where it begins) of each member."""
        start = 0
        for p in self.group.parameters:
            yield p.parameter, start
            start += p.parameter.numel()


def in_model_order(layouts: Sequence[FlatLayout], parameters: Sequence[nn.Parameter]) -> list[int]:
    """Numbers of the layouts in the order in which forward comes to the first parameter of each.

    Backward completes them in the opposite order: a bucket's gradients are there once those of its first parameter are.

    Args:
        layouts: of buckets.
        parameters: of the model, in the order in which forward comes to them.
    """
    position = {parameter: number for number, parameter in enumerate(parameters)}
    return sorted(range(len(layouts)), key=lambda n: position[layouts[n].group.parameters[0].parameter])
