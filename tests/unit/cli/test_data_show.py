"""``megalm data show`` of a dataset and of a run, called in this process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.cli.main import main
from megalm.data.prepare.corpora import CorpusOptions
from megalm.data.prepare.executors import Workers
from megalm.data.prepare.recipe import Recipe
from megalm.data.prepare.run import prepare
from megalm.data.shards.dataset import open_store
from megalm.data.shards.documents import documents_of_split, tokens_of_document
from megalm.data.shards.index import read_index
from megalm.data.shards.read import ChunkReader
from megalm.data.tokenization.tokenizer import Tokenizer


def show(capsys: pytest.CaptureFixture, *arguments: str | Path, code: int = 0) -> str:
    assert main(["data", "show", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_a_dataset_is_shown_as_text(tiny_dataset: Path, capsys: pytest.CaptureFixture) -> None:
    shown = show(capsys, tiny_dataset, "--limit", 3)
    assert shown.startswith(f"{tiny_dataset} train: ")
    assert shown.count(" tokens)\n") == 3
    assert "--limit N shows others" in shown
    assert "val: " in show(capsys, tiny_dataset, "--split", "val")


def test_every_document_reads_back_as_it_was_prepared(tiny_dataset: Path) -> None:
    store = open_store(tiny_dataset).below("train")
    index = read_index(store)
    chunks, tokenizer = ChunkReader(store, index), Tokenizer.load(tiny_dataset / "tokenizer.json")
    crossing = 0
    for document in documents_of_split(store, index):
        tokens, learnt = tokens_of_document(chunks, document, 10**9)
        assert len(tokens) == document.tokens and all(learnt)
        crossing += document.start // index.chunk_tokens != (document.end - 1) // index.chunk_tokens
        text = Path(document.name).read_text()
        assert tokenizer.decode(tokens[:-1]) == text
    assert crossing > 3, "documents lie on both sides of a chunk's end"


def test_documents_are_listed_and_found(tiny_dataset: Path, capsys: pytest.CaptureFixture) -> None:
    listed = show(capsys, tiny_dataset, "--documents").splitlines()[1:]
    rows = [json.loads(line) for line in show(capsys, tiny_dataset, "--documents", "--json").splitlines()]
    assert len(listed) == len(rows) > 5
    name = rows[3]["name"]
    part = Path(name).name.upper()
    found = [json.loads(line) for line in show(capsys, tiny_dataset, "--find", part, "--json").splitlines()]
    assert [row["name"] for row in found] == [name]
    assert Path(name).read_text().startswith(found[0]["text"][:20])


def test_what_is_learnt_of_a_pair_is_marked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"sum {n} ", "completion": f"is {n}"}) + "\n" for n in range(40)))
    recipe = Recipe(corpus="sft", options=CorpusOptions((str(file),)), tokenizer_vocab=300, chunk_tokens=64)
    out = tmp_path / "data"
    prepare(recipe, out, workers=Workers(None, 1), overwrite=False, progress=lambda *_: None, command="a test")
    shown = show(capsys, out)
    assert "the loss is on marked text alone" in shown
    assert "sum 4« is 4»" in shown


def test_mistakes_are_lines(tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert "this is an option for a run" in show(capsys, tiny_dataset, "--step", 3, code=2)
    assert "--limit 0: must be at least 1" in show(capsys, tiny_dataset, "--limit", 0, code=2)
    assert "none of the" in show(capsys, tiny_dataset, "--find", "no such thing", code=3)
    assert "no such folder" in show(capsys, tmp_path / "none", code=3)
    assert "is no prepared dataset" in show(capsys, tmp_path, code=3)


def test_of_a_run_it_says_what_a_step_read(short_runs: tuple[Path, Path], capsys: pytest.CaptureFixture) -> None:
    assert show(capsys, short_runs[0], "--step", 1).startswith("step 1: samples 0 to 7")
    assert "is a run; give a dataset" in show(capsys, short_runs[0], "--find", "x", code=2)
    assert "give either --step N or --document NAME" in show(capsys, short_runs[0], code=2)
