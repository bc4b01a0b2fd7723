"""What goes wrong while a corpus is prepared: dying workers, interrupts, unreadable files, folders of other things."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megalm.data import prepare as prepare_module
from megalm.data.corpora import CORPORA
from megalm.data.dataset import inspect_dataset
from megalm.data.prepare import Counts, Recipe, documents_of, prepare
from megalm.errors import DataError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(f"document {i} of thirty, each with its own words {i * 7919}\n")
    return folder


def run(corpus: Path, out: Path, *, overwrite: bool = False, workers: int = 1, progress=lambda *_: None, **changes):
    recipe = Recipe(corpus="text", inputs=(str(corpus),), tokenizer_vocab=280, val_fraction=0.3, chunk_tokens=32)
    return prepare(
        Recipe(**{**recipe.__dict__, **changes}), out, workers=workers, overwrite=overwrite, progress=progress
    )


def test_an_interrupt_leaves_nothing_behind(corpus: Path, tmp_path: Path) -> None:
    def interrupt(phase: str, *_) -> None:
        if phase == "tokenising":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path / "d", progress=interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_an_interrupted_overwrite_keeps_the_old_dataset(corpus: Path, tmp_path: Path) -> None:
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "d"
    run(corpus, out)
    before = inspect_dataset(out)
    with pytest.raises(KeyboardInterrupt):
        run(corpus, out, overwrite=True, progress=interrupt, chunk_tokens=16)
    assert inspect_dataset(out) == before


def test_overwrite_never_deletes_a_folder_that_is_no_dataset(corpus: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="is no prepared dataset, so --overwrite leaves it alone"):
        run(corpus, home, overwrite=True)
    assert (home / "thesis.tex").read_text() == "years of work"


def _die(_: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.timeout(60)
def test_a_killed_worker_is_an_error_and_not_a_hang(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(prepare_module, "_start_worker", _die)
    with pytest.raises(DataError, match="--workers 2: a worker process was killed"):
        run(corpus, tmp_path / "d", workers=2)
    assert not (tmp_path / "d").exists()


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "blank"
    folder.mkdir()
    (folder / "a").write_text("\n")
    with pytest.raises(DataError, match="no document with any text in it"):
        run(folder, tmp_path / "d")


def test_a_file_that_cannot_be_read_is_named(corpus: Path) -> None:
    source = CORPORA["text"]((str(corpus),))
    (corpus / "07.txt").unlink()
    with pytest.raises(DataError, match=r"07\.txt: cannot be read: No such file"):
        list(source.documents())


def test_hidden_files_and_folders_are_left_out(corpus: Path) -> None:
    (corpus / ".git").mkdir()
    (corpus / ".git" / "config").write_text("[core]")
    (corpus / ".hidden").write_text("x")
    assert len(CORPORA["text"]((str(corpus),)).files) == 30


def test_a_document_with_a_real_replacement_character_may_still_be_undecodable(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("\ufffd and ".encode() + b"\xff")
    counts = Counts()
    assert list(documents_of(CORPORA["text"]((str(tmp_path),)), counts)) == ["\ufffd and \ufffd"]
    assert counts.undecodable == 1
