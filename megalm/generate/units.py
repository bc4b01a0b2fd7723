"""A request under way: what its rows of a batch are next, and what becomes of their results. No torch.

A unit begins with one row, its prompt. After each pass it says which rows live on, as numbers of rows of that pass: a
prompt of which several texts are drawn becomes several rows, beams leave and multiply, a text that ends is dropped.
Every rank of a model keeps the same units and feeds them the same results, so all of them agree without messages.

Shapes: C columns of a result.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.generate.choices import Choice, likeliest_of, token_of
from megalm.generate.requests import Completion, GenerateRequest, TokenProbability
from megalm.generate.text import GrowingText, cut_at_stop, text_after

OnText = Callable[[int, str], object]
"""Told of the number of a sample, and of text that it has grown by."""


@dataclass
class Row:
    """One sequence of a unit.

    Attributes:
        new: tokens after the prompt.
        first: the number, in the whole text, of the token at position 0; above 0 once the text has slid.
    """

    new: list[int] = field(default_factory=list)
    first: int = 0


class Unit(ABC):
    """A request under way.

    Args:
        number: of the request.
        request: what is asked.
        tokenizer: of the model.
        longest: most tokens that the model can see.
    """

    def __init__(self, number: int, request: GenerateRequest, tokenizer: Tokenizer, longest: int) -> None:
        self.number, self.request = number, request
        self.tokenizer, self.longest = tokenizer, longest
        self.rows: list[Row] = [Row()]
        self.is_new = True
        self.stops = tokenizer.stop_ids if request.ends else frozenset[int]()
        if request.slides and self.must_slide():  # a prompt that is longer than the model's sequences
            self.slide()

    @property
    @abstractmethod
    def most_rows(self) -> int:
        """Rows that it may need."""

    @property
    def most_tokens(self) -> int:
        """Positions that its rows may need."""
        return min(len(self.request.tokens) + self.request.max_new_tokens, self.longest)

    def prompt_of(self, row: Row) -> list[int]:
        """All tokens that a row's keys and values are computed of."""
        return [*self.request.tokens, *row.new][row.first :]

    def position_of(self, row: Row) -> int:
        """Position of a row's newest token."""
        return len(self.request.tokens) + len(row.new) - 1 - row.first

    def newest_of(self, row: Row) -> int:
        """A row's newest token."""
        return row.new[-1] if row.new else self.request.tokens[-1]

    def must_slide(self) -> bool:
        """Whether a row has no position left for its newest token, which its unit's next pass would compute."""
        return any(self.position_of(row) >= self.longest for row in self.rows)

    def slide(self) -> None:
        """Forget the beginning: the later three quarters of the longest sequence are computed again, from zero."""
        kept = max(3 * self.longest // 4, 1)
        for row in self.rows:
            row.first = max(row.first, len(self.request.tokens) + len(row.new) - kept)
        self.is_new = True

    @abstractmethod
    def choices(self) -> list[Choice]:
        """What is asked of the next pass: of one row while it is new, else of each of :attr:`rows`.

        A new unit may ask several things of its single row.
        """

    @abstractmethod
    def accept(self, results: Sequence[Sequence[float]]) -> list[int]:
        """Take a pass's results, one per choice.

        Returns:
            For each of the new :attr:`rows` the number of the row, in the pass, that it goes on from; none: it is done.
        """

    @abstractmethod
    def completions(self) -> list[Completion]:
        """What came of it, once it is done."""


class SampleUnit(Unit):
    """Texts drawn token by token."""

    def __init__(
        self, number: int, request: GenerateRequest, tokenizer: Tokenizer, longest: int, on_text: OnText | None = None
    ) -> None:
        super().__init__(number, request, tokenizer, longest)
        self._samples = [_Sample(number, self, on_text) for number in range(request.samples)]
        self._alive = list(self._samples)
        self._key = _key_of(request)

    @property
    def most_rows(self) -> int:
        """One per text."""
        return self.request.samples

    def choices(self) -> list[Choice]:
        """One draw per text."""
        request = self.request
        return [
            Choice(
                sampling=request.sampling,
                count=request.alternatives or 0,
                uniform=self._uniform(sample),
                seen=self._seen(sample),
                reports=request.alternatives is not None,
            )
            for sample in self._alive
        ]

    def accept(self, results: Sequence[Sequence[float]]) -> list[int]:
        """Add a token to each text."""
        choices = self.choices() if self.request.alternatives else []
        first = [0] * len(self._alive) if self.is_new and len(self.rows) == 1 else list(range(len(self._alive)))
        parents, alive = [], []
        for place, (sample, result) in enumerate(zip(self._alive, results, strict=True)):
            token, value = token_of(result)
            told = None
            if self.request.alternatives is not None:
                others = likeliest_of(result, choices[place]) if choices else []
                told = TokenProbability(log_probability=value, alternatives=tuple(others))
            if sample.grow(token, told):
                alive.append(sample)
                parents.append(first[place])
        self._alive = alive
        self.rows = [sample.row for sample in alive]
        self.is_new = False
        return parents

    def completions(self) -> list[Completion]:
        """Of each text."""
        return [sample.completion() for sample in self._samples]

    def _seen(self, sample: _Sample) -> Sequence[int]:
        if self.request.sampling.repetition_penalty == 1.0:
            return ()
        return sorted({*self.request.tokens, *sample.row.new})

    def _uniform(self, sample: _Sample) -> float:
        if self.request.sampling.temperature == 0:
            return 0.0
        digest = hashlib.blake2b(f"{sample.number}/{len(sample.row.new)}".encode(), key=self._key, digest_size=8)
        return (int.from_bytes(digest.digest(), "little") >> 11) / 2**53


def _key_of(request: GenerateRequest) -> bytes:
    """What all draws of a request depend on: the seed, and the prompt's tokens."""
    text = f"{request.sampling.seed}/{','.join(map(str, request.tokens))}"
    return hashlib.blake2b(text.encode(), digest_size=32).digest()


class _Sample:
    """One text that is drawn."""

    def __init__(self, number: int, unit: SampleUnit, on_text: OnText | None) -> None:
        self.number, self._unit, self._on_text = number, unit, on_text
        self.row = Row()
        self._probabilities: list[TokenProbability] = []
        self._finish = "length"
        self._text: GrowingText | None = None
        if on_text is not None or unit.request.stop:
            self._text = GrowingText(unit.tokenizer, unit.request.tokens, unit.request.stop)

    def grow(self, token: int, told: TokenProbability | None) -> bool:
        """Take the next token; whether the text goes on."""
        if token in self._unit.stops:
            self._finish = "end"
            self._show(ended=True)
            return False
        self.row.new.append(token)
        if told is not None:
            self._probabilities.append(told)
        stopped = self._text is not None and self._text.add(token)
        if stopped:
            self._finish = "stop"
        ended = stopped or len(self.row.new) >= self._unit.request.max_new_tokens
        self._show(ended=ended)
        return not ended

    def completion(self) -> Completion:
        """The text as it ended."""
        request, tokenizer = self._unit.request, self._unit.tokenizer
        if self._finish == "stop":
            tokens, text = cut_at_stop(tokenizer, request.tokens, self.row.new, request.stop)
        else:
            tokens, text = self.row.new, text_after(tokenizer, request.tokens, self.row.new)
        wanted = request.alternatives is not None
        probabilities = tuple(self._probabilities[: len(tokens)]) if wanted else None
        return Completion(tokens=tuple(tokens), text=text, finish=self._finish, probabilities=probabilities)

    def _show(self, *, ended: bool) -> None:
        if self._on_text is not None and self._text is not None and (piece := self._text.piece(ended=ended)):
            self._on_text(self.number, piece)


@dataclass(frozen=True)
class _Beam:
    """A continuation, and the sum of its log-probabilities."""

    tokens: tuple[int, ...]
    total: float
    probabilities: tuple[TokenProbability, ...] = ()


@dataclass(frozen=True)
class _Finished:
    """A beam that ended, by its score: the sum divided by a power of its length."""

    beam: _Beam
    score: float
    finish: str


class BeamUnit(Unit):
    """Beam search (Graves 2012; length penalty as Wu et al. 2016 simplified to a power of the length).

    Of the 2·k likeliest continuations of all beams, those among the first k that end are kept as finished, and the k
    best of the others go on. It ends when k are finished and no beam that goes on has a better score, at its present
    length, than the worst of them; or at ``max_new_tokens``, where the beams count as finished. This is what
    ``transformers`` does with ``early_stopping=False``.
    """

    def __init__(self, number: int, request: GenerateRequest, tokenizer: Tokenizer, longest: int) -> None:
        super().__init__(number, request, tokenizer, longest)
        self._beams = [_Beam((), 0.0)]
        self._finished: list[_Finished] = []

    @property
    def most_rows(self) -> int:
        """One per beam."""
        return self.request.beams

    @property
    def _candidates(self) -> int:
        return max(2, 1 + len(self.stops)) * self.request.beams

    def choices(self) -> list[Choice]:
        """The likeliest continuations of each beam."""
        sampling = self.request.sampling
        penalised = sampling.repetition_penalty != 1.0
        return [
            Choice(
                sampling=sampling,
                draws=False,
                count=self._candidates,
                seen=sorted({*self.request.tokens, *beam.tokens}) if penalised else (),
            )
            for beam in self._beams
        ]

    def accept(self, results: Sequence[Sequence[float]]) -> list[int]:
        """Extend the beams by one token."""
        candidates = self._extended(results)
        count, length = self.request.beams, len(self._beams[0].tokens) + 1
        is_last = length >= self.request.max_new_tokens
        going: list[tuple[_Beam, int]] = []
        for place, (beam, parent) in enumerate(candidates):
            ended = self._ending(beam)
            if ended is None and not is_last:
                going.append((beam, parent))
            elif place < count:
                self._finish(beam, ended or "length", length)
        going = going[:count]
        self.is_new = False
        if not going or self._is_decided(going[0][0], length):
            self.rows, self._beams = [], []
            return []
        self._beams = [beam for beam, _ in going]
        firsts = [row.first for row in self.rows]
        self.rows = [Row(list(beam.tokens), firsts[parent]) for beam, parent in going]
        return [parent for _, parent in going]

    def completions(self) -> list[Completion]:
        """The best finished ones."""
        request, best = self.request, sorted(self._finished, key=lambda each: -each.score)[: self.request.samples]
        made = []
        for each in best:
            tokens = list(each.beam.tokens)
            if each.finish == "end":
                tokens = tokens[:-1]
            if each.finish == "stop":
                tokens, text = cut_at_stop(self.tokenizer, request.tokens, tokens, request.stop)
            else:
                text = text_after(self.tokenizer, request.tokens, tokens)
            wanted = request.alternatives is not None
            told = each.beam.probabilities[: len(tokens)] if wanted else None
            made.append(
                Completion(tokens=tuple(tokens), text=text, finish=each.finish, probabilities=told, score=each.score)
            )
        return made

    def _extended(self, results: Sequence[Sequence[float]]) -> list[tuple[_Beam, int]]:
        """The likeliest continuations of all beams, likeliest first, and the number of each one's beam."""
        found = []
        for parent, (beam, choice, result) in enumerate(zip(self._beams, self.choices(), results, strict=True)):
            ranked = likeliest_of(result, choice)
            for token, value in ranked:
                told = beam.probabilities
                if self.request.alternatives is not None:
                    others = tuple(ranked[: self.request.alternatives])
                    told = (*told, TokenProbability(log_probability=value, alternatives=others))
                found.append((_Beam((*beam.tokens, token), beam.total + value, told), parent))
        found.sort(key=lambda each: -each[0].total)  # stable: of equals the earlier beam
        return found[: self._candidates]

    def _ending(self, beam: _Beam) -> str | None:
        if beam.tokens[-1] in self.stops:
            return "end"
        if self.request.stop:
            tail = text_after(self.tokenizer, self.request.tokens[-1:], beam.tokens)
            if any(stop in tail for stop in self.request.stop):
                return "stop"
        return None

    def _finish(self, beam: _Beam, finish: str, length: int) -> None:
        score = beam.total / length**self.request.length_penalty
        self._finished.append(_Finished(beam, score, finish))
        self._finished = sorted(self._finished, key=lambda each: -each.score)[: self.request.beams]

    def _is_decided(self, best: _Beam, length: int) -> bool:
        if len(self._finished) < self.request.beams:
            return False
        return best.total / length**self.request.length_penalty <= self._finished[-1].score


def make_unit(
    number: int, request: GenerateRequest, tokenizer: Tokenizer, longest: int, on_text: OnText | None = None
) -> Unit:
    """The unit of a request."""
    if request.beams > 1:
        return BeamUnit(number, request, tokenizer, longest)
    return SampleUnit(number, request, tokenizer, longest, on_text)
