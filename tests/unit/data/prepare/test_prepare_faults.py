"""What goes wrong while a corpus is prepared: dying workers, interrupts, unreadable files, folders of other things."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from megalm.data.prepare.corpora import CorpusOptions
from megalm.data.prepare.executors import Workers, local_workers
from megalm.data.prepare.recipe import Recipe
from megalm.data.prepare.run import prepare
from megalm.data.shards.dataset import inspect_dataset
from megalm.errors import ConfigError, DataError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02d}.txt").write_text(f"document {i} of thirty, each with its own words {i * 7919}\n")
    return folder


def run(corpus: Path, out: Path, *, overwrite: bool = False, workers=None, progress=lambda *_: None, **changes):
    options = CorpusOptions((str(corpus),))
    recipe = Recipe(corpus="text", options=options, tokenizer_vocab=280, val_fraction=0.3, chunk_tokens=32)
    return prepare(
        Recipe(**{**recipe.__dict__, **changes}),
        out,
        workers=workers or Workers(None, 1),
        overwrite=overwrite,
        progress=progress,
        command="a test",
    )


def test_an_interrupt_leaves_no_dataset(corpus: Path, tmp_path: Path) -> None:
    def interrupt(phase: str, *_) -> None:
        if phase == "tokenising":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path / "d", progress=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".d.partial", "corpus"]


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


def _die(_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.timeout(60)
def test_a_killed_worker_is_an_error_and_not_a_hang() -> None:
    with local_workers(2) as workers, pytest.raises(DataError, match="--workers 2: a worker process was killed"):
        list(workers.map(_die, range(5)))


def test_results_come_in_order_and_few_items_are_taken_ahead() -> None:
    taken: list[int] = []

    def items():
        for i in range(60):
            taken.append(i)
            yield i

    with local_workers(2) as workers:
        for number, result in enumerate(workers.map(str, items())):
            assert result == str(number)
            assert len(taken) <= number + 9


def test_a_corpus_without_text_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "blank"
    folder.mkdir()
    (folder / "a").write_text("\n")
    with pytest.raises(DataError, match=r"no document is left \(1 empty\)"):
        run(folder, tmp_path / "d")


@pytest.mark.parametrize(
    ("name", "record", "end"),
    [
        ("jsonl", {"body": "words"}, r"\(2 no field text, such as .*a\.jsonl@0\); --text-field names the field .*text"),
        ("sft", {"q": "2+2", "a": "4"}, r"\(2 no field prompt, such as .*a\.jsonl@0\); --prompt and --completion name"),
        ("jsonl", {"text": ""}, r"\(2 empty\); give other --input or fewer filters"),
    ],
)
def test_records_with_other_fields_are_told_from_filters(name: str, record: dict, end: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(2 * (json.dumps(record) + "\n"))
    recipe = Recipe(name, CorpusOptions((str(path),)), tokenizer_vocab=280, chunk_tokens=32)
    with pytest.raises(DataError, match="no document is left " + end):
        prepare(recipe, tmp_path / "d", workers=Workers(None, 1), overwrite=False, progress=lambda *_: None, command="")


def test_a_file_that_vanishes_is_named(corpus: Path, tmp_path: Path) -> None:
    def vanish(phase: str, *_) -> None:
        (corpus / "07.txt").unlink(missing_ok=True)

    with pytest.raises(DataError, match=r"07\.txt: cannot be read: No such file"):
        run(corpus, tmp_path / "d", progress=vanish)


def test_one_preparation_at_a_time_writes_to_one_place(corpus: Path, tmp_path: Path) -> None:
    out, refused = tmp_path / "d", []

    def begin_another(*_) -> None:
        if not refused:
            with pytest.raises(ConfigError) as error:
                run(corpus, out)
            refused.append(str(error.value))

    run(corpus, out, progress=begin_another)
    assert refused[0].startswith(f"--out {out}: in use by another process: host ")
    assert f"pid {os.getpid()}, " in refused[0] and refused[0].endswith("; wait for it to end, or give another --out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "d"]


def test_a_preparation_whose_place_is_anothers_by_now_stops(corpus: Path, tmp_path: Path) -> None:
    def take_over(*_) -> None:
        shutil.rmtree(tmp_path / ".d.owner", ignore_errors=True)

    with pytest.raises(ConfigError, match=r"its lock .*was removed"):
        run(corpus, tmp_path / "d", progress=take_over)
    assert not (tmp_path / "d").exists()
