"""Fixtures that several kinds of tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def twenty_local_steps(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[float, float]]:
    """Losses and gradient norms of ``TWENTY_STEPS`` on ranks that megalm started itself."""
    from cli_runs import TWENTY_STEPS, losses_of, run

    folder = tmp_path_factory.mktemp("local")
    code, output = run([*TWENTY_STEPS, f"data.path={tiny_dataset}", f"run.dir={folder}", "run.name=local"])
    assert code == 0, output
    return losses_of(folder / "local")


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset of real text that is always at hand: megalm's own sources, 300 tokens of vocabulary."""
    from megalm.data.prepare import Recipe, prepare

    out = tmp_path_factory.mktemp("data") / "tiny"
    recipe = Recipe(
        corpus="text",
        inputs=(str(REPOSITORY / "megalm" / "core"),),
        tokenizer_vocab=300,
        val_fraction=0.3,
        chunk_tokens=256,
    )
    prepare(recipe, out, workers=1, overwrite=False, progress=lambda *_: None)
    return out
