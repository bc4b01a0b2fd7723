"""Asks a language model to go on with passages that its run has read, and compares word for word. No torch.

Decoding is greedy. All prompts of a passage end at the same place, so that lengths are compared on the same
continuations (Carlini et al. 2023, section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import sqrt

from megalm.evaluate.memorisation.passages import Passage, Passages
from megalm.evaluate.memorisation.settings import Memorisation
from megalm.evaluate.tasks.bootstrap import Interval, interval
from megalm.evaluate.tasks.metrics.base import Mean
from megalm.generate.requests import Completion, GenerateRequest, LanguageModel, Sampling

_QUANTILE = 1.959963984540054
"""Of the normal distribution, for 95 %."""


@dataclass(frozen=True)
class Answer:
    """What a model made of a passage.

    Attributes:
        passage: that was asked for.
        matched: for each length of the prompt, how many tokens of the continuation it gave before another.
        written: for each length, the tokens that it gave.
        continuation_tokens: that there are to give.
    """

    passage: Passage
    matched: tuple[int, ...]
    written: tuple[tuple[int, ...], ...]
    continuation_tokens: int

    @property
    def verbatim(self) -> tuple[bool, ...]:
        """For each length of the prompt, whether the continuation is word for word that of the passage."""
        return tuple(matched == self.continuation_tokens for matched in self.matched)


@dataclass(frozen=True)
class Share:
    """A share of passages, or the mean of a share of tokens, with its 95 % interval."""

    value: float
    interval: Interval


@dataclass(frozen=True)
class Cell:
    """Passages of one group, continued from prompts of one length.

    Attributes:
        group: of the passages.
        passages: how many.
        prompt_tokens: of the prompt.
        verbatim: share that was continued word for word; the interval is Wilson's.
        matched: mean share of the continuation before the first token that differs; the interval is by bootstrap.
    """

    group: str
    passages: int
    prompt_tokens: int
    verbatim: Share
    matched: Share


@dataclass(frozen=True)
class MemorisationResult:
    """What a model has memorised.

    Attributes:
        settings: of the task.
        passages: that were asked for, and what they were drawn from.
        answers: to each of ``passages.all``.
        checkpoint: the folder that the weights are from.
        run: name of its run.
    """

    settings: Memorisation
    passages: Passages
    answers: tuple[Answer, ...]
    checkpoint: str
    run: str

    def cells(self) -> list[Cell]:
        """A row per group and length of the prompt."""
        return [
            _cell(group, number, members, self.settings)
            for group, members in self.groups()
            for number in range(len(self.settings.prompt_tokens))
        ]

    def groups(self) -> list[tuple[str, list[Answer]]]:
        """The answers by group."""
        grouped = groupby(self.answers, key=lambda answer: answer.passage.group)
        return [(group, list(members)) for group, members in grouped]

    def worst(self) -> list[Answer]:
        """What was read and continued word for word: from the shortest prompts first, of these the rarest read."""
        found = [answer for answer in self.answers if answer.passage.times and any(answer.verbatim)]
        found.sort(key=lambda answer: (answer.verbatim.index(True), answer.passage.times))
        return found[: self.settings.worst]

    @property
    def verbatim(self) -> int:
        """How many passages that were read were continued word for word from a prompt of any length."""
        return sum(answer.passage.times > 0 and any(answer.verbatim) for answer in self.answers)


def ask(
    model: LanguageModel, settings: Memorisation, passages: Passages, progress: Callable[[int, int], object]
) -> MemorisationResult:
    """Ask a model for all passages.

    Args:
        model: that is asked.
        settings: of the task.
        passages: that it is asked for.
        progress: told how many more prompts are done, and of how many tokens.

    Raises:
        ConfigError, DataError: see :class:`~megalm.generate.requests.LanguageModel`.
    """
    lengths, count = settings.prompt_tokens, settings.continuation_tokens

    def done(_number: int, completions: list[Completion]) -> None:
        progress(1, len(completions[0].tokens))

    requests = [_request(passage, length, count) for passage in passages.all for length in lengths]
    written = [completions[0].tokens for completions in model.generate(requests, on_done=done)]
    answers = []
    for number, passage in enumerate(passages.all):
        own = tuple(written[number * len(lengths) : (number + 1) * len(lengths)])
        matched = tuple(_matched(tokens, passage.tokens[-count:]) for tokens in own)
        answers.append(Answer(passage, matched, own, count))
    return MemorisationResult(settings, passages, tuple(answers), model.checkpoint, model.config.run.name)


def _request(passage: Passage, prompt_tokens: int, count: int) -> GenerateRequest:
    prompt = passage.tokens[-count - prompt_tokens : -count]
    return GenerateRequest(tokens=prompt, max_new_tokens=count, sampling=Sampling(temperature=0.0), ends=False)


def _matched(written: Sequence[int], right: Sequence[int]) -> int:
    """Tokens before the first that differs."""
    return next((n for n, token in enumerate(right) if n >= len(written) or written[n] != token), len(right))


class _MatchedShare(Mean[float]):
    """Mean share of the continuation before the first token that differs."""

    name = "matched"

    def of(self, answer: float) -> float:
        return answer


def _cell(group: str, number: int, members: Sequence[Answer], settings: Memorisation) -> Cell:
    verbatim = sum(answer.verbatim[number] for answer in members)
    metric = _MatchedShare()
    statistics = metric.statistics([answer.matched[number] / settings.continuation_tokens for answer in members])
    return Cell(
        group,
        len(members),
        settings.prompt_tokens[number],
        Share(verbatim / len(members), wilson(verbatim, len(members))),
        Share(metric.value(statistics), interval(metric, statistics, seed=settings.seed)),
    )


def wilson(found: int, count: int) -> Interval:
    """The 95 % score interval of a share (Wilson 1927): not empty where it is 0 or 1, as that of a bootstrap is.

    Args:
        found: how many of them.
        count: how many there are, at least one.
    """
    share, squared = found / count, _QUANTILE**2
    middle = (share + squared / (2 * count)) / (1 + squared / count)
    half = _QUANTILE / (1 + squared / count) * sqrt(share * (1 - share) / count + squared / (4 * count**2))
    return Interval(max(middle - half, 0.0), min(middle + half, 1.0))
