"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """What a run has done since its beginning.

    Attributes:
        step: optimizer steps.
        samples: sequences taken by the trainer, over all replicas.
        tokens: tokens of those sequences.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0

    def after(self, samples: int, tokens: int) -> Progress:
        """One step further."""
        return Progress(self.step + 1, self.samples + samples, self.tokens + tokens)
