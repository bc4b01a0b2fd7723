"""Where a dataset appears: on the disk that was asked for, whole, and never among what it is made from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megalm.data import place
from megalm.data.prepare.corpora import CorpusOptions
from megalm.data.prepare.executors import Workers
from megalm.data.prepare.recipe import Recipe
from megalm.data.prepare.run import prepare
from megalm.data.shards.dataset import inspect_dataset
from megalm.errors import DataError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(f"document {i} of thirty, each with its own words {i * 7919}\n")
    return folder


def run(corpus: Path, out: Path | str, *, overwrite: bool = False, chunk_tokens: int = 32, inputs=None):
    options = CorpusOptions(tuple(map(str, inputs or [corpus])))
    recipe = Recipe(corpus="text", options=options, tokenizer_vocab=280, val_fraction=0.3, chunk_tokens=chunk_tokens)
    return prepare(
        recipe,
        Path(out),
        workers=Workers(None, 1),
        overwrite=overwrite,
        progress=lambda *_: None,
        command="a test",
    )


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_overwrite_through_a_link_replaces_what_it_leads_to_and_works_again(corpus: Path, tmp_path: Path) -> None:
    disk = tmp_path / "other_disk"
    disk.mkdir()
    out = tmp_path / "out"
    out.symlink_to(disk / "books")  # leads nowhere yet
    run(corpus, out)
    for chunk_tokens in (16, 64, 32):
        assert run(corpus, out, overwrite=True, chunk_tokens=chunk_tokens) is not None
        assert out.is_symlink()
        assert names(disk) == {"books"}
        assert inspect_dataset(disk / "books").chunk_tokens == chunk_tokens
    assert run(corpus, out) is None  # up to date


def test_an_empty_folder_is_no_other_dataset_and_stays_the_same_folder(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir(mode=0o2770)
    before = (out.stat().st_ino, out.stat().st_mode)
    assert run(corpus, out) is not None
    assert (out.stat().st_ino, out.stat().st_mode) == before
    assert not [name for name in names(out) if name.startswith(".")]
    inspect_dataset(out)
    assert names(tmp_path) == {"corpus", "out"}


@pytest.mark.parametrize("out", [".", "./", "../here", "../here/"])
def test_here_is_a_place_too(out: str, corpus: Path, tmp_path: Path, monkeypatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for chunk_tokens in (32, 16):
        run(corpus, out, overwrite=True, chunk_tokens=chunk_tokens)
        assert Path.cwd() == here  # it was not replaced under this process's feet
        assert inspect_dataset(here).chunk_tokens == chunk_tokens
        assert not [name for name in names(here) if name.startswith(".")]


def test_a_mounted_folder_is_filled_not_renamed(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "disk"
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(out))
    renamed: list[tuple[Path, Path]] = []
    rename = Path.rename

    def watched(self: Path, target: Path) -> Path:
        renamed.append((self, Path(target)))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watched)
    for chunk_tokens in (32, 16):
        run(corpus, out, overwrite=True, chunk_tokens=chunk_tokens)
        assert inspect_dataset(out).chunk_tokens == chunk_tokens
    assert renamed
    assert all(out in source.parents and out in target.parents for source, target in renamed)


def test_what_an_interrupted_swap_left_is_no_obstacle(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    rename = Path.rename

    def stop(self: Path, target: Path) -> Path:
        if self.name == "recipe.json":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        run(corpus, out)
    monkeypatch.setattr(Path, "rename", rename)
    assert run(corpus, out) is not None
    inspect_dataset(out)


@pytest.mark.parametrize(
    ("out", "inputs", "message"),
    [
        ("corpus", ["corpus"], "is also --input"),
        ("corpus/data", ["corpus"], "lies inside --input .*corpus, which would read it"),
        ("corpus/../corpus/data/", ["corpus"], "lies inside --input"),
        ("link/data", ["corpus"], "lies inside --input"),
        ("corpus", ["corpus/00.txt"], "lies inside it, and would be replaced"),
        ("corpus/deep/er", ["corpus/00.txt", "corpus"], "lies inside --input"),
        ("elsewhere", ["leads"], "--input leads into it"),
        ("corpus/00.txt", ["corpus"], "is a file"),
    ],
)
def test_out_and_input_lie_apart(out: str, inputs: list[str], message: str, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(corpus)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.txt").write_text("words")
    (tmp_path / "leads").mkdir()
    (tmp_path / "leads" / "there").symlink_to(tmp_path / "elsewhere")
    before = sorted(tmp_path.rglob("*"))
    for overwrite in (False, True):
        with pytest.raises(DataError, match=message):
            run(corpus, tmp_path / out, overwrite=overwrite, inputs=[tmp_path / name for name in inputs])
    assert sorted(tmp_path.rglob("*")) == before


def test_the_folder_around_is_no_place(corpus: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(DataError, match=r"--out \.\.: is a folder around the one that this command runs in"):
        run(corpus, "..")


def test_a_folder_below_one_that_may_not_be_written(tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    assert place.partial_folder(out) == out / ".mine.partial"
