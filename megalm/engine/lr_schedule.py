"""Learning rate as a pure function of tokens seen: linear warm-up, then one of four shapes.

A rate depends on nothing but the tokens before its step and the step's own, so a ramp of the batch size does not bend
it, and a step that fp16 skips has still been counted. When warm-up and decay begin and end is a :class:`Course`, which
checkpoints store: a resumed run continues the course that it followed, whatever today's config would have made of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from megalm.config.schema import Optim

_DEFAULT_COOLDOWN = 10
"""``wsd`` without a length decays over the last tenth."""

_FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "sqrt": lambda progress: 1.0 - math.sqrt(progress),
}
"""Shape of a decay ▶ share of the way from floor to peak that is left after a share ``progress`` of the decay."""

_PROGRESS_AT: dict[str, Callable[[float], float]] = {
    "linear": lambda left: 1.0 - left,
    "cosine": lambda left: math.acos(2.0 * left - 1.0) / math.pi,
    "sqrt": lambda left: (1.0 - left) ** 2,
}
"""The inverse of each fall."""


@dataclass(frozen=True)
class Course:
    """When a run's warm-up and decay begin and end, in tokens since its beginning.

    Attributes:
        warmup_start: tokens at which the warm-up begins: 0, or where a run was resumed.
        warmup_end: tokens at which it reaches the peak.
        warmup_from: share of the peak that it begins at.
        decay_start: tokens at which the decay begins, or where what is left of it was planned anew.
        decay_end: tokens at which it ends.
        decay_from: share of the decay that is done at ``decay_start``: 0, or what a run had done where it was resumed.
    """

    warmup_start: int
    warmup_end: int
    warmup_from: float
    decay_start: int
    decay_end: int
    decay_from: float

    @classmethod
    def of(cls, optim: Optim, total_tokens: int) -> Course:
        """What a run from the beginning plans, of which ``total_tokens`` is the end.

        Warm-up, stable, decay (Hu et al. 2024) begins its decay one cooldown before the end. In a run that is too short
        for both, the warm-up comes first: such a run is a trial of a longer one.
        """
        end = total_tokens if optim.decay_tokens is None else optim.decay_tokens
        return cls(0, optim.warmup_tokens, 0.0, _decay_start(optim, optim.warmup_tokens, end), end, 0.0)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Course:
        """What :meth:`to_dict` made."""
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__})

    def to_dict(self) -> dict[str, Any]:
        """As a checkpoint stores it."""
        return asdict(self)

    def progress(self, tokens: int) -> float:
        """Share of the decay, 0 to 1, that is done after so many tokens."""
        done = min(max((tokens - self.decay_start) / max(self.decay_end - self.decay_start, 1), 0.0), 1.0)
        return self.decay_from + (1.0 - self.decay_from) * done


@dataclass(frozen=True)
class LearningRate:
    """The schedule of one run; see :meth:`at`.

    Attributes:
        optim: peak, warm-up and decay.
        total_tokens: tokens of the whole run, the end of the decay where the config gives none.
        resumed_course: what a resumed run follows (see :meth:`resumed`); None: what ``optim`` says from the beginning.
    """

    optim: Optim
    total_tokens: int
    resumed_course: Course | None = None

    @property
    def course(self) -> Course:
        """When warm-up and decay begin and end."""
        return Course.of(self.optim, self.total_tokens) if self.resumed_course is None else self.resumed_course

    def at(self, tokens: int, step_tokens: int) -> float:
        """The learning rate of a step that takes the run from ``tokens`` to ``tokens + step_tokens``.

        The warm-up counts the step's own tokens, so that the first step already learns.
        """
        peak, course = self.optim.lr, self.course
        if tokens + step_tokens <= course.warmup_end:
            low = course.warmup_from * peak
            done = tokens + step_tokens - course.warmup_start
            return low + (peak - low) * done / (course.warmup_end - course.warmup_start)
        return peak * self._share(tokens)

    def reached(self, tokens: int) -> float:
        """The learning rate that the schedule has reached after so many tokens, between two steps."""
        peak, course = self.optim.lr, self.course
        if tokens < course.warmup_end:
            low = course.warmup_from * peak
            return low + (peak - low) * (tokens - course.warmup_start) / (course.warmup_end - course.warmup_start)
        return peak * self._share(tokens)

    def is_over(self, tokens: int) -> bool:
        """Whether the decay has ended, and the rate stays at its floor."""
        return self.optim.schedule != "constant" and tokens > 0 and self.course.progress(tokens) >= 1.0

    @property
    def floor(self) -> float:
        """The learning rate at the end of the decay; of a constant schedule the one that it stays at."""
        if self.optim.schedule == "constant":
            return self.optim.lr * (1.0 - self.course.decay_from)
        return self.optim.lr * self.optim.min_lr_ratio

    def _share(self, tokens: int) -> float:
        """Share of the peak after the warm-up."""
        if self.optim.schedule == "constant":
            return 1.0 - self.course.decay_from
        floor = self.optim.min_lr_ratio
        return floor + (1.0 - floor) * _FALLS[_shape(self.optim)](self.course.progress(tokens))

    def resumed(self, optim: Optim, tokens: int, total_tokens: int) -> LearningRate:
        """The schedule of a run that has followed this one for ``tokens`` tokens and goes on with ``optim``.

        The rate is continuous: a warm-up goes on, and what is left of the decay is spread over what is left of the run,
        whatever its batch and length are now. A decay that is over stays at its floor. A new schedule is one that is
        asked for: ``optim.rewarm_tokens`` rises from the rate that was reached, and plans a decay after that; another
        ``optim.decay_tokens`` after the end of a decay is followed as if it had been so from the beginning.

        Args:
            optim: of today's config.
            tokens: tokens that the run has seen.
            total_tokens: tokens that it will have seen at its end.
        """
        if self._asks_to_rewarm(optim):
            assert optim.rewarm_tokens is not None
            warm = tokens + optim.rewarm_tokens
            end = total_tokens if optim.decay_tokens is None else optim.decay_tokens
            share = self.reached(tokens) / optim.lr
            start = _decay_start(optim, warm, end)
            return LearningRate(optim, total_tokens, Course(tokens, warm, share, start, max(end, start), 0.0))
        if self._asks_for_new_decay(optim, tokens):
            return LearningRate(optim, total_tokens)
        plan = self._in_warmup if tokens < self.course.warmup_end else self._rest_of_decay
        return LearningRate(optim, total_tokens, plan(optim, tokens, total_tokens))

    def _asks_to_rewarm(self, optim: Optim) -> bool:
        """A request that the checkpoint's config has too has been followed: a requeued job repeats its command."""
        return optim.rewarm_tokens not in (None, self.optim.rewarm_tokens)

    def _asks_for_new_decay(self, optim: Optim, tokens: int) -> bool:
        asked = optim.decay_tokens
        return self.is_over(tokens) and asked is not None and asked != self.optim.decay_tokens and asked > tokens

    def _in_warmup(self, optim: Optim, tokens: int, total_tokens: int) -> Course:
        before = self.course
        end = total_tokens if optim.decay_tokens is None else optim.decay_tokens
        start, warm, share = before.warmup_start, before.warmup_end, before.warmup_from
        if optim.warmup_tokens != self.optim.warmup_tokens and (start == 0 or optim.warmup_tokens > tokens):
            start, warm, share = tokens, max(optim.warmup_tokens, tokens), self.reached(tokens) / self.optim.lr
        return Course(start, warm, share, _decay_start(optim, warm, end), end, 0.0)

    def _rest_of_decay(self, optim: Optim, tokens: int, total_tokens: int) -> Course:
        before = self.course
        end = total_tokens if optim.decay_tokens is None else optim.decay_tokens
        same_shape = self._has_shape_of(optim)
        stays = optim.schedule == "constant" or self.is_over(tokens)
        as_planned = end == before.decay_end and optim.cooldown_tokens == self.optim.cooldown_tokens
        if same_shape and (stays or as_planned):
            return before
        done = before.progress(tokens) if same_shape else self._progress_in(optim, tokens)
        has_begun = same_shape and done > before.decay_from
        if optim.schedule == "wsd" and not has_begun:
            start = max(tokens, _decay_start(optim, before.warmup_end, end))
        else:
            start = tokens if has_begun or not same_shape else max(tokens, before.decay_start)
        return Course(before.warmup_start, before.warmup_end, before.warmup_from, start, max(end, start), done)

    def _has_shape_of(self, optim: Optim) -> bool:
        return (self.optim.schedule, _shape(self.optim), self.optim.min_lr_ratio) == (
            optim.schedule,
            _shape(optim),
            optim.min_lr_ratio,
        )

    def _progress_in(self, optim: Optim, tokens: int) -> float:
        """The share of another shape's decay at which its rate is where this schedule's is, relative to the peak."""
        share = self._share(tokens)
        if optim.schedule == "constant":
            return 1.0 - share
        floor = optim.min_lr_ratio
        left = 0.0 if floor >= 1.0 else min(max((share - floor) / (1.0 - floor), 0.0), 1.0)
        return _PROGRESS_AT[_shape(optim)](left)


def _shape(optim: Optim) -> str:
    return optim.cooldown if optim.schedule == "wsd" else optim.schedule


def _decay_start(optim: Optim, warmup_end: int, end: int) -> int:
    if optim.schedule != "wsd":
        return warmup_end
    cooldown = end // _DEFAULT_COOLDOWN if optim.cooldown_tokens is None else optim.cooldown_tokens
    return max(warmup_end, end - cooldown)
