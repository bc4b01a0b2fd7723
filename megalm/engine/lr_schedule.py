"""Learning rate as a pure function of tokens seen: linear warm-up, then one of four shapes.

A rate depends on nothing but the tokens before its step and the step's own, so a resumed run continues its schedule, a
ramp of the batch size does not bend it, and a step that fp16 skips has still been counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megalm.config.schema import Optim

_DEFAULT_COOLDOWN = 10
"""``wsd`` without a length decays over the last tenth."""

_FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
"""Shape of a decay ▶ share of the way from floor to peak that is left after a share ``progress`` of the decay."""


@dataclass(frozen=True)
class LearningRate:
    """The schedule of one run; see :meth:`at`.

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
        if self.optim.schedule == "constant":
            return peak
        shape = self.optim.cooldown if self.optim.schedule == "wsd" else self.optim.schedule
        start, end = self.decay
        progress = min(max((tokens - start) / max(end - start, 1), 0.0), 1.0)
        floor = self.optim.min_lr_ratio
        return peak * (floor + (1.0 - floor) * _FALLS[shape](progress))

    @property
    def decay(self) -> tuple[int, int]:
        """Tokens at which the decay begins and ends.

        Warm-up, stable, decay (Hu et al. 2024) begins it one cooldown before the end. In a run that is too short for
        both, the warm-up comes first: such a run is a trial of a longer one.
        """
        optim = self.optim
        end = self.total_tokens if optim.decay_tokens is None else optim.decay_tokens
        if optim.schedule != "wsd":
            return optim.warmup_tokens, end
        cooldown = end // _DEFAULT_COOLDOWN if optim.cooldown_tokens is None else optim.cooldown_tokens
        return max(optim.warmup_tokens, end - cooldown), end
