"""``megalm.load``: a trained model, to be asked for logits, losses and text.

Shapes: S tokens of a text, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from megalm.config.schema import Config
from megalm.config.violation import format_value
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import ConfigError
from megalm.evaluate.tasks.requests import split
from megalm.generate.asked import BATCH_SIZE, AskedModel
from megalm.generate.open import start
from megalm.generate.prompts import Settings, check_settings, checked_messages, requests_of, text_prompt
from megalm.generate.requests import Completion, Sampling, Score, ScoreRequest
from megalm.runs.find import find_model

if TYPE_CHECKING:
    from torch import Tensor

    from megalm.models.transformer import Transformer


def load(run: str | Path, overrides: Sequence[str] = (), *, batch_size: int = BATCH_SIZE) -> LoadedModel:
    """The model of a run, whatever layout trained it: whole in this process, or split over ranks of its own.

    Args:
        run: folder of the run or its name in ``runs/``: its newest complete checkpoint is taken; or one of its
            checkpoints, ``runs/NAME/checkpoints/step-00000200``.
        overrides: changes to the run's config, such as ``"launch.device=cpu"``, ``"engine.dtype=fp32"``, or a layout:
            ``"parallel.tp=2"``, ``"parallel.pp=2"``, ``"launch.ranks=4"``. With several ranks, which are processes that
            this one starts, use it as a context manager, or call :meth:`LoadedModel.close`.
        batch_size: prompts that are computed together.

    Raises:
        ConfigError: the folder is no run, or an override is wrong.
        CheckpointError: there is no complete checkpoint, or it is damaged.
        DataError: the run's tokenizer is missing or damaged.
    """
    found = find_model(run, overrides)
    return LoadedModel(AskedModel(found, start(found, overrides), batch_size=batch_size))


class LoadedModel:
    """A trained model. ``model``, ``tokenizer`` and ``config`` are megalm's own objects, for whoever needs more."""

    def __init__(self, asked: AskedModel) -> None:
        self._asked = asked

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the ranks that were started for it; a model in this process ends with it."""
        self._asked.close()

    @property
    def model(self) -> Transformer:
        """A ``torch.nn.Module``: token ids [B, S] ▶ logits [B, S, V]; S is at most ``model.sequence_length``.

        Raises:
            ConfigError: the model is on several ranks, none of which is this process.
        """
        if self._asked.found.world_size > 1:
            raise ConfigError(
                f"the model is split over {self._asked.found.world_size} ranks, which generate and score; "
                "without parallel.tp, parallel.pp and launch.ranks it is a module of this process"
            )
        whole: Transformer = self._asked.ranks.trained.model
        return whole

    @property
    def tokenizer(self) -> Tokenizer:
        """``encode(text)`` ▶ ids, ``decode(ids)`` ▶ text."""
        return self._asked.tokenizer

    @property
    def config(self) -> Config:
        """Of the run."""
        return self._asked.config

    @property
    def checkpoint(self) -> Path:
        """The folder that the weights are from."""
        return self._asked.found.checkpoint

    def logits(self, text: str) -> Tensor:
        """Logits of every token of a text, after each of which the model says what comes next.

        The tokens are those of :meth:`tokens`.

        Returns:
            [S, V] fp32, on the CPU.

        Raises:
            ConfigError: the text has no token, or more than ``model.sequence_length``; or the model is on ranks.
            DataError: the model has no embedding of one of them.
        """
        import torch

        tokens, longest = self.tokens(text), self.config.model.sequence_length
        if not 0 < len(tokens) <= longest:
            raise ConfigError(f"a text of {len(tokens)} tokens: the model takes 1 to {longest} (model.sequence_length)")
        whole, trained = self.model, self._asked.ranks.trained
        trained.found.check_tokens(max(tokens), "the text")
        with torch.inference_mode():
            logits: Tensor = whole(torch.tensor([tokens], device=trained.device))[0].float().cpu()
        return logits

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, after the token that begins a document where the run's documents have one."""
        return self.tokenizer.encode_prompt(text) if text else []

    def loss(self, text: str) -> float:
        """Mean cross-entropy of a text's tokens in nats, each given those before it.

        A text longer than the model's sequences is cut into pieces of that length, as training data are; the first
        token of the whole has nothing before it and is not counted.

        Raises:
            ConfigError: the model is an encoder, or the text has fewer than two tokens.
            DataError: the model has no embedding of one of them.
        """
        if not self.config.model.causal:
            raise ConfigError("model.causal=false: an encoder gives no probability of a text")
        tokens, length = self.tokens(text), self.config.model.sequence_length
        if len(tokens) < 2:
            raise ConfigError(f"a text of {len(tokens)} tokens: the first is given, so at least 2 are needed")
        pieces = [tokens[start : start + length + 1] for start in range(0, len(tokens) - 1, length)]
        requests = [ScoreRequest(context=tuple(piece[:1]), continuation=tuple(piece[1:])) for piece in pieces]
        return -math.fsum(score.total for score in self._asked.score(requests)) / (len(tokens) - 1)

    def perplexity(self, text: str) -> float:
        """``exp`` of :meth:`loss`."""
        return math.exp(self.loss(text))

    def score(self, context: str, continuation: str) -> Score:
        """How likely a continuation is after a context.

        The two are tokenised as one text, and the score is of the tokens from where that departs from the context
        alone: a space at the end of the context goes to the continuation, and so does what shares a token with it.

        Raises:
            ConfigError: the model is an encoder, the continuation is empty, or both are too long.
            DataError: the model has no embedding of a token.
        """
        if not continuation:
            raise ConfigError("continuation: an empty text; at least one character")
        return self._asked.score(split(self.tokenizer, context, [continuation]))[0]

    def generate(
        self, prompt: str, *, max_new_tokens: int = 120, temperature: float = 0.8, top_k: int = 40, seed: int = 1234
    ) -> str:
        """The text that follows a prompt, without the prompt; past the model's longest sequence it slides.

        Raises:
            ConfigError: the model is an encoder, or an argument is out of its range.
        """
        sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
        settings = Settings(max_new_tokens=max_new_tokens, sampling=sampling, slides=True)
        return self.complete([prompt], settings)[0][0].text

    def complete(self, prompts: Sequence[str], settings: Settings | None = None) -> list[list[Completion]]:
        """Continue several prompts at once, with everything that ``megalm generate`` can do.

        Args:
            prompts: texts.
            settings: :class:`megalm.Settings`: sampling, beams, stop texts, samples, log-probabilities.

        Returns:
            For each prompt its completions.

        Raises:
            ConfigError: the model is an encoder, a setting is wrong, or a prompt too long.
        """
        if isinstance(prompts, str):
            raise ConfigError(f"prompts={format_value(prompts)}: one text; a list of texts")
        settings = settings or Settings()
        check_settings(settings)
        made = [text_prompt(self.tokenizer, prompt) for prompt in prompts]
        return self._asked.generate(requests_of(self._asked.found, made, settings))

    def chat(self, messages: Sequence[dict[str, str]], settings: Settings | None = None) -> str:
        """The assistant's next turn of a conversation.

        Args:
            messages: ``{"role": "user", "content": "…"}``, the latest last.
            settings: as for :meth:`complete`.

        Raises:
            ConfigError: as for :meth:`complete`; or several samples, where one turn is the answer.
            DataError: they are no messages, the tokenizer has no chat template, or it refuses them.
        """
        settings = settings or Settings()
        check_settings(settings)
        if settings.samples > 1:
            raise ConfigError(f"samples={settings.samples}: a conversation goes on from one text; samples=1")
        tokens = self.tokenizer.encode_conversation(checked_messages(messages, "chat"))
        request = settings.request(tokens, self.config.model.sequence_length)
        return self._asked.generate([request])[0][0].text
