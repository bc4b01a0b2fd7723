"""Linear layers split over a tensor-parallel group (Shoeybi et al. 2019, section 3).

Shapes: B batch, S sequence, I input width, O output width, T tensor-parallel degree.

A column-parallel layer splits its outputs, a row-parallel one its inputs. A pair of them needs one all-reduce in
forward (after the row-parallel one) and one in backward (before the column-parallel one).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from megalm.core.collectives import copy_to_group, reduce_from_group
from megalm.core.sharding import Init, ParallelModule, ShardSpec, even_range
from megalm.core.tensor_parallel import TensorParallel


class ColumnParallelLinear(ParallelModule):
    """``y = x Wᵀ + b`` with the rows of ``W`` [O, I] split: [B, S, I] on every rank ▶ [B, S, O/T].

    Args:
        in_features: I.
        out_features: sizes of the outputs that are fused into one matrix product, such as (query, key, value); each is
            split over the group on its own, so that a rank's slice of one does not reach into another.
        tp: tensor-parallel group, and how activations are split outside it.
        std: standard deviation of initial weights.
        bias: whether there is a bias; it is split as the outputs are, and starts at zero.
    """

    def __init__(
        self, in_features: int, out_features: tuple[int, ...], *, tp: TensorParallel, std: float, bias: bool
    ) -> None:
        super().__init__()
        self.tp = tp
        group = tp.group
        ranges, offset = [], 0
        for size in out_features:
            start, stop = even_range(size, group.index, group.size)
            ranges.append((offset + start, offset + stop))
            offset += size
        self.local_out_features = tuple(stop - start for start, stop in ranges)
        self.weight = self.declare("weight", ShardSpec((offset, in_features), 0, tuple(ranges)), Init.normal(std))
        self.bias = self.declare("bias", ShardSpec((offset,), 0, tuple(ranges)), Init.constant(0.0)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, I] ▶ [B, S, O/T]."""
        return F.linear(copy_to_group(x, self.tp.group), self.weight, self.bias)

    def extra_repr(self) -> str:
        """Unsharded sizes and the degree."""
        out_features, in_features = self.declarations["weight"].shard.full_shape
        return f"{in_features} ▶ {out_features}, rows over {self.tp.group.size}"


class RowParallelLinear(ParallelModule):
    """``y = x Wᵀ + b`` with the columns of ``W`` [O, I] split: [B, S, I/T] ▶ [B, S, O] on every rank.

    The bias is added once, after the all-reduce, and is replicated.
    """

    def __init__(self, in_features: int, out_features: int, *, tp: TensorParallel, std: float, bias: bool) -> None:
        super().__init__()
        self.tp = tp
        group = tp.group
        ranges = (even_range(in_features, group.index, group.size),)
        self.weight = self.declare("weight", ShardSpec((out_features, in_features), 1, ranges), Init.normal(std))
        self.bias = self.declare("bias", ShardSpec.replicated(out_features), Init.constant(0.0)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, I/T] ▶ [B, S, O]."""
        y = reduce_from_group(F.linear(x, self.weight), self.tp.group)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Unsharded sizes and the degree."""
        out_features, in_features = self.declarations["weight"].shard.full_shape
        return f"{in_features} ▶ {out_features}, columns over {self.tp.group.size}"
