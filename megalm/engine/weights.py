"""The weights that a model computes with, gathered from the replicas that update them while the next forward goes on.

Each replica converts the masters of its piece of every bucket to the model's dtype, and one all-gather per bucket
distributes them. The gathers are issued in the order in which forward comes to the buckets, and each is waited for
before a part of the model that reads it computes (``Transformer.before_use``): only the first one delays a step. Who
reads weights otherwise calls :meth:`GatheredWeights.settle` first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalm.core.collectives import Pending, start_all_gather_in_place
from megalm.engine.layout import FlatLayout, in_model_order


@dataclass(frozen=True)
class Shard:
    """This replica's part of a bucket.

    Attributes:
        layout: how the bucket lies in its buffer.
        weights: the whole buffer in the model's dtype, of which the model's parameters are views.
        master: the fp32 masters of the piece that this replica owns.
    """

    layout: FlatLayout
    weights: Tensor
    master: Tensor

    @property
    def own_weights(self) -> Tensor:
        """The piece of ``weights`` that this replica owns."""
        start, stop = self.layout.owned_here
        return self.weights[start:stop]


class GatheredWeights:
    """Gathers of one rank's weights.

    Args:
        shards: by bucket.
        parts: what the model computes at a time, and the parameters that it takes, in the order of a forward pass.
    """

    def __init__(self, shards: Sequence[Shard], parts: Iterable[tuple[nn.Module, Sequence[nn.Parameter]]]) -> None:
        parts = list(parts)
        layouts = [shard.layout for shard in shards]
        self._shards = list(shards)
        self._order = in_model_order(layouts, [parameter for _, found in parts for parameter in found])
        bucket_of = {parameter: n for n, layout in enumerate(layouts) for parameter, _ in layout.places()}
        self._buckets = {
            part: sorted({bucket_of[parameter] for parameter in found if parameter in bucket_of})
            for part, found in parts
        }
        self._under_way: dict[int, Pending] = {}

    @torch.no_grad()
    def publish(self) -> None:
        """Start to make the model's weights those of the masters; collective over replicas."""
        self.settle()
        for number in self._order:
            shard = self._shards[number]
            shard.own_weights.copy_(shard.master)
            self._under_way[number] = start_all_gather_in_place(shard.weights, shard.layout.group.replicas)

    def before_use(self, part: nn.Module) -> None:
        """Wait for what a part of the model reads; of a module that is no such part nothing is known: for all."""
        if not self._under_way:
            return
        for number in self._buckets.get(part, self._order):
            if number in self._under_way:
                self._under_way.pop(number).wait()

    def settle(self) -> None:
        """Wait for all."""
        while self._under_way:
            _, pending = self._under_way.popitem()
            pending.wait()
