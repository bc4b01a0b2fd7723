"""What a language model is asked, and what it answers. No torch.

Everything that computes with a trained model (``megalm generate``, evaluation tasks, the Python API) goes through
:class:`LanguageModel`, so none of it knows how many ranks hold the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from megalm.config.schema import Config
from megalm.config.violation import format_value
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import ConfigError

LARGEST_SEED = 2**63 - 1
"""As of ``run.seed``: what torch's generators take."""


def check_numbers(settings: object, *, whole: Sequence[str], real: Sequence[str]) -> None:
    """Refuse fields that are no numbers, or no whole ones.

    Raises:
        ConfigError: every one on its own line.
    """
    values = vars(settings)
    problems = [(name, "no whole number") for name in whole if not isinstance(values[name], Integral)]
    problems += [(name, "no number") for name in real if not isinstance(values[name], Real)]
    if problems:
        raise ConfigError([f"{name}={format_value(values[name])}: {wrong}" for name, wrong in problems])


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    The logits pass through the penalty, the temperature, ``top_k``, ``top_p`` and ``min_p``, in this order; what
    ``top_p`` and ``min_p`` compare are the probabilities at that temperature.

    Attributes:
        temperature: divides the logits; 0 always takes the likeliest token, the first of equals.
        top_k: only this many of the likeliest tokens may be drawn (Fan et al. 2018); 0: all.
        top_p: only the likeliest tokens whose probabilities add up to this (Holtzman et al. 2020); 1: all.
        min_p: only tokens at least this share as likely as the likeliest (Nguyen et al. 2024); 0: all.
        repetition_penalty: divides positive logits of tokens that are in the text already, the prompt included, and
            multiplies negative ones (Keskar et al. 2019); 1: none.
        seed: of the draws. A prompt's text is a function of the seed, the prompt and the weights, whatever else is in
            the batch.

    Raises:
        ConfigError: a value that makes no sense, every one on its own line.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_numbers(self, whole=("top_k", "seed"), real=("temperature", "top_p", "min_p", "repetition_penalty"))
        problems = []
        if not 0 <= self.temperature < float("inf"):
            problems.append(f"temperature={self.temperature}: not a temperature; 0 (greedy) or above")
        if self.top_k < 0:
            problems.append(f"top_k={self.top_k}: not a number of tokens; 0 (all of the vocabulary) or above")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p={self.top_p}: not a share of the probability; above 0, at most 1 (all)")
        if not 0 <= self.min_p <= 1:
            problems.append(f"min_p={self.min_p}: not a share of the largest probability; 0 (all) to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            problems.append(f"repetition_penalty={self.repetition_penalty}: not a factor; above 0, and 1 for none")
        if not 0 <= self.seed <= LARGEST_SEED:
            problems.append(f"seed={format_value(self.seed)}: out of range; 0 to {LARGEST_SEED}")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """One prompt to continue.

    Attributes:
        tokens: of the prompt, at least one.
        max_new_tokens: most tokens to generate.
        sampling: how a token is chosen; beam search uses its penalty alone.
        stop: texts that end the generation; they are not part of the text.
        ends: whether tokens that end a document or a turn end the text, too; False: only ``max_new_tokens`` and
            ``stop`` do.
        samples: texts to draw, each with draws of its own.
        beams: above 1: beam search with this many beams, which gives the best ``samples`` of them.
        length_penalty: of beam search: a beam's score is its log-probability divided by its number of new tokens to
            this power; above 0 favours longer texts.
        alternatives: how many of the likeliest tokens to report beside each new one; None: not even its own
            log-probability is reported.
        slides: a text that reaches the model's longest sequence goes on from its later part, which is computed again
            at positions from zero; False: it ends there.
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    ends: bool = True
    samples: int = 1
    beams: int = 1
    length_penalty: float = 1.0
    alternatives: int | None = None
    slides: bool = False

    def __post_init__(self) -> None:
        known = () if self.alternatives is None else ("alternatives",)
        check_numbers(self, whole=("max_new_tokens", "samples", "beams", *known), real=("length_penalty",))
        problems = []
        if isinstance(self.stop, str) or not all(isinstance(text, str) for text in self.stop):
            raise ConfigError(f"stop={format_value(self.stop)}: no tuple of texts, such as ('.', 'END')")
        if not self.tokens:
            problems.append("prompt: it has no tokens; at least one")
        if self.max_new_tokens < 0:
            problems.append(f"max_new_tokens={self.max_new_tokens}: not a number of tokens; 0 or above")
        if self.samples < 1:
            problems.append(f"samples={self.samples}: not a number of texts; 1 or above")
        if self.beams < 1:
            problems.append(f"beams={self.beams}: not a number of beams; 1 (no beam search) or above")
        if 1 < self.beams < self.samples:
            problems.append(f"samples={self.samples}: more than beams={self.beams}; at most as many")
        if self.alternatives is not None and self.alternatives < 0:
            problems.append(f"alternatives={self.alternatives}: not a number of tokens; 0 or above")
        if "" in self.stop:
            problems.append("stop: an empty text would end every generation at once; at least one character")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True)
class TokenProbability:
    """A generated token as the model saw it: at temperature 1, before any penalty or limit.

    Attributes:
        log_probability: natural logarithm.
        alternatives: the likeliest tokens there and their log-probabilities, likeliest first.
    """

    log_probability: float
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model made of a prompt.

    Attributes:
        tokens: new tokens; one that ended the text is not among them, nor is what follows a stop text.
        text: what follows the prompt's text.
        finish: ``end`` (a token that ends a document or turn), ``stop`` (a stop text) or ``length``.
        probabilities: of each of ``tokens``, where they were asked for.
        score: of beam search.
    """

    tokens: tuple[int, ...]
    text: str
    finish: str
    probabilities: tuple[TokenProbability, ...] | None = None
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class ScoreRequest:
    """A continuation whose probability is asked for, given what is before it.

    Attributes:
        context: tokens before it, at least one.
        continuation: its tokens, at least one; together at most one more than the model's longest sequence.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """How likely a continuation is.

    Attributes:
        log_probabilities: natural logarithm of each of its tokens, given those before it.
        likeliest: whether each of its tokens is the likeliest one there.
    """

    log_probabilities: tuple[float, ...]
    likeliest: tuple[bool, ...]

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation."""
        return sum(self.log_probabilities)

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would give it."""
        return all(self.likeliest)


@dataclass(frozen=True)
class Asked:
    """A payload.

    Attributes:
        requests: of one kind.
        batch_size: rows that a replica computes together.
        streams: whether text is reported as it grows.
    """

    requests: tuple[Any, ...]
    batch_size: int
    streams: bool = False


Progress = Callable[[int], object]
"""Called with how many more requests are done."""

OnCompletions = Callable[[int, list[Completion]], object]
"""Called with the number of a request and its completions as soon as they are known, in any order."""


class LanguageModel(ABC):
    """A trained decoder that can be asked, whatever ranks hold it.

    Attributes:
        config: of its run, with what was changed for this use.
        tokenizer: the one that it was trained with.
        checkpoint: the folder that the weights are from.
    """

    config: Config
    tokenizer: Tokenizer
    checkpoint: str

    @abstractmethod
    def generate(
        self, requests: Sequence[GenerateRequest], *, on_done: OnCompletions | None = None
    ) -> list[list[Completion]]:
        """Continue prompts, several at a time.

        Args:
            requests: the prompts.
            on_done: told of each request as it is done.

        Returns:
            For each request its completions: ``samples`` of them, the best first where beam search ranks them.

        Raises:
            ConfigError: a prompt is longer than the model's sequences, or would be and may not slide.
            DataError: the model has no embedding of a token.
        """

    @abstractmethod
    def score(self, requests: Sequence[ScoreRequest], *, progress: Progress | None = None) -> list[Score]:
        """How likely continuations are, several at a time.

        Raises:
            ConfigError: one is empty, or longer than the model's sequences.
            DataError: the model has no embedding of a token.
        """

    def close(self) -> None:  # noqa: B027 - a model in this process holds nothing but memory
        """Let go of the ranks."""
