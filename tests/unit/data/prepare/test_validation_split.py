"""Which documents validate: a share of the corpus, a corpus of their own, or none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megalm.config.schema import Data
from megalm.data.prepare.corpora import CorpusOptions
from megalm.data.prepare.executors import Workers, local_workers
from megalm.data.prepare.recipe import Recipe
from megalm.data.prepare.run import prepare
from megalm.data.shards.dataset import inspect_dataset, open_datasets, splits_of, with_validation
from megalm.data.shards.store import open_store
from megalm.errors import DataError

TEXTS = [f"document {i}: the quick brown fox number {i * 7919} jumps over it\n" for i in range(30)]


def write(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_text(text)
    return folder


def run(corpus: Path, out: Path, *, workers=None, split_on: str = "file", **changes):
    options = CorpusOptions((str(corpus),), split_on=split_on)
    recipe = Recipe(corpus="text", options=options, tokenizer_vocab=280, chunk_tokens=32)
    return prepare(
        Recipe(**{**recipe.__dict__, **changes}),
        out,
        workers=workers or Workers(None, 1),
        overwrite=False,
        progress=lambda *_: None,
        command="a test",
    )


def test_no_validation_where_none_is_wanted(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c", TEXTS)
    summary = run(corpus, tmp_path / "d", val_fraction=0.0)
    assert summary.documents == summary.splits["train"].documents == 30
    assert set(summary.splits) == {"train"}
    assert not (tmp_path / "d" / "val").exists()
    info = inspect_dataset(tmp_path / "d")
    assert (info.val_tokens, info.train_tokens) == (0, summary.tokens)
    assert with_validation(open_datasets(Data(path=(str(tmp_path / "d"),)))) == ()


def test_none_behind_a_command_either(tmp_path: Path) -> None:
    run(write(tmp_path / "c", TEXTS), tmp_path / "d", val_fraction=0.0)
    store = open_store(f"pipe:cat {tmp_path / 'd'}/{{file}}")
    assert splits_of(store) == ("train",)
    assert inspect_dataset(store).val_tokens == 0


def test_a_lost_validation_split_is_not_taken_for_none(tmp_path: Path) -> None:
    run(write(tmp_path / "c", TEXTS), tmp_path / "d", val_fraction=0.3)
    shutil.rmtree(tmp_path / "d" / "val")
    assert splits_of(open_store(tmp_path / "d")) == ("train", "val")
    with pytest.raises(DataError, match="val"):
        inspect_dataset(tmp_path / "d")


def test_a_validation_corpus_of_its_own_is_counted_apart(tmp_path: Path) -> None:
    train, val = write(tmp_path / "c", [*TEXTS, " "]), write(tmp_path / "v", ["held back\n", "held back too\n", "\n"])
    (val / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for workers in (1, 2):
        with local_workers(workers) as pool:
            settings = {"val_fraction": 0.0, "val_inputs": (str(val),), "workers": pool}
            summary = run(train, tmp_path / f"d{workers}", **settings)
    own = summary.validation
    assert (summary.documents, own.documents) == (30, 2)
    assert (summary.removed, own.removed) == ({"empty": 1}, {"empty": 1})
    assert (summary.files, own.files, own.files_left_out.total()) == (31, 3, 1)
    assert (summary.splits["train"].tokens, summary.splits["val"].tokens) == (summary.tokens, own.tokens)
    card = (tmp_path / "d1" / "data_card.md").read_text()
    assert f"# Validation corpus\n\nOf its own: {val}.\n" in card
    assert "| PNG image | 1 | 8 |" in card
    contents = json.loads((tmp_path / "d1" / "data_card.json").read_text())
    assert contents["validation_corpus"]["documents"] == 2
    for split in ("train", "val"):
        same = [(tmp_path / f"d{n}" / split / "index.json").read_bytes() for n in (1, 2)]
        assert same[0] == same[1]


def test_texts_on_both_sides_are_said_and_removed_from_training_if_asked(tmp_path: Path) -> None:
    train, val = (
        write(tmp_path / "c", [*TEXTS, TEXTS[3]]),
        write(tmp_path / "v", [TEXTS[3], TEXTS[4], TEXTS[4], "held"]),
    )
    settings = {"val_fraction": 0.0, "val_inputs": (str(val),)}
    kept = run(train, tmp_path / "kept", **settings)
    assert kept.notes == {"also in validation (kept; --dedup exact removes them)": 3}
    assert (kept.documents, kept.validation.documents) == (31, 4)
    removed = run(train, tmp_path / "removed", exact_duplicates=True, **settings)
    assert removed.removed == {"exact duplicate of a validation document": 3}
    assert removed.validation.removed == {"exact duplicate": 1}
    assert (removed.documents, removed.validation.documents) == (28, 3)


def test_a_validation_corpus_without_text_or_that_is_not_there(tmp_path: Path) -> None:
    train, val = write(tmp_path / "c", TEXTS), write(tmp_path / "v", [" "])
    with pytest.raises(DataError, match=r"no document is left \(1 empty\); give other --val-input"):
        run(train, tmp_path / "d", val_fraction=0.0, val_inputs=(str(val),))
    with pytest.raises(DataError, match="--val-input /nowhere: no such file"):
        run(train, tmp_path / "d", val_fraction=0.0, val_inputs=("/nowhere",))


@pytest.mark.parametrize(
    ("text", "split_on", "advice"),
    [
        ("A paragraph.\nIts second line.\n\n" * 40, "file", "--split-on blank-line makes 40 or more documents"),
        ("A line.\n" * 40, "file", "--split-on line makes 40 or more documents"),
        ("Three.\n" * 3, "file", "--split-on line makes 3 documents"),
        ("A line.\n" * 40, "blank-line", "--split-on line makes 40 or more documents"),
        ("All on one line.", "file", "more documents would fill it; --val-fraction 0 trains on all of them"),
        ("All on one line.", "line", "more documents would fill it; --val-fraction 0 trains on all of them"),
    ],
)
def test_a_corpus_of_one_document_says_what_would_help(text: str, split_on: str, advice: str, tmp_path: Path) -> None:
    corpus = write(tmp_path / "c", [text])
    with pytest.raises(DataError, match=f"the only document does not fall into val; {advice}") as raised:
        run(corpus, tmp_path / "d", val_fraction=0.001, split_on=split_on)
    assert "smaller" not in str(raised.value)
    assert "--val-fraction 0" in str(raised.value)


def test_a_split_that_makes_no_more_documents_is_not_offered(tmp_path: Path) -> None:
    corpus = write(tmp_path / "c", [f"Number {number} on one line." for number in range(12)])
    with pytest.raises(DataError, match="none of the 12 documents falls into val; a larger fraction or more") as raised:
        run(corpus, tmp_path / "d", val_fraction=0.0001)
    assert "--split-on" not in str(raised.value)
