"""Continuing a prompt with a language model. Shapes: B batch (1), S sequence, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import torch
from torch import Tensor

from megalm.errors import ConfigError
from megalm.generate.sampling import Sampling, next_token


@torch.inference_mode()
def generate_tokens(
    model: Callable[[Tensor], Tensor],
    prompt: Sequence[int],
    *,
    sequence_length: int,
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Container[int] = (),
    device: torch.device | str = "cpu",
) -> list[int]:
    """The tokens that follow a prompt, up to ``max_new_tokens`` or one that ends the text, which is not among them.

    The model sees the last ``sequence_length`` tokens, at positions that start from zero, as in training. Every token
    recomputes that window: there is no key-value cache, since a window that slides would invalidate it at each step.

    Args:
        model: token ids [1, S] ▶ logits [1, S, V].
        prompt: token ids, at least one.
        sequence_length: longest input of the model.
        max_new_tokens: most tokens to generate.
        sampling: how a token is chosen.
        stop_ids: tokens that end the text, such as the end of a document or of a turn; empty: it never ends early.
        device: where the model computes.

    Raises:
        ConfigError: an empty prompt, or a negative ``max_new_tokens``.
    """
    if not prompt:
        raise ConfigError("prompt: it has no tokens; at least one")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens}: not a number of tokens; 0 or above")
    generator = sampling.generator()
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        window = torch.tensor([tokens[-sequence_length:]], dtype=torch.int64, device=device)  # [1, S]
        token = next_token(model(window)[0, -1], sampling, generator)
        if token in stop_ids:
            break
        tokens.append(token)
    return tokens[len(prompt) :]
