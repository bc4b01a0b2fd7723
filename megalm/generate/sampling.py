"""From logits to the next token. Shapes: V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalm.config.violation import format_value
from megalm.errors import ConfigError

LARGEST_SEED = 2**63 - 1
"""As of ``run.seed``: what torch's generators take."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token, the first of equals.
        top_k: only this many of the likeliest tokens may be drawn (Fan et al. 2018); 0: all.
        seed: of the generator that draws; the same seed, weights and prompt give the same text.

    Raises:
        ConfigError: a value that makes no sense, every one on its own line.
    """

    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature={self.temperature}: not a temperature; 0 (greedy) or above")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k}: not a number of tokens; 0 (all of the vocabulary) or above")
        if not 0 <= self.seed <= LARGEST_SEED:
            problems.append(f"seed={format_value(self.seed)}: out of range; 0 to {LARGEST_SEED}")
        if problems:
            raise ConfigError(problems)

    def generator(self) -> torch.Generator:
        """A new CPU generator: draws do not depend on the device that computes the logits."""
        return torch.Generator().manual_seed(self.seed)


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose a token.

    Args:
        logits: [V], any float dtype and device; minus infinity excludes a token.
        sampling: how.
        generator: on the CPU; advanced by one draw unless the choice is greedy.
    """
    if logits.dim() != 1:
        raise ValueError(f"logits have shape {tuple(logits.shape)}, expected [V]")
    logits = logits.detach().float().cpu()
    if sampling.temperature == 0:
        return int(logits.argmax())
    kept = min(sampling.top_k or logits.numel(), logits.numel())
    values, tokens = torch.topk(logits, kept)  # [k], [k]
    # Subtracting the largest first keeps a tiny temperature from overflowing to infinity.
    probabilities = torch.softmax((values - values[0]) / sampling.temperature, dim=-1)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
