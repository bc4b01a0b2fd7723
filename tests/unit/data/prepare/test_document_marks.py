"""What begins and ends documents is one decision: in prepared data, their card and index, and all that reads them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from megalm.config.schema import Data
from megalm.data.prepare.corpora import CorpusOptions
from megalm.data.prepare.executors import local_workers
from megalm.data.prepare.recipe import Recipe
from megalm.data.prepare.run import RECIPE_FILE, prepare
from megalm.data.shards.dataset import inspect_datasets, open_datasets, tokenizer_of
from megalm.data.shards.index import read_index
from megalm.data.shards.read import TokenShards
from megalm.data.shards.store import open_store
from megalm.data.stream.sequences import Corpora
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.data.tokenization.training import train_byte_level_bpe, train_wordpiece
from megalm.errors import DataError
from tests.web_server import serve

TEXTS = [f"<p>document {i}</p> of many words, which ends in HTML </s> and goes on" for i in range(60)]


def make_tokenizer(folder: Path, settings: dict | None = None) -> Path:
    """A tokenizer of which ``</s>`` is an ordinary word, ``<eos>`` ends a text and ``<bos>`` begins one."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens(["<p>", "</p>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<bos>", "eos_token": "<eos>"} if settings is None else settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(TEXTS):
        (folder / f"{number:03d}.txt").write_text(text)
    return folder


def run(corpus: Path, out: Path, tokenizer: Path | None, workers: int = 1, **changes) -> Path:
    recipe = Recipe(
        corpus="text",
        options=CorpusOptions((str(corpus),)),
        tokenizer=None if tokenizer is None else str(tokenizer),
        val_fraction=0.3,
        chunk_tokens=64,
    )
    with local_workers(workers) as pool:
        prepare(
            replace(recipe, **changes), out, workers=pool, overwrite=False, progress=lambda *_: None, command="a test"
        )
    return out


def tokens_of(out: Path) -> list[int]:
    found: list[int] = []
    for split in ("train", "val"):
        shards = TokenShards(open_store(out / split), 1)
        rows = np.empty((len(shards), 2), dtype=np.int64)
        shards.read(np.arange(len(shards)), rows, None)
        found += [int(rows[0, 0]), *rows[:, 1].tolist()]
    return found


def of_dataset(out: Path | str) -> Tokenizer:
    return tokenizer_of(open_datasets(Data(path=(str(out),))))


@pytest.mark.parametrize("workers", [1, 2])
def test_documents_begin_and_end_as_the_tokenizers_files_say(corpus: Path, tmp_path: Path, workers: int) -> None:
    given = make_tokenizer(tmp_path / "given")
    out = run(corpus, tmp_path / "data", given, workers)
    tokens, tokenizer = tokens_of(out), Tokenizer.load(given)
    assert tokens.count(tokenizer.role_id("bos")) == tokens.count(tokenizer.role_id("eos")) == len(TEXTS)
    assert tokens[0] == tokenizer.role_id("bos") and tokens[-1] == tokenizer.role_id("eos")
    index = read_index(out / "train")
    assert (index.eos_id, index.document_start) == (1, ("<bos>",))
    assert of_dataset(out).roles == Tokenizer.load(out).roles == tokenizer.roles
    marks = "Each document begins with `<bos>` (as the tokenizer's own files say) and ends with `<eos>`."
    assert marks in (out / "data_card.md").read_text()
    record = json.loads((out / RECIPE_FILE).read_text())
    assert (record["document_start"], record["document_end"]) == (["<bos>"], "<eos>")


def test_a_start_may_be_left_out(corpus: Path, tmp_path: Path) -> None:
    given = make_tokenizer(tmp_path / "given")
    out = run(corpus, tmp_path / "data", given, add_bos=False)
    assert 2 not in tokens_of(out)
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    of_dataset(out).save(run_folder)
    for place in (out, run_folder):
        tokenizer = Tokenizer.load(place)
        assert (tokenizer.before_ids, tokenizer.roles.bos, tokenizer.roles.end) == ((), "<bos>", "<eos>")
        assert tokenizer.sha256 == Tokenizer.load(given).sha256
    marks = "Each document begins with its text (--no-add-bos) and ends with `<eos>`."
    assert marks in (out / "data_card.md").read_text()
    with pytest.raises(DataError, match="with other settings"):
        run(corpus, out, given)


def test_a_start_may_be_asked_for(corpus: Path, tmp_path: Path) -> None:
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": False}
    given = make_tokenizer(tmp_path / "given", settings)
    out = run(corpus, tmp_path / "data", given, add_bos=True)
    assert tokens_of(out).count(2) == len(TEXTS)
    assert of_dataset(out).roles.add_bos and Tokenizer.load(out).roles.add_bos
    assert "(--add-bos)" in (out / "data_card.md").read_text()
    with pytest.raises(DataError, match="--add-bos: it has no token that begins a text"):
        run(corpus, tmp_path / "none", None, tokenizer_vocab=300, add_bos=True)


def test_what_names_the_end_is_kept(corpus: Path, tmp_path: Path) -> None:
    given = make_tokenizer(tmp_path / "given")
    out = run(corpus, tmp_path / "data", given, eos="<pad>")
    assert tokens_of(out).count(0) == len(TEXTS)
    assert of_dataset(out).eos_id == Tokenizer.load(out).eos_id == 0
    (given / "tokenizer_config.json").unlink()
    (given / "config.json").write_text('{"eos_token_id": [1]}')
    out = run(corpus, tmp_path / "by id", given)
    assert tokens_of(out).count(1) == len(TEXTS)
    assert Tokenizer.load(out).roles.eos == "<eos>"
    assert not (out / "config.json").exists()


def test_data_of_other_marks_are_not_blended(corpus: Path, tmp_path: Path) -> None:
    given = make_tokenizer(tmp_path / "given")
    with_bos = run(corpus, tmp_path / "with", given)
    for name, changes in (("without", {"add_bos": False}), ("end", {"eos": "<pad>"})):
        other = run(corpus, tmp_path / name, given, **changes)
        with pytest.raises(DataError, match=r"begin or end with different tokens: .*no-add-bos, and --eos"):
            Corpora.open([open_store(folder / "train") for folder in (with_bos, other)], 16)
        with pytest.raises(DataError, match="begin or end with different tokens"):
            inspect_datasets(Data(path=(str(with_bos), str(other))))


def test_a_dataset_of_before_is_read_as_it_was_made(corpus: Path, tmp_path: Path) -> None:
    """An index that says nothing of a start: the tokenizer's own files would put one, and the data have none."""
    given = make_tokenizer(tmp_path / "given")
    out = run(corpus, tmp_path / "data", given, add_bos=False)
    assert "document_start" not in json.loads((out / "train" / "index.json").read_text())
    (out / "tokenizer_config.json").unlink()
    of_before = Tokenizer.load(out)
    assert (of_before.before_ids, of_before.roles.end) == ((2,), "<eos>")
    assert of_dataset(out).before_ids == ()


@pytest.mark.parametrize("fault", ["", "403", "page"])
def test_data_elsewhere_have_their_roles_or_those_of_the_index(fault: str, corpus: Path, tmp_path: Path) -> None:
    """Servers say in many ways that a file is not there, and older datasets have the tokenizer alone."""
    out = run(corpus, tmp_path / "data", make_tokenizer(tmp_path / "given"), add_bos=False)
    with serve(out) as server:
        place = server.address
        if not fault:
            assert of_dataset(place).roles == Tokenizer.load(out).roles
            assert all(not path.endswith("/config.json") for _, path, _ in server.requests)
        (out / "tokenizer_config.json").unlink()
        if fault == "page":
            place = f"pipe:cat {out}/{{file}} 2>/dev/null || echo '<html>404 {{{{ not here }}}}</html>'"
        elif fault:
            server.faults = ["", "", fault]  # tokenizer.json, the index, and what is asked for beside the tokenizer
        tokenizer = of_dataset(place)
    assert (tokenizer.before_ids, tokenizer.roles.eos, tokenizer.roles.chat_template) == ((), "<eos>", None)


@pytest.mark.parametrize("kind", ["bpe", "wordpiece"])
def test_the_usual_marks_leave_the_index_as_it_was(kind: str, corpus: Path, tmp_path: Path) -> None:
    tokenizer = train_wordpiece(TEXTS, 160) if kind == "wordpiece" else train_byte_level_bpe(TEXTS, 300)
    (tmp_path / "t").mkdir()
    tokenizer.save(tmp_path / "t")
    out = run(corpus, tmp_path / "data", tmp_path / "t")
    assert "document_start" not in json.loads((out / "train" / "index.json").read_text())
    assert of_dataset(out).before_ids == tokenizer.before_ids == ((2,) if kind == "wordpiece" else ())
    assert ("begins with `[CLS]`" in (out / "data_card.md").read_text()) == (kind == "wordpiece")


@pytest.mark.parametrize("start", ["<bos>", [1], {"a": 1}])
def test_an_index_with_no_list_of_tokens_is_damaged(start: object, corpus: Path, tmp_path: Path) -> None:
    from megalm.data.shards.index import signed

    out = run(corpus, tmp_path / "data", make_tokenizer(tmp_path / "given"))
    path = out / "train" / "index.json"
    path.write_text(json.dumps(signed({**json.loads(path.read_text()), "document_start": start})))
    with pytest.raises(DataError, match="incomplete or damaged"):
        read_index(out / "train")
