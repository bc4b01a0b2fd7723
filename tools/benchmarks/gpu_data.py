"""A prepared dataset that is always at hand: megalm's own source. What the tokens are does not change a step's time."""

from __future__ import annotations

import tempfile
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "megalm"
CHUNK_TOKENS = 16384
"""Divided by every sequence length that a bench trains with."""


def prepare_own_source(out: Path) -> Path:
    """Prepare megalm's source with a tokenizer of 300 words; returns ``out``."""
    from megalm.data.prepare.corpora import CorpusOptions
    from megalm.data.prepare.executors import Workers
    from megalm.data.prepare.recipe import Recipe
    from megalm.data.prepare.run import prepare

    with tempfile.TemporaryDirectory(prefix="megalm-source-") as name:
        texts = Path(name)
        source = "".join(path.read_text(encoding="utf-8") for path in sorted(SOURCE.rglob("*.py")))
        for number, part in enumerate(source.split("\n\n\n")):
            (texts / f"{number:05d}.py").write_text(part, encoding="utf-8")
        recipe = Recipe(
            corpus="text",
            options=CorpusOptions((str(texts),)),
            tokenizer_vocab=300,
            val_fraction=0.05,
            chunk_tokens=CHUNK_TOKENS,
        )
        prepare(recipe, out, workers=Workers(None, 1), overwrite=False, progress=lambda *_: None, command="the bench")
    return out
