"""The global batch size over the course of a run: a pure function of the samples consumed. No torch.

Since it depends on nothing else, a resumed run continues its ramp where it was, on any layout.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    final: int
    start: int
    increment: int
    ramp_tokens: int
    sequence_length: int

    @classmethod
    def of(cls, train: Train, sequence_length: int) -> BatchSize:
        """What a run's config asks for; without a ramp, ``global_batch_size`` throughout."""
        start = train.global_batch_size if train.batch_ramp_start is None else train.batch_ramp_start
        increment = start if train.batch_ramp_increment is None else train.batch_ramp_increment
        return cls(train.global_batch_size, start, increment, train.batch_ramp_tokens, sequence_length)

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
        return self.sizes[min(samples * self.sequence_length * increments // self.ramp_tokens, increments)]

    def samples_after(self, steps: int) -> int:
        """Samples that the first ``steps`` steps of a run take together."""
        samples = 0
        *growing, _ = self.sizes
        for number, size in enumerate(growing, start=1):
            end = _ceil_div(number * self.ramp_tokens, len(growing) * self.sequence_length)
            taken = min(steps, _ceil_div(max(end - samples, 0), size))
            samples, steps = samples + taken * size, steps - taken
        return samples + steps * self.final

    def tokens_after(self, steps: int) -> int:
        """Tokens that the first ``steps`` steps of a run take together."""
        return self.samples_after(steps) * self.sequence_length


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
