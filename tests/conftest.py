"""Fixtures that several kinds of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of real text that is always at hand: megalm's own sources, 300 tokens of vocabulary."""
    from megalm.data.prepare import Recipe, prepare

    out = tmp_path_factory.mktemp("data") / "tiny"
    recipe = Recipe(
        corpus="text",
        inputs=(str(REPOSITORY / "megalm" / "core"), str(REPOSITORY / "megalm" / "data")),
        tokenizer_vocab=300,
        val_fraction=0.2,
        chunk_tokens=256,
    )
    prepare(recipe, out, workers=1, overwrite=False, progress=lambda *_: None)
    return out
