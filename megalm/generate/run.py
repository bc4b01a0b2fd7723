"""``megalm generate``: a run continues a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megalm.errors import ConfigError
from megalm.generate.generation import generate_tokens
from megalm.generate.sampling import Sampling
from megalm.runs.load import TrainedModel, load_full_model


def run_generate(
    run_dir: str | Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    overrides: Sequence[str] = (),
) -> str:
    """The prompt and what the run's model makes of it; a function of its arguments and the weights.

    Args:
        run_dir: folder of the run.
        prompt: any text; an empty one begins a new document. Marks of the run's chat template are marks in it.
        max_new_tokens: most tokens to add; fewer when the model ends the text.
        temperature: 0 always takes the likeliest token.
        top_k: draw from this many of the likeliest tokens; 0: from all.
        seed: of the draws.
        overrides: ``field=value`` changes to the run's config.

    Raises:
        ConfigError, CheckpointError, DataError: see :func:`megalm.runs.load.load_full_model`.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
    trained = load_full_model(run_dir, overrides)
    if not trained.config.model.causal:
        raise ConfigError(f"{run_dir}: model.causal=false: an encoder recovers masked tokens, it continues no text")
    return prompt + continue_text(trained, prompt, max_new_tokens=max_new_tokens, sampling=sampling)


def continue_text(trained: TrainedModel, prompt: str, *, max_new_tokens: int, sampling: Sampling) -> str:
    """The text that follows a prompt, without the prompt."""
    tokenizer = trained.tokenizer
    tokens = tokenizer.encode_prompt(prompt)
    trained.check_tokens(max(tokens), "--prompt")
    new_tokens = generate_tokens(
        # A model may have more rows than the tokenizer has words; those are no text.
        lambda window: trained.model(window)[..., : tokenizer.vocab_size],
        tokens,
        sequence_length=trained.config.model.sequence_length,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop_ids=tokenizer.stop_ids,
        device=trained.device,
    )
    # Bytes of one character may lie on both sides of the cut, so the new tokens are not decoded alone.
    return tokenizer.decode([*tokens, *new_tokens])[len(tokenizer.decode(tokens)) :]
