"""Language models that are a formula, and tokenizers that a test trains in milliseconds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megalm.config.compose import compose
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.generate.requests import (
    Completion,
    GenerateRequest,
    LanguageModel,
    OnCompletions,
    Progress,
    Score,
    ScoreRequest,
)

TEXT = (
    "the cat sat on the mat. the dog sat on the log. a man rides a horse on the beach. "
    "Q: What is 98 plus 45? A: 143 Q: What is 12 plus 30? A: 42 "
) * 8


def byte_level(vocab: int = 330, text: str = TEXT, bos: str | None = None) -> Tokenizer:
    """A byte-level BPE, as GPT-2's: spaces belong to the word after them."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>", *([bos] if bos else [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return Tokenizer(tokenizer.to_str())


def metaspace(vocab: int = 120, text: str = TEXT) -> Tokenizer:
    """A unigram model of words that begin with ▁, as sentencepiece makes them."""
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return Tokenizer(tokenizer.to_str())


class Bigrams(LanguageModel):
    """P(next | last) from counts in a text, with 0.01 added to each."""

    def __init__(self, tokenizer: Tokenizer, text: str = TEXT, *, sequence_length: int = 128, name: str = "tiny"):
        config = compose(["experiment=quickstart", f"run.name={name}", f"model.sequence_length={sequence_length}"])
        self.config = replace(config, model=replace(config.model, vocab_size=tokenizer.vocab_size))
        self.tokenizer, self.checkpoint = tokenizer, "runs/tiny/checkpoints/step-00000007"
        ids = tokenizer.encode(text)
        self._pairs, self._firsts = Counter(pairwise(ids)), Counter(ids[:-1])
        self.asked: list[ScoreRequest | GenerateRequest] = []

    def log_probability(self, before: int, after: int) -> float:
        added = 0.01
        total = self._firsts[before] + added * self.tokenizer.vocab_size
        return math.log((self._pairs[before, after] + added) / total)

    def likeliest(self, before: int) -> int:
        return max(range(self.tokenizer.vocab_size), key=lambda after: self._pairs[before, after])

    def score(self, requests: Sequence[ScoreRequest], *, progress: Progress | None = None) -> list[Score]:
        self.asked += requests
        scores = []
        for request in requests:
            assert request.context and request.continuation
            assert len(request.context) + len(request.continuation) <= self.config.model.sequence_length + 1
            ids = (request.context[-1], *request.continuation)
            pairs = list(pairwise(ids))
            found = tuple(self.log_probability(*pair) for pair in pairs)
            scores.append(Score(log_probabilities=found, likeliest=tuple(self.likeliest(a) == b for a, b in pairs)))
            if progress is not None:
                progress(1)
        return scores

    def generate(
        self, requests: Sequence[GenerateRequest], *, on_done: OnCompletions | None = None
    ) -> list[list[Completion]]:
        self.asked += requests
        found = []
        for number, request in enumerate(requests):
            assert len(request.tokens) + request.max_new_tokens <= self.config.model.sequence_length
            found.append([self._written(request)])
            if on_done is not None:
                on_done(number, found[-1])
        return found

    def _written(self, request: GenerateRequest) -> Completion:
        ids: list[int] = []
        while len(ids) < request.max_new_tokens:
            ids.append(self.likeliest((*request.tokens, *ids)[-1]))
            text = self.tokenizer.decode(ids)
            for stop in request.stop:
                if stop in text:
                    return Completion(tokens=tuple(ids), text=text.partition(stop)[0], finish="stop")
        return Completion(tokens=tuple(ids), text=self.tokenizer.decode(ids), finish="length")


class Scripted(Bigrams):
    """Writes what a function of the prompt's text says; its likelihoods are those of bigrams."""

    def __init__(self, tokenizer: Tokenizer, say: Callable[[str], str], **more: object):
        super().__init__(tokenizer, **more)
        self._say = say

    def _written(self, request: GenerateRequest) -> Completion:
        text = self._say(self.tokenizer.decode(request.tokens))
        for stop in request.stop:
            text = text.partition(stop)[0]
        return Completion(tokens=tuple(self.tokenizer.encode(text)), text=text, finish="stop")


def written(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
