"""Cross entropy over logits whose vocabulary is split over a tensor-parallel group (Shoeybi et al. 2019, section 3).

Shapes: B batch, S sequence, H hidden, V vocabulary, T tensor-parallel degree, P rows of a rank (padding included), R
those that are multiplied (its words; on GPUs all P), C tokens of a chunk, K terms of the loss.
Only two numbers per token cross ranks, never the logits: the log of a rank's sum of exponentials (its largest logit and
its sum of exponentials in one) and the label's logit.

Language models train with :func:`output_loss`. The logits are by far the largest tensor of a step (V is 20 to 100 times
H), so it takes them chunk by chunk, and turns each chunk at once into its losses and into its share of the gradients:
the logits of C tokens exist at any time, in the model's dtype, and they are computed once. That is possible since the
factor of each token's loss is known in forward; backward only multiplies by the gradient that comes in.

A loss that is a function of whole sequences' log-probabilities (preferences) knows the factors in backward only:
:func:`sequence_log_probabilities` computes the logits a second time there.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megalm.core.collectives import Pending
from megalm.core.embedding import VocabParallelEmbedding
from megalm.core.output_chunks import OutputChunks, logits_to_gradient, most_likely, token_losses
from megalm.core.weight_gradients import GradientSink, add_product


def output_loss(
    x: Tensor,
    embedding: VocabParallelEmbedding,
    labels: Tensor,
    loss_weight: Tensor,
    *,
    chunk_tokens: int,
    z_loss: float = 0.0,
    bias: Tensor | None = None,
    compiles: bool = False,
) -> Tensor:
    """Cross-entropy (and z-loss) of a micro-batch from the last hidden vectors, without materialising all logits.

    Both gradients are computed here, in forward, and kept for backward: [B, S, H] and, in the model's dtype (fp16: in
    fp32), the size of ``embedding.weight``. The weight gradient is therefore no product that a zero-bubble schedule
    can postpone, and a schedule that runs several forwards before the first backward (GPipe) keeps one per micro-batch.
    Where the embedding hands its gradients over to a sum, the chunks' products add up in fp32 by themselves, and
    backward adds the result to the sum. (Not forward: what comes in from above, such as a loss scale or the factor of
    a term among others, multiplies it, and is known in backward only.) The gradient is then kept in fp32.

    Over tensor-parallel ranks, the gather of the next chunk's inputs (sequence parallelism) and the reduction of the
    last chunk's input gradients are under way while a chunk is computed.

    Args:
        x: output of the final norm, [B, S, H], or [B, S/T, H] under sequence parallelism.
        embedding: the rows that logits are computed with.
        labels: token ids, [B, S].
        loss_weight: factor of each token's loss, [B, S] fp32: the mask times the run's normalisation.
        chunk_tokens: C; 0: all of the micro-batch at once.
        z_loss: weight of the second term; 0: there is none.
        bias: added to the logits, [P]; None: there is none.
        compiles: whether what turns logits into losses and gradients is compiled.

    Returns:
        [K] in fp32, the same on every rank of the group: the weighted sum of token losses in nats and, with ``z_loss``,
        its product with the weighted sum of squared log-partitions (Chowdhery et al. 2022, section 5). Backward
        takes the same gradient for both: what is minimised is their sum.
    """
    chunks = OutputChunks.of(embedding, chunk_tokens, z_loss, compiles=compiles)
    terms: Tensor = _OutputLoss.apply(  # type: ignore[no-untyped-call]
        x, embedding.weight, bias, labels, loss_weight, chunks, torch.is_grad_enabled(), _sink(embedding)
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
    """Loss and accuracy sums for evaluation, from the last hidden vectors; arguments as :func:`output_loss`.

    Returns:
        [2] in fp64, the same on every rank of the group: the weighted sums of token losses in nats, and of labels that
        have the largest logit; fp32 stops counting at 2²⁴.
    """
    chunks = OutputChunks.of(embedding, chunk_tokens)
    weight, bias = _multiplied(embedding.weight, bias, chunks)
    totals = torch.zeros(2, dtype=torch.float64, device=x.device)
    for chunk, chunk_labels, chunk_weight in chunks.iterate(x.flatten(0, 1), labels, loss_weight):
        logits = F.linear(chunk, weight, bias)
        totals[:1] += logits_to_gradient(logits, chunk_labels, chunk_weight, chunks, None, wants_gradient=False)
        totals[1] += (chunk_weight * (most_likely(logits, chunks) == chunk_labels)).sum(dtype=torch.float64)
    return totals


def token_scores(
    x: Tensor, embedding: VocabParallelEmbedding, labels: Tensor, *, chunk_tokens: int, bias: Tensor | None = None
) -> Tensor:
    """How likely single tokens are, for evaluation; arguments as :func:`output_loss`, for M hidden vectors.

    Args:
        x: output of the final norm where each token is predicted, [1, M, H].
        embedding: the rows that logits are computed with.
        labels: the tokens, [1, M].
        chunk_tokens: C; 0: all at once.
        bias: added to the logits; None: there is none.

    Returns:
        [M, 2] in fp64, the same on every rank of the group: each token's log-probability, and 1 where it is the
        likeliest, else 0.
    """
    chunks = OutputChunks.of(embedding, chunk_tokens)
    weight, bias = _multiplied(embedding.weight, bias, chunks)
    found = []
    for chunk, chunk_labels in chunks.iterate(x.flatten(0, 1), labels):
        logits = F.linear(chunk, weight, bias)
        losses = token_losses(logits, chunk_labels, chunks)
        found.append(torch.stack((-losses.double(), (most_likely(logits, chunks) == chunk_labels).double()), dim=1))
    return torch.cat(found)


def sequence_log_probabilities(
    x: Tensor,
    embedding: VocabParallelEmbedding,
    labels: Tensor,
    mask: Tensor,
    *,
    chunk_tokens: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Log-probability of each row's labels: the sum of its tokens' negative losses, where ``mask`` counts them.

    For losses that are functions of whole sequences' probabilities, such as preferences (Rafailov et al. 2023). Nothing
    of the size of the logits or of ``embedding.weight`` is kept for backward, which computes the logits again.

    Args:
        x: output of the final norm, [B, S, H], or [B, S/T, H] under sequence parallelism.
        embedding: the rows that logits are computed with.
        labels: token ids, [B, S].
        mask: factor of each token, [B, S].
        chunk_tokens: C; 0: all of the micro-batch at once.
        bias: added to the logits, [P]; None: there is none.

    Returns:
        [B] in fp32 (fp64 for fp64 models), the same on every rank of the group; of this rank's share of the sequences
        under context parallelism.
    """
    chunks = OutputChunks.of(embedding, chunk_tokens)
    sums: Tensor = _SequenceLogProbabilities.apply(  # type: ignore[no-untyped-call]
        x, embedding.weight, bias, labels, mask, chunks, _sink(embedding)
    )
    return sums


class _OutputLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        loss_weight: Tensor,
        chunks: OutputChunks,
        training: bool,
        sink: GradientSink | None,
    ) -> Tensor:
        needs = _Needs(*(training and needed for needed in ctx.needs_input_grad[:3]))
        terms, gradients = _terms_and_gradients(
            x, weight, bias, labels, loss_weight, chunks, needs, in_fp32=sink is not None
        )
        ctx.save_for_backward(*gradients)
        ctx.dtype, ctx.sink, ctx.parameters = x.dtype, sink, (weight, bias)
        return terms.to(torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if gradient.numel() > 1:
            torch._assert_async(
                (gradient == gradient[0]).all(), "terms of the loss are minimised together, with one gradient for all"
            )
        # [1], not a scalar: torch would round a scalar to the tensor's dtype first, and a loss scale overflows fp16.
        gradients = _Gradients(*ctx.saved_tensors)
        if ctx.sink is not None:
            gradients = gradients.handed_over(gradient[:1], ctx.sink, ctx.parameters)
        return *gradients.times(gradient[:1], ctx.dtype), None, None, None, None, None


class _SequenceLogProbabilities(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        mask: Tensor,
        chunks: OutputChunks,
        sink: GradientSink | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, labels, mask)
        ctx.chunks, ctx.sink, ctx.parameters = chunks, sink, (weight, bias)
        weight, bias = _multiplied(weight, bias, chunks)
        row = torch.arange(len(labels), device=labels.device).unsqueeze(1).expand_as(labels)  # [B, S]
        sums = torch.zeros(len(labels), dtype=torch.float64, device=x.device)
        for chunk, chunk_labels, chunk_mask, chunk_row in chunks.iterate(x.flatten(0, 1), labels, mask, row):
            losses = token_losses(F.linear(chunk, weight, bias), chunk_labels, chunks)
            sums.index_add_(0, chunk_row, -(losses * chunk_mask).double())
        return sums.to(torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, labels, mask = ctx.saved_tensors
        needs = _Needs(*ctx.needs_input_grad[:3])
        loss_weight = -gradient.unsqueeze(1) * mask  # [B, S], factors of the token losses
        _, gradients = _terms_and_gradients(
            x, weight, bias, labels, loss_weight, ctx.chunks, needs, in_fp32=ctx.sink is not None
        )
        one = gradient.new_ones(1)
        if ctx.sink is not None:
            gradients = gradients.handed_over(one, ctx.sink, ctx.parameters)
        return *gradients.times(one, x.dtype), None, None, None, None


class _Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    weight: bool
    bias: bool


class _Gradients(NamedTuple):
    """Gradients of the sum of the terms.

    Attributes:
        x: as the input.
        weight: [P, H].
        bias: [P].
        scale: what they were multiplied by, against underflow; None: nothing.
    """

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    scale: Tensor | None

    def times(self, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Multiplied by a factor, [1], in the model's dtype."""
        factor = self._factor(factor)

        def scaled(gradient: Tensor | None) -> Tensor | None:
            if gradient is None:
                return None
            return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))

        return scaled(self.x), scaled(self.weight), scaled(self.bias)

    def handed_over(self, factor: Tensor, sink: GradientSink, parameters: tuple[Any, Any]) -> _Gradients:
        """What is left for autograd, where those of (weight, bias) are added to sums, times a factor [1]."""
        for parameter, gradient in zip(parameters, (self.weight, self.bias), strict=True):
            if gradient is not None:
                sink.add(parameter, gradient, factor=self._factor(factor))
        return self._replace(weight=None, bias=None)

    def _factor(self, factor: Tensor) -> Tensor:
        return factor if self.scale is None else factor / self.scale


def _multiplied(weight: Tensor, bias: Tensor | None, chunks: OutputChunks) -> tuple[Tensor, Tensor | None]:
    """The rows of weight [P, H] and bias [P] that products take, [R, H] and [R]."""
    return weight[: chunks.rows], None if bias is None else bias[: chunks.rows]


def _terms_and_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    loss_weight: Tensor,
    chunks: OutputChunks,
    needs: _Needs,
    *,
    in_fp32: bool,
) -> tuple[Tensor, _Gradients]:
    """The terms, [K] in fp64, and the gradients of their sum, from one pass over the logits.

    ``in_fp32``: the weight's gradient is fp32 from the first product on.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    scale = _fp16_scale(loss_weight) if x.dtype == torch.float16 else None
    terms = torch.zeros(2 if chunks.z_loss else 1, dtype=torch.float64, device=x.device)
    input_gradients: list[Tensor] = []
    reduction: Pending | None = None
    rows = chunks.rows
    weight_gradient = _ExactWeightGradient(weight, rows) if in_fp32 else _WeightGradient(weight, rows)
    bias_gradient = torch.zeros(weight.shape[0], dtype=exact, device=x.device) if needs.bias else None
    weight, bias = _multiplied(weight, bias, chunks)
    logits = weight.new_empty(0)
    for chunk, chunk_labels, chunk_weight in chunks.iterate(x.flatten(0, 1), labels, loss_weight):
        if logits.shape[0] != chunk.shape[0]:  # the first chunk, and a last one that is shorter
            logits = weight.new_empty(chunk.shape[0], weight.shape[0])
        if bias is None:
            torch.mm(chunk, weight.t(), out=logits)
        else:
            torch.addmm(bias, chunk, weight.t(), out=logits)
        wants_gradient = needs.x or needs.weight
        terms += logits_to_gradient(logits, chunk_labels, chunk_weight, chunks, scale, wants_gradient=wants_gradient)
        if needs.x:
            partial = logits @ weight
            if reduction is not None:
                input_gradients.append(reduction.wait())
            reduction = chunks.reduce(partial)
        if needs.weight:
            weight_gradient.add(logits, chunk)
        if bias_gradient is not None:
            bias_gradient[: chunks.rows] += logits.sum(dim=0, dtype=exact)
    if reduction is not None:
        input_gradients.append(reduction.wait())
    return terms, _Gradients(
        torch.cat(input_gradients).view(x.shape) if needs.x else None,
        weight_gradient.total() if needs.weight else None,
        bias_gradient,
        scale,
    )


def _fp16_scale(loss_weight: Tensor) -> Tensor:
    """The power of two that brings the largest factor to between 1/2 and 1.

    A factor is about 1 over the tokens of a global batch, which times a probability is zero in fp16. The loss scale
    that would prevent it is not known in forward; it is applied in backward, to the finished products, in fp32.
    """
    _, exponent = torch.frexp(loss_weight.abs().amax())
    return torch.ldexp(torch.ones_like(loss_weight[0, 0]), -exponent)


class _WeightGradient:
    """``Σ Gᵀ X`` over chunks, added in fp32 if the model is in half precision and there is something to add.

    Args:
        weight: [P, H].
        rows: R; the gradient of the rows after them is zero.
    """

    def __init__(self, weight: Tensor, rows: int) -> None:
        self._weight, self._rows = weight, rows
        self._exact = torch.promote_types(weight.dtype, torch.float32)
        self._dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        self._first: Tensor | None = None
        self._sum: Tensor | None = None

    def add(self, gradients: Tensor, inputs: Tensor) -> None:
        """Add a chunk's product: [C, R], [C, H]."""
        if self._first is None:
            self._first = torch.empty_like(self._weight)
            self._first[self._rows :] = 0.0
            torch.mm(gradients.t(), inputs, out=self._first[: self._rows])
            return
        if self._sum is None:
            self._sum = self._first.to(self._exact)
        if self._sum.dtype == inputs.dtype:
            self._sum[: self._rows].addmm_(gradients.t(), inputs)
        else:
            self._sum[: self._rows].add_(gradients.t() @ inputs)

    def total(self) -> Tensor:
        """[P, H]; fp16: in fp32, since the loss scale is yet to come."""
        assert self._first is not None
        return (self._first if self._sum is None else self._sum).to(self._dtype)


class _ExactWeightGradient:
    """The same, in fp32 from the first product on, without a product in half precision."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        self._shape, self._rows = weight.shape, rows
        self._sum: Tensor | None = None

    def add(self, gradients: Tensor, inputs: Tensor) -> None:
        """Add a chunk's product: [C, R], [C, H]."""
        is_first = self._sum is None
        if self._sum is None:
            self._sum = torch.empty(self._shape, dtype=torch.float32, device=inputs.device)
            self._sum[self._rows :] = 0.0
        add_product(self._sum[: self._rows], gradients, inputs, replace=is_first)

    def total(self) -> Tensor:
        """[P, H] in fp32."""
        assert self._sum is not None
        return self._sum


def _sink(embedding: VocabParallelEmbedding) -> GradientSink | None:
    return None if embedding.weight_gradients is None else embedding.weight_gradients.sink
