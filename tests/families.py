"""Architectures that several tests build, at whatever size they have."""

from __future__ import annotations

from dataclasses import replace

from megalm.config.schema import Model


def bert_of(model: Model) -> Model:
    """BERT's choices: bidirectional, post-norm, token types, the head for masked words."""
    return replace(
        model,
        causal=False,
        residual="post_norm",
        token_types=2,
        embedding_norm=True,
        activation="gelu_erf",
        head="masked_lm",
    )
