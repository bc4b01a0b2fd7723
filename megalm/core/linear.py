"""Linear layers split over a tensor-parallel group (Shoeybi et al. 2019, section 3; Korthikanti et al. 2022).

Shapes: B batch, S sequence, I input width, O output width, T tensor-parallel degree.

A column-parallel layer splits its outputs, a row-parallel one its inputs. Between such a pair every rank has its share
of the width; outside it, every rank has the whole [B, S, H], or with sequence parallelism its share [B, S/T, H]. The
collectives of a pair, and the products that hide them:

    ==================== ======================================= ================================================
    layer, pass          collective                              hidden behind
    ==================== ======================================= ================================================
    column, forward      SP: all-gather of the input             nothing: the product needs it; in parts: the
                                                                 product of the part before
    column, backward     SP: all-gather of the input             the input gradient's product
    column, backward     all-reduce (SP: reduce-scatter) of the  the weight gradient's product; where that is
                         input gradient                          postponed, as row, forward
    row, forward         all-reduce (SP: reduce-scatter) of the  nothing: what follows needs it; in parts: the
                         output                                  product of the next part
    row, backward        SP: all-gather of the output gradient   nothing: the first product needs it; the bias's sum
                                                                 is computed meanwhile; in parts: as column, forward
    either, postponed    SP: the same all-gather once more       the weight gradient's product of the layer before
    ==================== ======================================= ================================================

"In parts" is with ``TensorParallel.parts`` above 1; what it costs is in ``overlap.py``.

Under sequence parallelism a layer keeps its share of the input for backward, never the gathered tensor, and so does a
product that a zero-bubble schedule postpones: it gathers again. All members of a group run the same schedule, so they
enter these collectives in the same order. What zero bubble costs: with the weight gradient postponed, nothing hides the
input gradient's reduction (in parts: the last part's), nor the gather of a stage's first postponed product.

With T=1 a layer is ``F.linear``, unless its weight gradients are handed over (zero bubble,
``engine.gradient_accumulation_fusion``). Otherwise it is a function with a backward of its own, which ``torch.compile``
does not look into: it compiles what is between.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalm.core.collectives import Pending, start_all_gather
from megalm.core.overlap import Gathering, Reduction
from megalm.core.parameters import Init, ParallelModule
from megalm.core.tensor_parallel import SEQUENCE, TensorParallel
from megalm.core.weight_gradients import WeightGradients
from megalm.mesh.groups import Group
from megalm.mesh.slices import ShardSpec, even_range

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(input, weight, bias) ▶ output."""


class HandsOverWeightGradients(ParallelModule):
    """A module that has linear layers, whose weight gradients need not be autograd's."""

    @abstractmethod
    def hand_over(self, weight_gradients: WeightGradients) -> None:
        """Give weight gradients to ``weight_gradients``, which computes them, postpones them or adds them to a sum."""


class ParallelLinear(HandsOverWeightGradients):
    """A linear layer split by columns or rows, whose weight gradient a zero-bubble schedule can postpone.

    Args:
        tensor_parallel: the group, and how activations are split outside it.
        function: the product and its backward where the layer is split, or postpones.
    """

    def __init__(self, tensor_parallel: TensorParallel, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.tensor_parallel = tensor_parallel
        self._function = function
        self._linear = _alone_or(function, tensor_parallel)

    def hand_over(self, weight_gradients: WeightGradients) -> None:
        """Leave it to ``weight_gradients`` what becomes of them, instead of computing them in backward."""
        self._linear = _outside_graphs(self._function, self.tensor_parallel, weight_gradients)


def postpone_weight_gradients(module: nn.Module, weight_gradients: WeightGradients) -> None:
    """Have all parallel linear layers below ``module`` leave their weight gradients in a store while it records."""
    for child in module.modules():
        if isinstance(child, ParallelLinear):
            child.hand_over(weight_gradients)


def hand_over_weight_gradients(module: nn.Module, weight_gradients: WeightGradients) -> None:
    """The same with all other modules that have linear layers: whose products a schedule does not postpone, too."""
    for child in module.modules():
        if isinstance(child, HandsOverWeightGradients):
            child.hand_over(weight_gradients)


class ColumnParallelLinear(ParallelLinear):
    """``y = x Wᵀ + b`` with the rows of ``W`` [O, I] split: [B, S, I] on every rank ▶ [B, S, O/T].

    Under sequence parallelism the input is [B, S/T, I].

    Args:
        in_features: I.
        out_features: sizes of the outputs that are fused into one matrix product, such as (query, key, value); each is
            split over the group on its own, so that a rank's slice of one does not reach into another.
        tensor_parallel: the group, and how activations are split outside it.
        std: standard deviation of initial weights.
        bias: whether there is a bias; it is split as the outputs are, and starts at zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: tuple[int, ...],
        *,
        tensor_parallel: TensorParallel,
        std: float,
        bias: bool,
    ) -> None:
        super().__init__(tensor_parallel, _ColumnLinear)
        group = tensor_parallel.group
        ranges, offset = [], 0
        for size in out_features:
            start, stop = even_range(size, group.index, group.size)
            ranges.append((offset + start, offset + stop))
            offset += size
        self.local_out_features = tuple(stop - start for start, stop in ranges)
        weight, rows = (offset, in_features), tuple(ranges)
        self.weight = self.declare("weight", ShardSpec.along(weight, 0, rows), Init.normal(std))
        self.bias = self.declare("bias", ShardSpec.along((offset,), 0, rows), Init.constant(0.0)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, I], or [B, S/T, I] under sequence parallelism ▶ [B, S, O/T]."""
        return self._linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Unsharded sizes and the degree."""
        out_features, in_features = self.declarations["weight"].shard.full_shape
        return f"{in_features} ▶ {out_features}, rows over {self.tensor_parallel.group.size}"


class RowParallelLinear(ParallelLinear):
    """``y = x Wᵀ + b`` with the columns of ``W`` [O, I] split: [B, S, I/T] ▶ [B, S, O] on every rank.

    Under sequence parallelism the output is [B, S/T, O]. The bias is replicated, and added once, after the reduction:
    a rank adds it to its own tokens and sees only their part of its gradient.
    """

    def __init__(
        self, in_features: int, out_features: int, *, tensor_parallel: TensorParallel, std: float, bias: bool
    ) -> None:
        # On one rank rows and columns are split alike: not at all.
        super().__init__(tensor_parallel, _ColumnLinear if tensor_parallel.group.size == 1 else _RowLinear)
        group = tensor_parallel.group
        ranges = (even_range(in_features, group.index, group.size),)
        self.weight = self.declare("weight", ShardSpec.along((out_features, in_features), 1, ranges), Init.normal(std))
        shard, partial = ShardSpec.replicated(out_features), tensor_parallel.splits_sequence
        self.bias = self.declare("bias", shard, Init.constant(0.0), partial=partial) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, I/T] ▶ [B, S, O], or [B, S/T, O] under sequence parallelism."""
        return self._linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Unsharded sizes and the degree."""
        out_features, in_features = self.declarations["weight"].shard.full_shape
        return f"{in_features} ▶ {out_features}, columns over {self.tensor_parallel.group.size}"


def column_linear(tensor_parallel: TensorParallel, weight_gradients: WeightGradients | None = None) -> Linear:
    """``x Wᵀ + b`` with a rank's rows of ``W`` [O/T, I]; shapes as in :meth:`ColumnParallelLinear.forward`."""
    if weight_gradients is not None:
        return _outside_graphs(_ColumnLinear, tensor_parallel, weight_gradients)
    return _alone_or(_ColumnLinear, tensor_parallel)


def _alone_or(function: type[torch.autograd.Function], tensor_parallel: TensorParallel) -> Linear:
    """On one rank a plain ``F.linear``, which ``torch.compile`` sees through."""
    return F.linear if tensor_parallel.group.size == 1 else _outside_graphs(function, tensor_parallel)


def _outside_graphs(
    function: type[torch.autograd.Function],
    tensor_parallel: TensorParallel,
    weight_gradients: WeightGradients | None = None,
) -> Linear:
    """A function that ``torch.compile`` is not to trace.

    A traced backward would decide once, when it is compiled, whether it postpones, and would order its collectives
    anew on each rank.
    """
    return partial(torch.compiler.disable(function.apply), tensor_parallel, weight_gradients)


class _ColumnLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tensor_parallel: TensorParallel,
        weight_gradients: WeightGradients | None,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tensor_parallel, ctx.weight_gradients = tensor_parallel, weight_gradients
        ctx.parameter, ctx.bias = weight, bias
        if tensor_parallel.splits_sequence:
            return Gathering(x, tensor_parallel).product(weight.t(), bias)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        tensor_parallel, (_, _, needs_input, needs_weight, needs_bias) = ctx.tensor_parallel, ctx.needs_input_grad
        product = _WeightProduct(
            _Whole(gradient), _Share(x, tensor_parallel.group) if tensor_parallel.splits_sequence else _Whole(x)
        )
        store = ctx.weight_gradients if ctx.weight_gradients and ctx.weight_gradients.postpones else None
        is_hidden = needs_weight and store is None
        if is_hidden:
            product.start()
        reduction: Reduction | None = None
        if needs_input:
            reduction = Reduction(gradient, weight, tensor_parallel, 1 if is_hidden else tensor_parallel.parts)
        weight_gradient = _weight_gradient(product, ctx.parameter, ctx.weight_gradients) if needs_weight else None
        bias_gradient = _bias_gradient(gradient, ctx.bias, ctx.weight_gradients) if needs_bias else None
        return None, None, None if reduction is None else reduction.wait(), weight_gradient, bias_gradient


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tensor_parallel: TensorParallel,
        weight_gradients: WeightGradients | None,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.tensor_parallel, ctx.weight_gradients = tensor_parallel, weight_gradients
        ctx.parameter, ctx.bias = weight, bias
        y = Reduction(x, weight.t(), tensor_parallel, tensor_parallel.parts).wait()
        return y if bias is None else y.add_(bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        tensor_parallel, (_, _, needs_input, needs_weight, needs_bias) = ctx.tensor_parallel, ctx.needs_input_grad
        store = ctx.weight_gradients if ctx.weight_gradients and ctx.weight_gradients.postpones else None
        is_needed = needs_weight and store is None
        gathering = Gathering(gradient, tensor_parallel) if tensor_parallel.splits_sequence else None
        bias_gradient = _bias_gradient(gradient, ctx.bias, ctx.weight_gradients) if needs_bias else None
        input_gradient, whole = _row_products(gradient, gathering, weight if needs_input else None, keep=is_needed)
        # A postponed product keeps the share and gathers it again, so that memory does not grow with what waits.
        waiting = _Whole(gradient) if gathering is None else _Share(gradient, tensor_parallel.group)
        product = _WeightProduct(_Whole(whole) if is_needed else waiting, _Whole(x))
        weight_gradient = _weight_gradient(product, ctx.parameter, ctx.weight_gradients) if needs_weight else None
        return None, None, input_gradient, weight_gradient, bias_gradient


class _Whole:
    """An operand of a weight gradient's product that every rank has for all tokens."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def start(self) -> None:
        """Nothing to fetch."""

    def whole(self) -> Tensor:
        """[B, S, width]."""
        return self._tensor


class _Share:
    """An operand of which a rank keeps its share of the sequence, [B, S/T, width], and gathers the rest."""

    def __init__(self, share: Tensor, group: Group) -> None:
        self._share = share
        self._group = group
        self._pending: Pending | None = None

    def start(self) -> None:
        """Issue the all-gather."""
        self._pending = start_all_gather(self._share, self._group, SEQUENCE)

    def whole(self) -> Tensor:
        """[B, S, width]; it is not kept."""
        assert self._pending is not None, "start() comes first"
        pending, self._pending = self._pending, None
        return pending.wait()


class _WeightProduct:
    """``Gᵀ X`` over all tokens: output gradients G [B, S, O], inputs X [B, S, I] ▶ [O, I]."""

    def __init__(self, gradients: _Whole | _Share, inputs: _Whole | _Share) -> None:
        self._gradients = gradients
        self._inputs = inputs

    def start(self) -> None:
        """Issue the gathers."""
        self._gradients.start()
        self._inputs.start()

    def operands(self) -> tuple[Tensor, Tensor]:
        """[n, O] and [n, I] for n tokens."""
        return self._gradients.whole().flatten(0, -2), self._inputs.whole().flatten(0, -2)

    def __call__(self) -> Tensor:
        """The product."""
        gradients, inputs = self.operands()
        return gradients.t() @ inputs


def _row_products(
    gradient: Tensor, gathering: Gathering | None, weight: Tensor | None, *, keep: bool
) -> tuple[Tensor | None, Tensor]:
    """The input gradient ``G W``, None without W; and G of all tokens, or of the rank's if it need not be kept."""
    if gathering is None:
        return None if weight is None else gradient @ weight, gradient
    if weight is None:
        return None, gathering.whole()
    return gathering.product_and_whole(weight) if keep else (gathering.product(weight), gradient)


def _weight_gradient(product: _WeightProduct, weight: nn.Parameter, taker: WeightGradients | None) -> Tensor | None:
    return product() if taker is None else taker.take(weight, product)


def _bias_gradient(gradient: Tensor, bias: nn.Parameter, taker: WeightGradients | None) -> Tensor | None:
    rows = gradient.flatten(0, -2)
    return rows.sum(dim=0) if taker is None else taker.take_bias(bias, rows)
