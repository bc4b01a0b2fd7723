"""Which passages are drawn, and how often a run has read each: against every sequence that it took."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megalm.data.shards.tokens import SplitTokens
from megalm.evaluate.memorisation import candidates
from megalm.evaluate.memorisation.candidates import Drawn, draw
from megalm.evaluate.memorisation.passages import HELD_OUT, UNREAD, Passages, count_all, draw_all, group_of
from megalm.evaluate.memorisation.search import PassageSearch
from megalm.evaluate.memorisation.seen import RunData
from megalm.evaluate.memorisation.settings import Memorisation
from megalm.evaluate.memorisation.sources import Sources
from tests.unit.evaluate.memorisation.tiny_data import LENGTH, run_data, sequences_read, split

SETTINGS = Memorisation(name="memorisation", places={"": "x"}, prompt_tokens=(2, 5), continuation_tokens=4)
WEIGHTS = (3.0, 1.0)
DRAW = random.Random(4)
COPIED = [DRAW.randrange(1, 999) for _ in range(12)]
QUOTED = [DRAW.randrange(1, 999) for _ in range(9)]
LEAKED = [DRAW.randrange(1, 999) for _ in range(9)]


def words(count: int) -> list[int]:
    return [DRAW.randrange(1, 999) for _ in range(count)]


TRAIN = [
    [
        *((f"copy-{n}", COPIED) for n in range(7)),
        *((f"plain-{n}", words(9 + n)) for n in range(40)),
        ("quoted", QUOTED),
        *((f"quotes-{n}", [*words(20 + n), *QUOTED, *words(31)]) for n in range(3)),
        ("short", words(8)),
        ("long", words(150)),
    ],
    [("copy-elsewhere", COPIED), ("leak", [*words(40), *LEAKED]), *((f"other-{n}", words(15)) for n in range(10))],
]
HELD = [("held-0", words(9)), ("held-1", LEAKED), ("held-2", words(30)), ("held-3", words(3)), ("held-4", COPIED)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Path]:
    folder = tmp_path_factory.mktemp("memorisation")
    return [split(folder / str(n) / "train", documents) for n, documents in enumerate(TRAIN)], split(
        folder / "0" / "val", HELD
    )


def passages_of(data: RunData, settings: Memorisation = SETTINGS) -> Passages:
    done: list[int] = []
    training, held_out = draw_all(data, settings, done.append)
    assert sum(done) == sum(map(len, TRAIN)) + len(HELD)
    searched: list[int] = []
    found = count_all(data, settings, training, held_out, searched.append)
    assert sum(searched) == sum(each.index.tokens for each in data.train)
    return found


@pytest.mark.parametrize("samples", [0, 20, 76, 333])
def test_times_read_are_those_of_a_count_over_all_samples(folders: tuple[list[Path], Path], samples: int) -> None:
    data, corpora = run_data(folders[0], [folders[1]], samples, weights=WEIGHTS)
    read = Counter(sequences_read(data, corpora, WEIGHTS))
    texts = [each.at(0, each.index.tokens).tolist() for each in data.train]
    found = passages_of(data)
    assert len(found.all) > 50
    for passage in found.all:
        tokens, times, whole, copies = list(passage.tokens), 0, 0, 0
        for dataset, text in enumerate(texts):
            for start in range(len(text) - len(tokens) + 1):
                if text[start : start + len(tokens)] == tokens:
                    held_by = {(start + offset) // LENGTH for offset in range(len(tokens) - 1)}
                    times += min(read[dataset, sequence] for sequence in held_by)
                    copies += 1
        for (dataset, sequence), count in read.items():
            row = texts[dataset][sequence * LENGTH : (sequence + 1) * LENGTH + 1]
            windows = range(len(row) - len(tokens) + 1)
            whole += count * sum(row[start : start + len(tokens)] == tokens for start in windows)
        assert (passage.times, passage.whole, passage.copies) == (times, whole, copies)
        assert sum(place.times for place in passage.places) == times
        assert passage.times or passage.group in (HELD_OUT, UNREAD)


def test_documents_are_counted_none_is_left_out_silently(folders: tuple[list[Path], Path]) -> None:
    data, _ = run_data(folders[0], [folders[1]], 333, weights=WEIGHTS)
    found = passages_of(data)
    assert found.training.counts() == {
        "documents": 65,
        "too_short": 1,
        "other_names": 0,
        "share_of_passages_kept": 1.0,
        "passages_kept": 65 - 1 - 7,
    }
    assert (found.held_out.documents, found.held_out.too_short) == (5, 1)


def test_copies_of_a_document_give_one_passage_that_names_them_all(folders: tuple[list[Path], Path]) -> None:
    data, corpora = run_data(folders[0], [folders[1]], 333, weights=WEIGHTS)
    found = passages_of(data)
    (copied,) = [each for each in found.all if set(each.tokens) <= set(COPIED)]
    assert not copied.held_out, "a validation document has the same text"
    sources = Sources(data, found.all)
    assert {source.document for source in sources.of(copied)} == {*(f"copy-{n}" for n in range(7)), "copy-elsewhere"}
    assert {source.first for source in sources.of(copied)} <= set(range(4))
    (quoted,) = [each for each in found.all if list(each.tokens) == QUOTED]
    assert [(source.document, source.first) for source in sources.of(quoted)] == [
        ("quoted", 0),
        ("quotes-0", 20),
        ("quotes-1", 21),
        ("quotes-2", 22),
    ]
    read = sequences_read(data, corpora, WEIGHTS)
    first = {(place.dataset, place.start // LENGTH) for place in quoted.places}
    expected = sorted({number // 4 + 1 for number, place in enumerate(read[: 333 // 4 * 4]) if place in first})
    assert sources.steps(quoted)[0] == expected[:100]


def test_a_validation_document_that_training_text_holds_counts_as_read(folders: tuple[list[Path], Path]) -> None:
    data, _ = run_data(folders[0], [folders[1]], 333, weights=WEIGHTS)
    found = passages_of(data)
    (leaked,) = [each for each in found.all if list(each.tokens) == LEAKED]
    assert leaked.held_out and leaked.times > 0 and leaked.group == group_of(leaked.times)
    assert found.leaked == 1
    assert [source.document for source in Sources(data, found.all).of(leaked)] == ["leak"]
    held_out = [each for each in found.all if each.group == HELD_OUT]
    names = {source.document for each in held_out for source in Sources(data, found.all).of(each)}
    assert names == {"held-0", "held-2"}


def test_a_seed_decides_what_is_drawn_and_a_limit_how_many(folders: tuple[list[Path], Path]) -> None:
    data, _ = run_data(folders[0], [folders[1]], 76, weights=WEIGHTS)
    few, again, other = (
        passages_of(data, SETTINGS.changed(limit=3, seed=seed)).all for seed in (None, SETTINGS.seed, 7)
    )
    assert few == again and few != other
    assert set(few) <= set(passages_of(data).all)
    assert sum(each.held_out for each in few) <= 3
    assert Counter(each.group for each in few)["1"] >= 3


def test_only_documents_of_a_name(folders: tuple[list[Path], Path]) -> None:
    data, _ = run_data(folders[0], [folders[1]], 333, weights=WEIGHTS)
    settings = Memorisation(**{**vars(SETTINGS), "documents": "copy"})
    found = passages_of(data, settings)
    assert (found.training.unnamed, found.training.kept.hashes.size) == (65 - 8, 1)
    assert found.held_out.unnamed == 0, "held-out ones are what the others are compared with"


def test_of_too_many_passages_all_copies_are_kept_or_none(
    folders: tuple[list[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, _ = run_data(folders[0], [], 333, weights=WEIGHTS)

    def drawn(seed: int) -> Drawn:
        settings = SETTINGS.changed(limit=None, seed=seed)
        return draw(
            data.train,
            settings,
            times_read=lambda dataset, starts: np.ones(starts.size, np.int64),
            named=None,
            progress=lambda _: None,
        )

    whole = {seed: drawn(seed) for seed in range(40)}
    monkeypatch.setattr(candidates, "MOST_KEPT", 20)
    kept_copies = []
    for seed, all_of_them in whole.items():
        found = drawn(seed)
        assert found.kept.hashes.size <= 20 and found.share in (0.5, 0.25, 0.125)
        assert found.documents == 65 and found.too_short == 1
        times = dict(zip(all_of_them.kept.hashes.tolist(), all_of_them.kept.times.tolist(), strict=True))
        for name, count in zip(found.kept.hashes.tolist(), found.kept.times.tolist(), strict=True):
            assert times[name] == count
        kept_copies.append(8 in found.kept.times.tolist())
    assert 4 <= sum(kept_copies) <= 20, "a passage of eight documents is as likely to be kept as one of a single one"


def test_a_search_finds_every_place_also_across_blocks() -> None:
    draw = np.random.default_rng(0)
    text = draw.integers(0, 3, 3000).astype(np.uint16)
    passages = np.unique(np.lib.stride_tricks.sliding_window_view(text, 6)[::37].astype(np.int64), axis=0)
    search = PassageSearch(passages)
    expected = [
        (start, number)
        for start in range(2995)
        for number, passage in enumerate(passages.tolist())
        if text[start : start + 6].tolist() == passage
    ]
    assert len(expected) > 100
    starts, which = search.find(text)
    assert list(zip(starts.tolist(), which.tolist(), strict=True)) == expected
    assert search.find(text[:5])[0].size == 0
    absent = PassageSearch(np.full((1, 6), 7))
    assert absent.find(text)[0].size == 0


def test_tokens_by_their_place(folders: tuple[list[Path], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalm.data.shards.tokens._BLOCK_TOKENS", 50)
    tokens = SplitTokens(run_data(folders[0], [], 0)[0].train[0].store)
    text = [token for _, document in TRAIN[0] for token in [*document, 0]]
    assert tokens.at(0, tokens.index.tokens).tolist() == text
    assert tokens.at(30, 100).tolist() == text[30:130]
    blocks = list(tokens.blocks(8))
    assert len(blocks) > 3
    assert [token for number, (_, block) in enumerate(blocks) for token in block[8 if number else 0 :]] == text
    assert all(block.tolist() == text[first : first + block.size] for first, block in blocks)
    names = [name for name, document in TRAIN[0] for _ in [*document, 0]]
    assert [document.name for document in tokens.documents_at(range(len(text)))] == names


@pytest.mark.parametrize(
    ("times", "group"), [(1, "1"), (2, "2 to 9"), (9, "2 to 9"), (10, "10 to 99"), (1000, "1,000 to 9,999")]
)
def test_groups_are_powers_of_ten_and_once_apart(times: int, group: str) -> None:
    assert group_of(times) == group
