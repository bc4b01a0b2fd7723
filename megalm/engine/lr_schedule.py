"""Learning rate as a pure function of tokens seen: linear warm-up, then cosine, linear or no decay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megalm.config.schema import Optim


@dataclass(frozen=True)
class LearningRate:
    """The schedule of one run; ``at(tokens)`` is the rate of the step that begins after ``tokens`` tokens.

    Attributes:
        optim: peak, warm-up and decay.
        total_tokens: tokens of the whole run, the end of the decay where the config gives none.
    """

    optim: Optim
    total_tokens: int

    def at(self, tokens: int, step_tokens: int) -> float:
        """The learning rate of a step that takes the run from ``tokens`` to ``tokens + step_tokens``.

        The warm-up counts the step's own tokens, so that the first step already learns.
        """
        peak, warmup = self.optim.lr, self.optim.warmup_tokens
        if tokens + step_tokens <= warmup:
            return peak * (tokens + step_tokens) / warmup
        end = self.optim.decay_tokens or self.total_tokens
        progress = min(max((tokens - warmup) / max(end - warmup, 1), 0.0), 1.0)
        floor = self.optim.min_lr_ratio
        if self.optim.schedule == "cosine":
            return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))
        if self.optim.schedule == "linear":
            return peak * (1.0 - (1.0 - floor) * progress)
        return peak
