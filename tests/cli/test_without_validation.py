"""A dataset without validation documents: training says what to set, trains, and evaluation says why it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runs import TINY, run

from megalm.cli.main import main
from megalm.data.prepare.corpora import CorpusOptions
from megalm.data.prepare.executors import Workers
from megalm.data.prepare.recipe import Recipe
from megalm.data.prepare.run import prepare

ONE = ["parallel=single", "launch.ranks=1", "train.steps=2", "run.name=a", "checkpoint.every=2"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    recipe = Recipe(
        corpus="text",
        options=CorpusOptions((str(folder),)),
        tokenizer_vocab=300,
        val_fraction=0.0,
        chunk_tokens=256,
    )
    prepare(
        recipe,
        tmp_path / "data",
        workers=Workers(None, 1),
        overwrite=False,
        progress=lambda *_: None,
        command="a test",
    )
    return tmp_path / "data"


def test_it_trains_with_validation_off_and_says_so_otherwise(data: Path, tmp_path: Path, capsys) -> None:
    given = [*ONE, f"data.path={data}", f"run.dir={tmp_path}"]
    assert main(["train", *TINY, *given, "train.validate_every=1"]) == 2
    expected = f"train.validate_every=1: {data} was prepared without validation documents; train.validate_every=0"
    assert expected in capsys.readouterr().err
    (tmp_path / "a").symlink_to(tmp_path / "disk" / "a")  # a run folder on another disk, where nothing is yet
    code, output = run(given)
    assert code == 0, output
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "disk" / "a" / "metrics.jsonl").exists()
    assert f"{data}: prepared without validation documents, so this run is not validated" in output
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2]
    assert not [row for row in rows if "val_loss" in row]
    assert main(["evaluate", str(tmp_path / "a")]) == 3
    expected = f"data.path={data}: was prepared without validation documents; data.path=DIR evaluates on another"
    assert expected in capsys.readouterr().err
