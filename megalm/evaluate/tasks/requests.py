"""Questions ▶ what a language model is asked: texts with their examples, as tokens that fit its sequences. No torch.

A continuation's tokens are those of prompt and continuation encoded as one text, from where that departs from the
prompt's: a tokenizer joins what meets there, and encoding both apart gives tokens that no training text has. All
choices of an item begin at the same token, the first at which one of them departs. Space at the end of a prompt goes to
the continuation, as in lm-evaluation-harness, since most tokenizers have it at the beginning of the next word.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.evaluate.tasks.data import raise_all
from megalm.evaluate.tasks.load import LoadedTask
from megalm.evaluate.tasks.prompts import Question
from megalm.evaluate.tasks.task import CLOZE, CUT, GENERATION, MULTIPLE_CHOICE, Task
from megalm.generate.requests import GenerateRequest, Sampling, ScoreRequest


@dataclass(frozen=True)
class Asked:
    """One question as a model is asked it.

    Attributes:
        question: what is asked.
        prompt: all of the text before the answer.
        examples: numbers of the items that are its examples, in order.
        dropped: examples that were left out, the first ones, so that it fits.
        cut: tokens that were cut off its beginning for the same reason.
        generate: of a generation.
        score: of the target, or of each choice.
        unconditional: of each choice after the unconditional prompt.
    """

    question: Question
    prompt: str
    examples: tuple[int, ...] = ()
    dropped: int = 0
    cut: int = 0
    generate: GenerateRequest | None = None
    score: tuple[ScoreRequest, ...] = ()
    unconditional: tuple[ScoreRequest, ...] = ()


@dataclass(frozen=True)
class PreparedTask:
    """A task whose requests are made for one model's tokenizer and sequences."""

    loaded: LoadedTask
    asked: tuple[Asked, ...]

    @property
    def task(self) -> Task:
        """The task."""
        return self.loaded.task

    @property
    def requests(self) -> int:
        """How many requests a model is asked."""
        return sum((each.generate is not None) + len(each.score) + len(each.unconditional) for each in self.asked)

    def notes(self) -> list[str]:
        """What was left out to fit, in words."""
        dropped = [each.dropped for each in self.asked if each.dropped]
        cut = [each.cut for each in self.asked if each.cut]
        lines = []
        if dropped:
            lines.append(f"{self.task.name}: {len(dropped)} items have fewer examples, to fit: {sum(dropped)} dropped")
        if cut:
            lines.append(f"{self.task.name}: {len(cut)} prompts are cut at their beginning, to fit: {sum(cut)} tokens")
        return lines


def prepare_tasks(tasks: Sequence[LoadedTask], tokenizer: Tokenizer, sequence_length: int) -> list[PreparedTask]:
    """The requests of tasks.

    Args:
        tasks: loaded.
        tokenizer: the model's.
        sequence_length: longest sequence of the model, in tokens.

    Raises:
        DataError: items that do not fit the model's sequences, or of whose text no token is left.
    """
    prepared: list[PreparedTask] = []
    problems: list[str] = []
    for loaded in tasks:
        maker = _Maker(loaded, tokenizer, sequence_length)
        asked = []
        for question in loaded.questions:
            try:
                asked.append(maker.asked(question))
            except _TooLongError as problem:
                problems.append(f"{question.item.place}: {problem} (task {loaded.task.name})")
        prepared.append(PreparedTask(loaded, tuple(asked)))
    raise_all(problems)
    return prepared


def alike_from_start(*sequences: Sequence[int]) -> int:
    """How many tokens some sequences begin with in common."""
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*sequences, strict=False)))


def split(tokenizer: Tokenizer, prompt: str, continuations: Sequence[str]) -> list[ScoreRequest]:
    """Each continuation's tokens after the prompt's; see the top of the file. A continuation may come out empty."""
    context = prompt.rstrip()
    moved = prompt[len(context) :]
    before = tokenizer.encode_prompt(context)
    wholes = [tokenizer.encode_prompt(f"{context}{moved}{continuation}") for continuation in continuations]
    shared = alike_from_start(before, *wholes)
    if not shared:
        # Nothing begins a document for this tokenizer: what comes before it is the end of the one before.
        return [ScoreRequest(context=(tokenizer.eos_id,), continuation=tuple(whole)) for whole in wholes]
    return [ScoreRequest(context=tuple(whole[:shared]), continuation=tuple(whole[shared:])) for whole in wholes]


class _TooLongError(Exception):
    """An item that the model's sequences do not take."""


class _Maker:
    """Makes the requests of one task."""

    def __init__(self, loaded: LoadedTask, tokenizer: Tokenizer, sequence_length: int) -> None:
        self._loaded, self._tokenizer, self._length = loaded, tokenizer, sequence_length
        self._task = loaded.task
        self._make = {GENERATION: self._generation, MULTIPLE_CHOICE: self._choices, CLOZE: self._cloze}[self._task.kind]

    def asked(self, question: Question) -> Asked:
        """A question with as many of its examples as fit, the later ones; cut only where the task says so."""
        task = self._task
        examples = self._loaded.pool.examples(question, task.examples) if task.examples else []

        def made(dropped: int) -> Asked:
            kept = examples[dropped:]
            asked = self._make(question, self._text(question, kept))
            return replace(asked, examples=tuple(each.item.number for each in kept), dropped=dropped)

        asked = made(0)
        if self._over(asked) > 0 and examples:
            fewest = bisect_left(range(len(examples)), True, lo=1, key=lambda dropped: self._over(made(dropped)) <= 0)
            asked = made(fewest)
        over = self._over(asked)
        return asked if over <= 0 else self._cut(asked, over)

    def _text(self, question: Question, examples: Sequence[Question]) -> str:
        task = self._task
        parts = [f"{each.prompt}{task.separator}{each.target}{task.example_separator}" for each in examples]
        return "".join([self._loaded.instruction, *parts, question.prompt])

    def _generation(self, question: Question, prompt: str) -> Asked:
        """A model writes after the separator's lines, but writes its spaces, which belong to its first word."""
        task = self._task
        text = prompt + task.separator.rstrip(" ")
        sampling = Sampling(temperature=task.temperature, seed=task.seed)
        request = GenerateRequest(
            tokens=tuple(self._tokenizer.encode_prompt(text)),
            max_new_tokens=task.max_new_tokens,
            sampling=sampling,
            stop=task.stop,
        )
        return Asked(question, text, generate=request)

    def _cloze(self, question: Question, prompt: str) -> Asked:
        requests = split(self._tokenizer, prompt, [self._task.separator + question.target])
        return Asked(question, prompt, score=self._not_empty(requests))

    def _choices(self, question: Question, prompt: str) -> Asked:
        continuations = [self._task.separator + choice for choice in question.choices]
        requests = self._not_empty(split(self._tokenizer, prompt, continuations))
        alone: list[ScoreRequest] = []
        if self._task.unconditional_prompt is not None:
            alone = split(self._tokenizer, self._task.unconditional_prompt, continuations)
        return Asked(question, prompt, score=requests, unconditional=self._not_empty(alone))

    @staticmethod
    def _not_empty(requests: Sequence[ScoreRequest]) -> tuple[ScoreRequest, ...]:
        if not all(request.continuation for request in requests):
            raise _TooLongError("no token is left of a text whose likelihood is asked for; another text or separator")
        return tuple(requests)

    def _over(self, asked: Asked) -> int:
        """Tokens by which a question is longer than the model's sequences."""
        if asked.generate is not None:
            return len(asked.generate.tokens) + asked.generate.max_new_tokens - self._length
        longest = max(len(each.context) + len(each.continuation) for each in (*asked.score, *asked.unconditional))
        return longest - self._length - 1

    def _cut(self, asked: Asked, over: int) -> Asked:
        """The question without some tokens at its beginning; those that begin every document stay."""
        before = len(self._tokenizer.before_ids)
        tokens = asked.generate.tokens if asked.generate is not None else asked.score[0].context
        if self._task.too_long != CUT or len(tokens) - before <= over:
            raise _TooLongError(self._too_long(asked, len(tokens)))

        def shorter(ids: tuple[int, ...]) -> tuple[int, ...]:
            return (*ids[:before], *ids[before + over :])

        if asked.generate is not None:
            return replace(asked, cut=over, generate=replace(asked.generate, tokens=shorter(asked.generate.tokens)))
        score = tuple(replace(each, context=shorter(each.context)) for each in asked.score)
        return replace(asked, cut=over, score=score)

    def _too_long(self, asked: Asked, tokens: int) -> str:
        if asked.generate is not None:
            what = f"{tokens} tokens, and max_new_tokens={self._task.max_new_tokens} to come"
        else:
            what = f"{tokens} tokens, and {max(len(each.continuation) for each in asked.score)} of the answer"
        right = "a model of longer sequences, fewer new tokens, or too_long: cut"
        return f"prompt: it has {what}; the model's sequences have {self._length}; {right}"
