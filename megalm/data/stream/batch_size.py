"""The global batch size over the course of a run: a pure function of the tokens consumed. No torch.

Since it depends on nothing else, a resumed run continues its ramp where it was, on any layout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megalm.config.schema import Train


@dataclass(frozen=True)
class BatchSize:
    """A constant batch, or one that rises linearly, in equal increments, to its final size (Brown et al. 2020).

    Attributes:
        final: sequences per step over all replicas, at the end of the ramp and ever after.
        start: sequences of the first step.
        increment: sequences by which the batch grows at a time; divides ``final - start``.
        ramp_tokens: tokens over which it rises.
        sequence_length: tokens of a sequence.
        past_samples: samples that a resumed run had taken before; later ones have ``sequence_length`` tokens.
        past_tokens: tokens of those samples, whose sequences may have been of another length.
    """

    final: int
    start: int
    increment: int
    ramp_tokens: int
    sequence_length: int
    past_samples: int = 0
    past_tokens: int = 0

    @classmethod
    def of(cls, train: Train, sequence_length: int) -> BatchSize:
        """What a run's config asks for; without a ramp, ``global_batch_size`` throughout."""
        start = train.global_batch_size if train.batch_ramp_start is None else train.batch_ramp_start
        increment = start if train.batch_ramp_increment is None else train.batch_ramp_increment
        return cls(train.global_batch_size, start, increment, train.batch_ramp_tokens, sequence_length)

    def resumed(self, samples: int, tokens: int) -> BatchSize:
        """That of a run which has taken so many samples, of so many tokens, and goes on."""
        return replace(self, past_samples=samples, past_tokens=tokens)

    @property
    def sizes(self) -> range:
        """Every size of the run, in order."""
        return range(self.start, self.final + 1, self.increment)

    def at(self, samples: int) -> int:
        """Sequences of the step that begins after ``samples`` samples.

        The ramp's tokens are shared equally by the sizes below the final one; the final one is reached where they end.
        """
        increments = len(self.sizes) - 1
        if increments == 0:
            return self.final
        return self.sizes[min(self._tokens_of(samples) * increments // self.ramp_tokens, increments)]

    def samples_after(self, steps: int) -> int:
        """Samples that a run has taken ``steps`` steps after its beginning, or after it was resumed."""
        samples = self.past_samples
        *growing, _ = self.sizes
        for number, size in enumerate(growing, start=1):
            tokens_left = max(number * self.ramp_tokens - len(growing) * self._tokens_of(samples), 0)
            taken = min(steps, _ceil_div(_ceil_div(tokens_left, len(growing) * self.sequence_length), size))
            samples, steps = samples + taken * size, steps - taken
        return samples + steps * self.final

    def tokens_after(self, steps: int) -> int:
        """Tokens that a run has taken ``steps`` steps after its beginning, or after it was resumed."""
        return self._tokens_of(self.samples_after(steps))

    def _tokens_of(self, samples: int) -> int:
        return self.past_tokens + (samples - self.past_samples) * self.sequence_length


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
