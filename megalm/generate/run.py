"""One prompt continued by a run, in this process or on ranks that are started for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megalm.generate.open import opened
from megalm.generate.prompts import Settings, requests_of, text_prompt
from megalm.generate.requests import Sampling
from megalm.runs.find import find_model


def run_generate(
    run: str | Path,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    seed: int,
    overrides: Sequence[str] = (),
) -> str:
    """The prompt and what the run's model makes of it; a function of its arguments and the weights.

    A text that reaches the model's longest sequence goes on from its later part.

    Args:
        run: folder of the run or of a checkpoint.
        prompt: any text; an empty one begins a new document. Marks of the run's chat template are marks in it.
        max_new_tokens: most tokens to add; fewer when the model ends the text.
        temperature: 0 always takes the likeliest token.
        top_k: draw from this many of the likeliest tokens; 0: from all.
        seed: of the draws.
        overrides: ``field=value`` changes to the run's config, such as ``parallel.tp=2``.

    Raises:
        ConfigError, CheckpointError, DataError: see :func:`megalm.runs.find.find_model`.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, seed=seed)
    settings = Settings(max_new_tokens=max_new_tokens, sampling=sampling, slides=True)
    found = find_model(run, overrides)
    requests = requests_of(found, [text_prompt(found.tokenizer, prompt)], settings)
    with opened(found, overrides, batch_size=1) as model:
        return prompt + model.generate(requests)[0][0].text
