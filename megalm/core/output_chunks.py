"""The logits of an output projection whose vocabulary is split over a tensor-parallel group, chunk by chunk.

Shapes: B batch, S sequence, H hidden, V vocabulary, T tensor-parallel degree, R rows of a rank that are multiplied (its
words; on GPUs padding, too), C tokens of a chunk, K terms of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalm.core.collectives import Pending, start_all_gather, start_all_reduce, start_reduce_scatter
from megalm.core.device_kind import device_kind
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


@dataclass(frozen=True)
class OutputChunks:
    """How the tokens of a micro-batch are taken through the output projection.

    Attributes:
        tensor_parallel: the group over which the vocabulary is split.
        first_token: first word of this rank.
        local_vocab_size: words of this rank, padding left out.
        rows: R.
        chunk_tokens: C; 0: all of the micro-batch at once.
        z_loss: weight of the squared log-partition; 0: there is no such term.
        compiles: whether what turns logits into losses and gradients is compiled: two kernels, each of which reads the
            logits once, and no fp32 tensor of their size.
    """

    tensor_parallel: TensorParallel
    first_token: int
    local_vocab_size: int
    rows: int
    chunk_tokens: int
    z_loss: float = 0.0
    compiles: bool = False

    @classmethod
    def of(
        cls, embedding: VocabParallelEmbedding, chunk_tokens: int, z_loss: float = 0.0, *, compiles: bool = False
    ) -> OutputChunks:
        """Over the rows of an embedding."""
        vocabulary = embedding.first_token, embedding.local_vocab_size, embedding.rows_to_multiply
        return cls(embedding.tensor_parallel, *vocabulary, chunk_tokens, z_loss, compiles)

    def in_gathered_order(self, per_token: Tensor) -> Tensor:
        """[B, S] of all tokens ▶ [T, B·S/T], the order in which ranks' shares are gathered; else [1, B·S]."""
        shares = self.tensor_parallel.group.size if self.tensor_parallel.splits_sequence else 1
        in_order: Tensor = per_token.unflatten(1, (shares, -1)).movedim(1, 0)
        return in_order.flatten(1)

    def iterate(self, rows: Tensor, *per_token: Tensor) -> Iterator[tuple[Tensor, ...]]:
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


def most_likely(logits: Tensor, chunks: OutputChunks) -> Tensor:
    """[C, R] ▶ [C], the word of the largest logit over all ranks; of equals the first."""
    largest, column = logits.max(dim=-1)
    word = column + chunks.first_token
    if chunks.tensor_parallel.group.size == 1:
        return word
    # fp64 holds both a logit and a word exactly.
    both = torch.stack((largest.double(), word.double()), dim=-1)
    of_ranks = start_all_gather(both.unsqueeze(0), chunks.tensor_parallel.group, 0).wait()  # [T, C, 2]
    best = of_ranks[..., 0].argmax(dim=0)
    return of_ranks[..., 1].gather(0, best.unsqueeze(0)).squeeze(0).long()


def logits_to_gradient(
    logits: Tensor,
    labels: Tensor,
    loss_weight: Tensor,
    chunks: OutputChunks,
    scale: Tensor | None,
    *,
    wants_gradient: bool,
) -> Tensor:
    """The terms [K] of a chunk's tokens, summed in fp64; ``logits`` [C, R] become the terms' gradient, in place.

    With lse the log-partition, p the probabilities, y the label's indicator and w a token's factor:
    ``∂/∂logits of w·(lse - logit[label]) + w·z·lse² = w·((1 + 2·z·lse)·p - y)``.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    loss_weight = loss_weight.to(exact).unsqueeze(1)
    if chunks.compiles:
        return _compiled_terms(logits, labels, loss_weight, chunks, scale, wants_gradient=wants_gradient)
    terms = torch.zeros(2 if chunks.z_loss else 1, dtype=torch.float64, device=logits.device)
    for block in _blocks(logits, labels, chunks):
        w = loss_weight[block.rows]
        terms += _terms(w, block.lse, block.label_logit, chunks.z_loss)
        if wants_gradient:
            w = w if scale is None else w * scale
            p = block.p.mul_((block.own_lse - block.lse).exp_().mul_(w * (1.0 + 2.0 * chunks.z_loss * block.lse)))
            p.scatter_add_(1, block.columns, w.mul(block.here).neg_())
            logits[block.rows] = p
    return terms


def _terms(w: Tensor, lse: Tensor, label_logit: Tensor, z_loss: float) -> Tensor:
    """[c, 1] each ▶ the terms [K] of these tokens, in fp64."""
    losses = (w * (lse - label_logit)).sum(dtype=torch.float64)
    if not z_loss:
        return losses.unsqueeze(0)
    return torch.stack((losses, z_loss * (w * lse.square()).sum(dtype=torch.float64)))


def _compiled_terms(
    logits: Tensor,
    labels: Tensor,
    w: Tensor,
    chunks: OutputChunks,
    scale: Tensor | None,
    *,
    wants_gradient: bool,
) -> Tensor:
    """As :func:`logits_to_gradient`, by two compiled functions with the collective of ranks between them."""
    columns, here = _label_columns(logits, labels, chunks)
    own_lse, own_logit = compiled(_statistics)(logits, columns, here)
    lse, label_logit = _over_ranks(own_lse, own_logit, chunks.tensor_parallel.group)
    if wants_gradient:
        factor = w if scale is None else w * scale
        compiled(_to_gradient)(logits, columns, here, lse, factor, chunks.z_loss)
    return _terms(w, lse, label_logit, chunks.z_loss)


def _statistics(logits: Tensor, columns: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:
    """[C, R] ▶ log-partition over this rank's words, and the label's logit where it is one of them, [C, 1] each."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = exact.amax(dim=-1, keepdim=True)
    lse = largest + (exact - largest).exp().sum(dim=-1, keepdim=True).log()
    label_logit = torch.where(_is_label(logits, columns, here), exact, 0.0).sum(dim=-1, keepdim=True)
    return lse, label_logit


def _to_gradient(logits: Tensor, columns: Tensor, here: Tensor, lse: Tensor, w: Tensor, z_loss: float) -> None:
    """[C, R] become the gradient of the terms, in place."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    p = (exact - lse).exp() * (1.0 + 2.0 * z_loss * lse)
    logits.copy_(w * (p - _is_label(logits, columns, here).to(p.dtype)))


def _is_label(logits: Tensor, columns: Tensor, here: Tensor) -> Tensor:
    """[C, R] bool, by comparison: a scatter would be a kernel of its own."""
    return (torch.arange(logits.shape[1], device=logits.device) == columns) & here


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that torch compiles once per shape."""
    return torch.compile(function, dynamic=False)


def token_losses(logits: Tensor, labels: Tensor, chunks: OutputChunks) -> Tensor:
    """[C, R], [C] ▶ cross-entropy of each token, [C] in fp32 (fp64), the same on every rank; padding is masked."""
    blocks = [block.lse - block.label_logit for block in _blocks(logits, labels, chunks)]
    return torch.cat(blocks).squeeze(1)


class _Block(NamedTuple):
    """Some tokens of a chunk, [c, R] of its logits.

    Attributes:
        rows: which tokens of the chunk.
        p: [c, R], probabilities among this rank's words alone.
        own_lse: [c, 1], log-partition over this rank's words.
        lse: [c, 1], log-partition over all words.
        label_logit: [c, 1], on every rank.
        columns: [c, 1], the label's column; any column where the label is another rank's.
        here: [c, 1], whether the label is this rank's.
    """

    rows: slice
    p: Tensor
    own_lse: Tensor
    lse: Tensor
    label_logit: Tensor
    columns: Tensor
    here: Tensor


def _blocks(logits: Tensor, labels: Tensor, chunks: OutputChunks) -> Iterator[_Block]:
    """As few tokens at a time as stay in cache; the padding of ``logits`` is masked in place."""
    group = chunks.tensor_parallel.group
    exact = torch.promote_types(logits.dtype, torch.float32)
    columns, here = _label_columns(logits, labels, chunks)
    start = 0
    for block in logits.split(_block_rows(logits, group)):
        rows = slice(start, start + block.shape[0])
        start = rows.stop
        p = torch.softmax(block, dim=-1, dtype=exact)
        # p of the largest logit is at least 1/V, so its logarithm is exact to rounding.
        own_lse = block.amax(dim=-1, keepdim=True).to(exact) - p.amax(dim=-1, keepdim=True).log_()
        label_logit = block.gather(1, columns[rows]).to(exact).masked_fill_(~here[rows], 0.0)
        lse, label_logit = _over_ranks(own_lse, label_logit, group)
        yield _Block(rows, p, own_lse, lse, label_logit, columns[rows], here[rows])


def _label_columns(logits: Tensor, labels: Tensor, chunks: OutputChunks) -> tuple[Tensor, Tensor]:
    """The label's column, and whether it is this rank's, [C, 1] each; the padding of ``logits`` is masked in place."""
    if logits.shape[1] > chunks.local_vocab_size:
        # Finite, so that a rank without a single word gets no NaN; its exponential is zero beside any other logit.
        logits[:, chunks.local_vocab_size :] = torch.finfo(logits.dtype).min
    columns = (labels - chunks.first_token).unsqueeze(1)
    here = (columns >= 0) & (columns < chunks.local_vocab_size)
    return columns.clamp(0, max(chunks.local_vocab_size - 1, 0)), here


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
    if device_kind(logits) == "cpu":
        return max(CPU_BLOCK // logits.shape[1], CPU_BLOCK_ROWS)
    return max(ACCELERATOR_BLOCK // logits.shape[1], 1)
