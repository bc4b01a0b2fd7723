"""Fixtures that several kinds of tests share."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from hypothesis import settings

# For `make test-fast`: a tenth of the examples, where a test does not say how many it needs.
settings.register_profile("fast", max_examples=10)

REPOSITORY = Path(__file__).resolve().parent.parent


def pytest_collection_finish() -> None:
    """Thousands of tests and all libraries are in memory, and stay: no garbage collection looks at them again."""
    gc.collect()
    gc.freeze()


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
    """A prepared dataset of real text that is always at hand: megalm's own functions, 300 tokens of vocabulary.

    Many small documents, so that a twentieth of them is a validation split that is never empty and quickly run through.
    """
    from megalm.data.prepare.corpora import CorpusOptions
    from megalm.data.prepare.executors import Workers
    from megalm.data.prepare.recipe import Recipe
    from megalm.data.prepare.run import prepare

    folder = tmp_path_factory.mktemp("data")
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "megalm" / "core").rglob("*.py")))
    for number, part in enumerate(text.split("\n\n")):
        (folder / f"{number:04d}.py").write_text(part, encoding="utf-8")
    out = tmp_path_factory.mktemp("prepared") / "tiny"
    recipe = Recipe(
        corpus="text",
        options=CorpusOptions((str(folder),)),
        tokenizer_vocab=300,
        val_fraction=0.05,
        chunk_tokens=256,
    )
    prepare(recipe, out, workers=Workers(None, 1), overwrite=False, progress=lambda *_: None, command="a test")
    return out


@pytest.fixture(scope="session")
def short_runs(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs that ``megalm.train`` has trained: ``slow`` on one rank, ``fast``, at another rate, on two."""
    import megalm

    folder = tmp_path_factory.mktemp("runs")
    common = [
        "experiment=quickstart",
        f"data.path={tiny_dataset}",
        f"run.dir={folder}",
        "model.num_layers=2",
        "model.hidden_size=16",
        "model.num_heads=2",
        "model.sequence_length=32",
        "train.steps=4",
        "optim.warmup_tokens=0",
        "report.prompt=null",
        "logging.tensorboard=false",
        "logging.wandb=disabled",
        "engine.dtype=fp32",
    ]
    slow = megalm.train(megalm.compose([*common, "parallel=single", "run.name=slow"]))
    fast = megalm.train(megalm.compose([*common, "parallel=tp2", "run.name=fast", "optim.lr=0.01"]))
    return slow.folder, fast.folder
