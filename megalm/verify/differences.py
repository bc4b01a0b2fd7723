"""How far a layout's losses, gradient norms and weights are from the reference's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.verify.parity import Trace


@dataclass(frozen=True)
class Differences:
    """How far a layout is from the reference.

    Attributes:
        loss: largest difference of any step on any rank.
        grad_norm: the same of the gradient norm, relative where the norm is above 1.
        weights: largest difference of any element after the last step.
        initial_weights: the same before the first step.
        copies: largest difference between two ranks' copies of an element, or their reported losses.
        missing: elements of the model that no rank holds.
        untrained: parameters that the reference changed and the layout left as they were.
    """

    loss: float
    grad_norm: float
    weights: float
    initial_weights: float
    copies: float
    missing: int
    untrained: tuple[str, ...]


def differences(want: Trace, per_rank: Sequence[Trace]) -> Differences:
    """Compare what the ranks of a layout saw with the reference; whatever is not a number is infinitely far."""
    initial, initial_copies = _assemble([trace.initial for trace in per_rank])
    final, final_copies = _assemble([trace.final for trace in per_rank])
    reported = [_largest(trace.losses, per_rank[0].losses) for trace in per_rank]
    return Differences(
        loss=max(_largest(trace.losses, want.losses) for trace in per_rank),
        grad_norm=max(_largest(trace.grad_norms, want.grad_norms, relative=True) for trace in per_rank),
        weights=_furthest(final, want.final),
        initial_weights=_furthest(initial, want.initial),
        copies=max(initial_copies, final_copies, *reported),
        missing=sum(
            int(initial[name].isnan().sum()) if name in initial else full.numel() for name, full in want.initial.items()
        ),
        untrained=tuple(
            name
            for name, before in want.initial.items()
            if not torch.equal(before, want.final[name])
            and name in final
            and torch.equal(initial[name].nan_to_num(), final[name].nan_to_num())
        ),
    )


def _assemble(per_rank: Sequence[dict[str, Tensor]]) -> tuple[dict[str, Tensor], float]:
    """Full parameters from every rank's slices, and the largest difference between copies of the same element."""
    full: dict[str, Tensor] = {}
    furthest = 0.0
    for tensors in per_rank:
        for name, tensor in tensors.items():
            known = full.setdefault(name, torch.full_like(tensor, math.nan))
            both = ~known.isnan() & ~tensor.isnan()
            if bool(both.any()):
                furthest = max(furthest, float((known[both] - tensor[both]).abs().max()))
            held = ~tensor.isnan()
            known[held] = tensor[held]
    return full, furthest


def _furthest(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    if got.keys() != want.keys():
        return math.inf
    return max(_finite(float((got[name] - want[name]).abs().max())) for name in want)


def _largest(got: Sequence[float], want: Sequence[float], *, relative: bool = False) -> float:
    return max(
        _finite(abs(mine - theirs) / (max(1.0, abs(theirs)) if relative else 1.0))
        for mine, theirs in zip(got, want, strict=True)
    )


def _finite(difference: float) -> float:
    return difference if math.isfinite(difference) else math.inf
