"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018): as large a scale as does not overflow."""

from __future__ import annotations

from dataclasses import dataclass

_FACTOR = 2.0
_SMALLEST = 1.0


@dataclass(frozen=True)
class LossScale:
    """The scale of one step; :meth:`after` gives that of the next.

    Attributes:
        value: factor of the loss in backward.
        good_steps: steps without an overflow since the scale last changed.
        window: good steps after which the scale doubles.
    """

    value: float
    good_steps: int
    window: int

    def after(self, *, overflowed: bool) -> LossScale:
        """Half after an overflow, double after ``window`` steps without one; never below 1."""
        if overflowed:
            return LossScale(max(self.value / _FACTOR, _SMALLEST), 0, self.window)
        if self.good_steps + 1 >= self.window:  # a resumed run may have a smaller window
            return LossScale(self.value * _FACTOR, 0, self.window)
        return LossScale(self.value, self.good_steps + 1, self.window)
