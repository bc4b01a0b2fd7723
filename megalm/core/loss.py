"""Cross entropy over logits whose vocabulary is split over a tensor-parallel group (Shoeybi et al. 2019, section 3).

Shapes: B batch, S sequence, H hidden, V vocabulary, T tensor-parallel degree, C tokens of a chunk, K terms of the
objective. Only two numbers per token cross ranks, never the logits: the log of a rank's sum of exponentials (its
largest logit and its sum of exponentials in one) and the label's logit.

Training uses :func:`output_loss`. The logits are by far the largest tensor of a step (V is 20 to 100 times H), so it
takes them chunk by chunk, and turns each chunk at once into its losses and into its share of the gradients: the logits
of C tokens exist at any time, in the model's dtype, and they are computed once. That is possible since the factor of
each token's loss is known in forward; backward only multiplies by the gradient that comes in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalm.core.collectives import Pending, start_all_gather, start_all_reduce, start_reduce_scatter
from megalm.core.embedding import VocabParallelEmbedding
from megalm.core.tensor_parallel import TensorParallel
from megalm.mesh.groups import Group

CPU_BLOCK = 2**20
"""Logits that the CPU turns into gradients at a time: 4 MiB in fp32, which stay in cache from one pass to the next.

Less would start more passes, each of which waits for the slowest thread where cores are shared.
"""

CPU_BLOCK_ROWS = 16
"""At least so many tokens at a time, which is work for every thread."""

ACCELERATOR_BLOCK = 2**25
"""The same elsewhere: 128 MiB, large enough that no kernel is short."""


def output_loss(
    x: Tensor,
    embedding: VocabParallelEmbedding,
    labels: Tensor,
    loss_weight: Tensor,
    *,
    chunk_tokens: int,
    z_loss: float = 0.0,
    bias: Tensor | None = None,
) -> Tensor:
    """The objective of a micro-batch from the last hidden vectors, without ever holding its logits.

    Both gradients are computed here, in forward, and kept for backward: [B, S, H] and, in the model's dtype (fp16: in
    fp32), the size of ``embedding.weight``. The weight gradient is therefore no product that a zero-bubble schedule
    can postpone, and a schedule that runs several forwards before the first backward (GPipe) keeps one per micro-batch.

    Over tensor-parallel ranks, the gather of the next chunk's inputs (sequence parallelism) and the reduction of the
    last chunk's input gradients are under way while a chunk is computed.

    Args:
        x: output of the final norm, [B, S, H], or [B, S/T, H] under sequence parallelism.
        embedding: the rows that logits are computed with.
        labels: token ids, [B, S].
        loss_weight: factor of each token's loss, [B, S] fp32: the mask times the run's normalisation.
        chunk_tokens: C; 0: all of the micro-batch at once.
        z_loss: weight of the second term; 0: there is none.
        bias: added to the logits of this rank's words, padding included, [V/T]; None: there is none.

    Returns:
        [K] in fp32, the same on every rank of the group: the weighted sum of token losses in nats and, with ``z_loss``,
        its product with the weighted sum of squared log-partitions (Chowdhery et al. 2022, section 5). Backward
        takes the same gradient for both: what is minimised is their sum.
    """
    head = _Head(embedding.tensor_parallel, embedding.first_token, embedding.local_vocab_size, chunk_tokens, z_loss)
    terms: Tensor = _OutputLoss.apply(  # type: ignore[no-untyped-call]
        x, embedding.weight, bias, labels, loss_weight, head, torch.is_grad_enabled()
    )
    return terms


@torch.no_grad()
def output_metrics(
    x: Tensor,
    embedding: VocabParallelEmbedding,
    labels: Tensor,
    loss_weight: Tensor,
    *,
    chunk_tokens: int,
    bias: Tensor | None = None,
) -> Tensor:
    """What an evaluation counts, from the last hidden vectors; arguments as :func:`output_loss`.

    Returns:
        [2] in fp64, the same on every rank of the group: the weighted sums of token losses in nats, and of labels that
        have the largest logit; fp32 stops counting at 2²⁴.
    """
    head = _Head(embedding.tensor_parallel, embedding.first_token, embedding.local_vocab_size, chunk_tokens, z_loss=0.0)
    weight = embedding.weight
    totals = torch.zeros(2, dtype=torch.float64, device=x.device)
    for chunk, chunk_labels, chunk_weight in head.chunks(x.flatten(0, 1), labels, loss_weight):
        logits = F.linear(chunk, weight, bias)
        totals[:1] += _logits_to_gradient(logits, chunk_labels, chunk_weight, head, None, wants_gradient=False)
        totals[1] += (chunk_weight * (_most_likely(logits, head) == chunk_labels)).sum(dtype=torch.float64)
    return totals


def _most_likely(logits: Tensor, head: _Head) -> Tensor:
    """[C, V/T] ▶ [C], the word of the largest logit over all ranks; of equals the first."""
    largest, column = logits.max(dim=-1)
    word = column + head.first_token
    if head.tensor_parallel.group.size == 1:
        return word
    # fp64 holds both a logit and a word exactly.
    both = torch.stack((largest.double(), word.double()), dim=-1)
    of_ranks = start_all_gather(both.unsqueeze(0), head.tensor_parallel.group, 0).wait()  # [T, C, 2]
    best = of_ranks[..., 0].argmax(dim=0)
    return of_ranks[..., 1].gather(0, best.unsqueeze(0)).squeeze(0).long()


@dataclass(frozen=True)
class _Head:
    """What :class:`_OutputLoss` needs besides tensors."""

    tensor_parallel: TensorParallel
    first_token: int
    local_vocab_size: int
    chunk_tokens: int
    z_loss: float

    def in_gathered_order(self, per_token: Tensor) -> Tensor:
        """[B, S] of all tokens ▶ [T, B·S/T], the order in which ranks' shares are gathered; else [1, B·S]."""
        shares = self.tensor_parallel.group.size if self.tensor_parallel.splits_sequence else 1
        in_order: Tensor = per_token.unflatten(1, (shares, -1)).movedim(1, 0)
        return in_order.flatten(1)

    def chunks(self, rows: Tensor, *per_token: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """This rank's rows [n, H] ▶ chunks [C, H] of all tokens, and what belongs to them; the next is on its way."""
        shares = self.tensor_parallel.group.size if self.tensor_parallel.splits_sequence else 1
        size = max(self.chunk_tokens // shares, 1) if self.chunk_tokens else rows.shape[0]
        others = [self.in_gathered_order(values).split(size, dim=1) for values in per_token]
        parts = rows.split(size)
        ahead = self._gather(parts[0])
        for i in range(len(parts)):
            chunk = ahead.wait()
            if i + 1 < len(parts):
                ahead = self._gather(parts[i + 1])
            yield chunk, *(values[i].flatten() for values in others)

    def reduce(self, input_gradient: Tensor) -> Pending:
        """Parts of a chunk's input gradient [C, H] ▶ this rank's rows of their sum."""
        if self.tensor_parallel.splits_sequence:
            return start_reduce_scatter(input_gradient, self.tensor_parallel.group, 0)
        return start_all_reduce(input_gradient, self.tensor_parallel.group)

    def _gather(self, part: Tensor) -> Pending:
        return (
            start_all_gather(part, self.tensor_parallel.group, 0)
            if self.tensor_parallel.splits_sequence
            else Pending(None, part)
        )


class _OutputLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        loss_weight: Tensor,
        head: _Head,
        training: bool,
    ) -> Tensor:
        needs_input, needs_weight, needs_bias = (training and needed for needed in ctx.needs_input_grad[:3])
        exact = torch.promote_types(x.dtype, torch.float32)
        scale = _fp16_scale(loss_weight) if x.dtype == torch.float16 else None
        terms = torch.zeros(2 if head.z_loss else 1, dtype=torch.float64, device=x.device)
        input_gradients: list[Tensor] = []
        reduction: Pending | None = None
        weight_gradient = _WeightGradient(weight)
        bias_gradient = torch.zeros(weight.shape[0], dtype=exact, device=x.device) if needs_bias else None
        logits = weight.new_empty(0)
        for chunk, chunk_labels, chunk_weight in head.chunks(x.flatten(0, 1), labels, loss_weight):
            if logits.shape[0] != chunk.shape[0]:  # the first chunk, and a last one that is shorter
                logits = weight.new_empty(chunk.shape[0], weight.shape[0])
            if bias is None:
                torch.mm(chunk, weight.t(), out=logits)
            else:
                torch.addmm(bias, chunk, weight.t(), out=logits)
            terms += _logits_to_gradient(
                logits, chunk_labels, chunk_weight, head, scale, wants_gradient=needs_input or needs_weight
            )
            if needs_input:
                partial = logits @ weight
                if reduction is not None:
                    input_gradients.append(reduction.wait())
                reduction = head.reduce(partial)
            if needs_weight:
                weight_gradient.add(logits, chunk)
            if bias_gradient is not None:
                bias_gradient += logits.sum(dim=0, dtype=exact)
        if reduction is not None:
            input_gradients.append(reduction.wait())
        ctx.save_for_backward(
            torch.cat(input_gradients).view(x.shape) if needs_input else None,
            weight_gradient.total() if needs_weight else None,
            bias_gradient,
            scale,
        )
        ctx.dtype = x.dtype
        return terms.to(exact)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input_gradient, weight_gradient, bias_gradient, scale = ctx.saved_tensors
        if gradient.numel() > 1:
            torch._assert_async(
                (gradient == gradient[0]).all(), "terms of the loss are minimised together, with one gradient for all"
            )
        # [1], not a scalar: torch would round a scalar to the tensor's dtype first, and a loss scale overflows fp16.
        factor = gradient[:1] if scale is None else gradient[:1] / scale

        def scaled(saved: Tensor | None) -> Tensor | None:
            if saved is None:
                return None
            return torch.mul(saved, factor, out=torch.empty_like(saved, dtype=ctx.dtype))

        return scaled(input_gradient), scaled(weight_gradient), scaled(bias_gradient), None, None, None, None


def _logits_to_gradient(
    logits: Tensor, labels: Tensor, loss_weight: Tensor, head: _Head, scale: Tensor | None, *, wants_gradient: bool
) -> Tensor:
    """The terms [K] of a chunk's tokens, summed in fp64; ``logits`` [C, V/T] become the terms' gradient, in place.

    With lse the log-partition, p the probabilities, y the label's indicator and w a token's factor:
    ``∂/∂logits of w·(lse - logit[label]) + w·z·lse² = w·((1 + 2·z·lse)·p - y)``.
    """
    group = head.tensor_parallel.group
    padding = logits.shape[1] - head.local_vocab_size
    if padding:
        # Finite, so that a rank without a single word gets no NaN; its exponential is zero beside any other logit.
        logits[:, head.local_vocab_size :] = torch.finfo(logits.dtype).min
    exact = torch.promote_types(logits.dtype, torch.float32)
    columns = (labels - head.first_token).unsqueeze(1)
    here = (columns >= 0) & (columns < head.local_vocab_size)
    columns = columns.clamp(0, max(head.local_vocab_size - 1, 0))
    loss_weight = loss_weight.to(exact).unsqueeze(1)

    terms = torch.zeros(2 if head.z_loss else 1, dtype=torch.float64, device=logits.device)
    start = 0
    for block in logits.split(_block_rows(logits, group)):
        rows = slice(start, start + block.shape[0])
        start = rows.stop
        p = torch.softmax(block, dim=-1, dtype=exact)  # of this rank's words alone
        # p of the largest logit is at least 1/V, so its logarithm is exact to rounding.
        own_lse = block.amax(dim=-1, keepdim=True).to(exact) - p.amax(dim=-1, keepdim=True).log_()
        label_logit = block.gather(1, columns[rows]).to(exact).masked_fill_(~here[rows], 0.0)
        lse, label_logit = _over_ranks(own_lse, label_logit, group)
        w = loss_weight[rows]
        terms[0] += (w * (lse - label_logit)).sum(dtype=torch.float64)
        if head.z_loss:
            terms[1] += head.z_loss * (w * lse.square()).sum(dtype=torch.float64)
        if wants_gradient:
            w = w if scale is None else w * scale
            p.mul_((own_lse - lse).exp_().mul_(w * (1.0 + 2.0 * head.z_loss * lse)))
            p.scatter_add_(1, columns[rows], w.mul(here[rows]).neg_())
            block.copy_(p)
    return terms


def _over_ranks(own_lse: Tensor, label_logit: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Log-partition and label's logit [C, 1] over the whole vocabulary, bit for bit the same on all ranks."""
    if group.size == 1:
        return own_lse, label_logit
    both = torch.cat((own_lse, label_logit), dim=1)
    of_ranks = start_all_gather(both.unsqueeze(0), group, 0).wait()  # [T, C, 2]
    return of_ranks[..., :1].logsumexp(dim=0), of_ranks[..., 1:].sum(dim=0)


def _block_rows(logits: Tensor, group: Group) -> int:
    """Tokens whose fp32 probabilities exist at one time: over ranks a whole chunk, so that ranks meet once."""
    if group.size > 1:
        return logits.shape[0]
    if logits.device.type == "cpu":
        return max(CPU_BLOCK // logits.shape[1], CPU_BLOCK_ROWS)
    return max(ACCELERATOR_BLOCK // logits.shape[1], 1)


def _fp16_scale(loss_weight: Tensor) -> Tensor:
    """The power of two that brings the largest factor to between 1/2 and 1.

    A factor is about 1 over the tokens of a global batch, which times a probability is zero in fp16. The loss scale
    that would prevent it is not known in forward; it is applied in backward, to the finished products, in fp32.
    """
    _, exponent = torch.frexp(loss_weight.abs().amax())
    return torch.ldexp(torch.ones_like(loss_weight[0, 0]), -exponent)


class _WeightGradient:
    """``Σ Gᵀ X`` over chunks, added in fp32 if the model is in half precision and there is something to add."""

    def __init__(self, weight: Tensor) -> None:
        self._exact = torch.promote_types(weight.dtype, torch.float32)
        self._dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        self._first: Tensor | None = None
        self._sum: Tensor | None = None

    def add(self, gradients: Tensor, inputs: Tensor) -> None:
        """Add a chunk's product: [C, V/T], [C, H]."""
        if self._first is None:
            self._first = gradients.t() @ inputs
            return
        if self._sum is None:
            self._sum = self._first.to(self._exact)
        if self._sum.dtype == inputs.dtype:
            self._sum.addmm_(gradients.t(), inputs)
        else:
            self._sum.add_(gradients.t() @ inputs)

    def total(self) -> Tensor:
        """[V/T, H]; fp16: in fp32, since the loss scale is yet to come."""
        assert self._first is not None
        return (self._first if self._sum is None else self._sum).to(self._dtype)
