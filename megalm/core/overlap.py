"""Products of a tensor-parallel layer in parts, so that the collective of one part hides behind the product of another.

A product waits for its input to be gathered, or what follows it waits for its output to be reduced; with one part
nothing is computed meanwhile. With n parts all but one part of the collective are under way while a product runs. No
part divides the dim that a product sums over, so an element is the same sum of the same terms. (An all-reduce over more
than two ranks may add them in another order, which depends on where an element lies in the buffer.) What it costs:

    ============================ ====================== ==========================================================
    collective                   parts of               costs
    ============================ ====================== ==========================================================
    all-gather of the input      sequences of the       nothing
                                 micro-batch
    the same, of fewer           tokens of each rank's  a pass over the output, whose tokens are put into place
    sequences than parts         share
    all-reduce of the output     tokens                 nothing
    reduce-scatter of the output columns of the output  a pass over the rank's share of the output
    ============================ ====================== ==========================================================

and products that are n times smaller, with n times as many collectives. Parts are as equal as can be; there are fewer
than n where there are fewer tokens or columns.

Shapes: B batch, S sequence, I width of the input, O of the output, T tensor-parallel degree, n parts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megalm.core.collectives import Pending, start_all_gather, start_all_reduce, start_reduce_scatter
from megalm.core.tensor_parallel import SEQUENCE, TensorParallel


class Gathering:
    """The all-gather of a rank's share of the sequence, [B, S/T, I], in parts; issued at once.

    Args:
        share: what this rank has.
        tensor_parallel: the group, and the number of parts.
    """

    def __init__(self, share: Tensor, tensor_parallel: TensorParallel) -> None:
        batch, tokens, width = share.shape
        self._members = tensor_parallel.group.size
        self._shape = batch, tokens * self._members, width
        dim = 0 if batch >= tensor_parallel.parts else 1
        pieces = _split(share, tensor_parallel.parts, dim)
        self._parts: list[_Part] = []
        start = 0
        for piece in pieces:
            pending = start_all_gather(piece, tensor_parallel.group, SEQUENCE)
            self._parts.append(_Part(pending, dim, start, piece.shape[dim]))
            start += piece.shape[dim]

    def whole(self) -> Tensor:
        """[B, S, I]."""
        if len(self._parts) == 1:
            return self._parts.pop().pending.wait()
        whole = None
        while self._parts:
            part = self._parts.pop(0)
            gathered = part.pending.wait()
            whole = gathered.new_empty(self._shape) if whole is None else whole
            part.put(gathered, whole, self._members)
        assert whole is not None, "it is gathered once"
        return whole

    def product(self, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """``X matrix + bias``: a product per part, each as its part arrives; matrix [I, O] ▶ [B, S, O]."""
        return self._multiply(matrix, bias, None)

    def product_and_whole(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """``X matrix`` and X, [B, S, O] and [B, S, I]."""
        if len(self._parts) == 1:
            whole = self.whole()
            return whole @ matrix, whole
        whole = matrix.new_empty(self._shape)
        return self._multiply(matrix, None, whole), whole

    def _multiply(self, matrix: Tensor, bias: Tensor | None, whole: Tensor | None) -> Tensor:
        if len(self._parts) == 1:
            return F.linear(self.whole(), matrix.t(), bias)
        y = matrix.new_empty((*self._shape[:-1], matrix.shape[1]))
        while self._parts:
            part = self._parts.pop(0)
            gathered = part.pending.wait()
            if whole is not None:
                part.put(gathered, whole, self._members)
            place = part.of(y, self._members)
            if place.is_contiguous():
                _multiply_into(place.flatten(0, -2), gathered.flatten(0, -2), matrix, bias)
            else:
                part.put(F.linear(gathered, matrix.t(), bias), y, self._members)
        return y


@dataclass(frozen=True)
class _Part:
    """Some sequences (dim 0), or some tokens of each rank's share (dim 1).

    Attributes:
        pending: gathers [b, T·s, I], in the order of the ranks.
        dim: along which the part was taken.
        start: its first index.
        length: how many.
    """

    pending: Pending
    dim: int
    start: int
    length: int

    def of(self, whole: Tensor, members: int) -> Tensor:
        """The part's place in [B, S, ..]: a view [b, T, s, ..]."""
        by_member: Tensor = whole.unflatten(1, (members, -1))
        return by_member.narrow(2 * self.dim, self.start, self.length)

    def put(self, values: Tensor, whole: Tensor, members: int) -> None:
        """Copy [b, T·s, ..] into its place."""
        self.of(whole, members).copy_(values.unflatten(1, (members, -1)))


class Reduction:
    """``X matrix`` summed over the ranks, a product and a collective per part; under way when it is made.

    Args:
        x: [B, S, I].
        matrix: [I, O].
        tensor_parallel: the group; parts are taken under sequence parallelism of the columns of ``matrix``.
        parts: n.
    """

    def __init__(self, x: Tensor, matrix: Tensor, tensor_parallel: TensorParallel, parts: int) -> None:
        self._y: Tensor | None = None
        group = tensor_parallel.group
        if tensor_parallel.splits_sequence:
            pieces = _split(matrix, parts, 1)
            self._pending = [start_reduce_scatter(x @ piece, group, SEQUENCE) for piece in pieces]
            return
        if parts == 1:
            self._pending = [start_all_reduce(x @ matrix, group)]
            return
        self._y = x.new_empty((*x.shape[:-1], matrix.shape[1]))
        self._pending = []
        for rows, out in zip(_split(x.flatten(0, -2), parts, 0), _split(self._y.flatten(0, -2), parts, 0), strict=True):
            _multiply_into(out, rows, matrix, None)
            self._pending.append(start_all_reduce(out, group))

    def wait(self) -> Tensor:
        """[B, S, O], or [B, S/T, O] under sequence parallelism."""
        found = [pending.wait() for pending in self._pending]
        if self._y is not None:
            return self._y
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def _split(x: Tensor, parts: int, dim: int) -> tuple[Tensor, ...]:
    """Views of ``parts`` parts along ``dim``, none of them empty."""
    return x.tensor_split(max(1, min(parts, x.shape[dim])), dim=dim)


def _multiply_into(out: Tensor, rows: Tensor, matrix: Tensor, bias: Tensor | None) -> None:
    """``rows matrix + bias`` ▶ ``out``; [M, I], [I, O], [O] ▶ [M, O]."""
    if bias is None:
        torch.mm(rows, matrix, out=out)
    else:
        torch.addmm(bias, rows, matrix, out=out)
