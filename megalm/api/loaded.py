"""``megalm.load``: a trained model, to be asked for logits, losses and text.

Shapes: S tokens of a text, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from megalm.checkpoint.store import COMPLETE_FILE
from megalm.config.schema import Config
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import ConfigError
from megalm.generate.run import continue_text
from megalm.generate.sampling import Sampling
from megalm.models.transformer import Transformer
from megalm.runs.folder import run_folder_of
from megalm.runs.load import TrainedModel, load_full_model


def load(run: str | Path, overrides: Sequence[str] = ()) -> LoadedModel:
    """The model of a run, whole and in this process, whatever layout trained it.

    Args:
        run: folder of the run or its name in ``runs/``: its newest complete checkpoint is taken; or one of its
            checkpoints, ``runs/NAME/checkpoints/step-00000200``.
        overrides: changes to the run's config, such as ``"launch.device=cpu"`` or ``"engine.dtype=fp32"``.

    Raises:
        ConfigError: the folder is no run, or an override is wrong.
        CheckpointError: there is no complete checkpoint, or it is damaged.
        DataError: the run's tokenizer is missing or damaged.
    """
    folder = run_folder_of(run)
    if (folder / COMPLETE_FILE).is_file():
        of_run = folder.resolve().parent.parent  # runs/NAME/checkpoints/step-…
        return LoadedModel(load_full_model(of_run, [*overrides, f"checkpoint.resume={folder.resolve()}"]))
    return LoadedModel(load_full_model(folder, overrides))


@dataclass(frozen=True)
class LoadedModel:
    """A trained model. ``model``, ``tokenizer`` and ``config`` are megalm's own objects, for whoever needs more."""

    _trained: TrainedModel

    @property
    def model(self) -> Transformer:
        """A ``torch.nn.Module``: token ids [B, S] ▶ logits [B, S, V]; S is at most ``model.sequence_length``."""
        return self._trained.model

    @property
    def tokenizer(self) -> Tokenizer:
        """``encode(text)`` ▶ ids, ``decode(ids)`` ▶ text."""
        return self._trained.tokenizer

    @property
    def config(self) -> Config:
        """Of the run."""
        return self._trained.config

    @property
    def checkpoint(self) -> Path:
        """The folder that the weights are from."""
        return self._trained.checkpoint

    @torch.inference_mode()
    def logits(self, text: str) -> Tensor:
        """Logits of every token of a text, after each of which the model says what comes next.

        The tokens are those of :meth:`tokens`.

        Returns:
            [S, V] fp32, on the CPU.

        Raises:
            ConfigError: the text has no token, or more than ``model.sequence_length``.
            DataError: the model has no embedding of one of them.
        """
        tokens, longest = self.tokens(text), self.config.model.sequence_length
        if not 0 < len(tokens) <= longest:
            raise ConfigError(f"a text of {len(tokens)} tokens: the model takes 1 to {longest} (model.sequence_length)")
        return self._logits(tokens)

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, after the token that begins a document where the run's documents have one."""
        return self.tokenizer.encode_prompt(text) if text else []

    @torch.inference_mode()
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
        total = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(tokens) - 1, length):
            piece = tokens[start : start + length + 1]
            logits = self._logits(piece[:-1])
            total += F.cross_entropy(logits, torch.tensor(piece[1:]), reduction="sum").double()
        return float(total) / (len(tokens) - 1)

    def perplexity(self, text: str) -> float:
        """``exp`` of :meth:`loss`."""
        return math.exp(self.loss(text))

    def generate(
        self, prompt: str, *, max_new_tokens: int = 120, temperature: float = 0.8, top_k: int = 40, seed: int = 1234
    ) -> str:
        """The text that follows a prompt, without the prompt; the arguments are those of ``megalm generate``.

        Raises:
            ConfigError: the model is an encoder, or an argument is out of its range.
        """
        if not self.config.model.causal:
            raise ConfigError("model.causal=false: an encoder recovers masked tokens, it continues no text")
        sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
        return continue_text(self._trained, prompt, max_new_tokens=max_new_tokens, sampling=sampling)

    def _logits(self, tokens: list[int]) -> Tensor:
        self._trained.check_tokens(max(tokens), "the text")
        ids = torch.tensor([tokens], device=self._trained.device)
        return self.model(ids)[0].float().cpu()
