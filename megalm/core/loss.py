"""Cross entropy over logits whose vocabulary is split over a tensor-parallel group (Shoeybi et al. 2019, section 3).

Shapes: B batch, S sequence, V vocabulary, T tensor-parallel degree. Only three numbers per token cross ranks (largest
logit, sum of exponentials, label's logit), never the logits.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megalm.core.groups import Group


def vocab_parallel_cross_entropy(logits: Tensor, labels: Tensor, group: Group, first_token: int) -> Tensor:
    """Negative log-likelihood of each label, in nats.

    Args:
        logits: this rank's columns, [B, S, ceil(V/T)]; padding columns are minus infinity.
        labels: token ids, [B, S].
        group: tensor-parallel group.
        first_token: token id of this rank's first column.

    Returns:
        [B, S] in fp32, the same on every rank of the group.
    """
    result: Tensor = _VocabParallelCrossEntropy.apply(logits, labels, group, first_token)  # type: ignore[no-untyped-call]
    return result


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, logits: Tensor, labels: Tensor, group: Group, first_token: int
    ) -> Tensor:
        logits_32 = logits.float()
        largest = group.all_reduce(logits_32.amax(dim=-1, keepdim=True), dist.ReduceOp.MAX)
        probabilities = (logits_32 - largest).exp_()
        total = group.all_reduce(probabilities.sum(dim=-1, keepdim=True))
        probabilities.div_(total)

        elsewhere = (labels < first_token) | (labels >= first_token + logits.shape[-1])
        columns = (labels - first_token).masked_fill(elsewhere, 0).unsqueeze(-1)
        label_logit = (logits_32.gather(-1, columns) - largest).masked_fill_(elsewhere.unsqueeze(-1), 0.0)
        group.all_reduce(label_logit)

        ctx.save_for_backward(probabilities, columns, elsewhere)
        ctx.dtype = logits.dtype  # type: ignore[attr-defined]
        return (total.log() - label_logit).squeeze(-1)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: torch.autograd.function.FunctionCtx, grad: Tensor
    ) -> tuple[Tensor, None, None, None]:
        """Softmax less one-hot, eq. for each token: ∂loss/∂logit = p − [column is the label's]."""
        probabilities, columns, elsewhere = ctx.saved_tensors  # type: ignore[attr-defined]
        here = (~elsewhere).unsqueeze(-1).to(probabilities.dtype)
        gradient = probabilities.scatter_add(-1, columns, -here).mul_(grad.unsqueeze(-1))
        return gradient.to(ctx.dtype), None, None, None  # type: ignore[attr-defined]
