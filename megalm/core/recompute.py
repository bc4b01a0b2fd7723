"""Activation recomputation (Chen et al. 2016; Korthikanti et al. 2022): backward runs a part of forward again.

``selective`` recomputes the attention core alone, whose activations are large and cheap to make; ``full`` recomputes
whole blocks and keeps only their inputs. Neither saves or restores a random state: dropout masks are functions of what
they fall on, so the second forward draws the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megalm.core.place import Place


@dataclass(frozen=True)
class Recompute:
    """Which blocks of a stage are recomputed, and how much of each.

    Attributes:
        mode: ``none``, ``selective`` or ``full``.
        every: of the blocks of a stage, those with the numbers 0, k, 2k, … are.
    """

    mode: str = "none"
    every: int = 1

    def core(self, index: int) -> bool:
        """Whether the attention core of a stage's block ``index`` is recomputed."""
        return self.mode == "selective" and index % self.every == 0

    def run(self, index: int, block: Callable[[Tensor, Place], Tensor], x: Tensor, place: Place) -> Tensor:
        """Run a stage's block ``index``, keeping its input alone where it is to be recomputed."""
        if self.mode == "full" and index % self.every == 0 and torch.is_grad_enabled():
            y: Tensor = checkpoint(block, x, place, use_reentrant=False, preserve_rng_state=False)
            return y
        return block(x, place)
