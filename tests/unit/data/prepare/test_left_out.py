"""What readers leave out is counted in bounded memory, and alike for any number of workers."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megalm.data.document import LeftOut
from megalm.data.prepare.corpora import CorpusOptions
from megalm.data.prepare.executors import Workers
from megalm.data.prepare.left_out import LISTED, NAMES, OTHERS, LeftOutTotals
from megalm.data.prepare.recipe import Recipe
from megalm.data.prepare.run import prepare
from megalm.data.prepare.summary import Summary


def test_names_beyond_the_limit_are_counted_together_and_the_total_is_whole() -> None:
    totals = LeftOutTotals()
    for i in range(NAMES + 500):
        totals.add(f"document {i}", LeftOut({f"template: {i}": (1, 2), "table": (1, 1)}, kept_words=i, lost_words=3))
    assert len(totals.kinds) == NAMES + 1
    assert totals.kinds["table"] == (NAMES + 500, NAMES + 500)
    assert totals.kinds[OTHERS] == (501, 1002)
    assert totals.words == 3 * (NAMES + 500)
    assert totals.over == 3, "those that keep 0, 1 and 2 words of 3"
    assert [document[0] for document in totals.documents] == ["document 0", "document 1", "document 2"]


def test_blocks_counted_apart_give_what_they_give_together() -> None:
    documents = [(f"d{i}", LeftOut({f"k{i % 7}": (1, i)}, kept_words=5, lost_words=i)) for i in range(3 * LISTED)]
    together, merged = LeftOutTotals(), LeftOutTotals()
    for name, left_out in documents:
        together.add(name, left_out)
    for start in range(0, len(documents), 17):
        block = LeftOutTotals()
        for name, left_out in documents[start : start + 17]:
            block.add(name, left_out)
        merged.merge(LeftOutTotals.from_dict(json.loads(json.dumps(block.to_dict()))))
    assert merged == together
    assert len(merged.documents) == LISTED
    assert merged.documents[0] == ("d299", 5, 299, "k5")


def page(i: int) -> str:
    words = " ".join(f"word{i}n{j}" for j in range(20))
    return (
        f"<page><title>Page {i}</title><ns>0</ns><revision><text>{words}.&lt;ref&gt;a b&lt;/ref&gt;\n"
        f"{{|\n| cell {i}\n|}}\n"
        f"{{{{Box {i % 3}|one two|}}}}</text></revision></page>"
    )


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dump") / "dump.xml"
    list_page = (
        "<page><title>List | all</title><ns>0</ns><revision><text>Short.\n{|\n| a b c d e\n|}</text></revision></page>"
    )
    path.write_text(f"<mediawiki>{''.join(map(page, range(30)))}{list_page}</mediawiki>")
    return path


def run(dump: Path, out: Path, workers: Workers, monkeypatch: pytest.MonkeyPatch) -> Summary:
    monkeypatch.setattr("megalm.data.prepare.run._MIN_BLOCK_BYTES", 500)
    monkeypatch.setattr("megalm.data.prepare.run._MAX_BLOCK_BYTES", 500)
    recipe = Recipe("wikipedia", CorpusOptions((str(dump),)), tokenizer_vocab=300, val_fraction=0.2, chunk_tokens=64)
    summary = prepare(recipe, out, workers=workers, overwrite=False, progress=lambda *_: None, command="a test")
    assert summary is not None
    return summary


def test_the_card_tells_what_was_left_out_whoever_worked(
    dump: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run(dump, tmp_path / "one", Workers(None, 1), monkeypatch)
    with ThreadPoolExecutor(3) as pool:
        run(dump, tmp_path / "three", Workers(pool, 3), monkeypatch)
    for name in ("data_card.md", "data_card.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    told = json.loads((tmp_path / "one" / "data_card.json").read_text())["left_out"]
    assert told["words"] == 30 * (2 + 2 + 2) + 5 == one.left_out.words
    assert told["kinds"][:2] == [
        {"name": "table", "times": 31, "words": 65},
        {"name": "reference", "times": 30, "words": 60},
    ]
    assert told["documents_over_share"] == 1
    assert told["documents"] == [{"name": "List | all", "words_kept": 1, "words_left_out": 5, "mostly": "table"}]
    card = (tmp_path / "one" / "data_card.md").read_text()
    for line in (
        "| template: box 0 | 10 | 20 |",
        "| all | 91 | 185 |",
        "Documents that lose more than 50% of their words, references aside: 1.",
        "| List \\| all | 1 | 5 | table |",
    ):
        assert line in card


def test_the_card_of_a_corpus_that_leaves_nothing_out_does_not_speak_of_it(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(20):
        (texts / f"{i}.txt").write_text(f"Text number {i} of some.")
    recipe = Recipe("text", CorpusOptions((str(texts),)), tokenizer_vocab=300, val_fraction=0.3, chunk_tokens=64)
    prepare(
        recipe, tmp_path / "d", workers=Workers(None, 1), overwrite=False, progress=lambda *_: None, command="a test"
    )
    assert "left_out" not in json.loads((tmp_path / "d" / "data_card.json").read_text())
    assert "Left out" not in (tmp_path / "d" / "data_card.md").read_text()
