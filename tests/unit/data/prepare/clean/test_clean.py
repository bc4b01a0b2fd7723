"""Cleaning: what it changes, what it removes, and that it says so."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.document import Document, Rejected, Segment
from megalm.data.prepare.clean import Cleaned, Cleaner, Cleaning
from megalm.data.prepare.clean.near_duplicates import bands
from megalm.data.prepare.clean.pii import scrub
from megalm.data.prepare.clean.words import ngram_hashes, words_of
from megalm.errors import DataError


def clean(text: str | bytes, **cleaning) -> Cleaned | Rejected:
    return Cleaner(Cleaning(**cleaning)).clean(Document.plain("a", text))


def test_without_any_step_text_stays_as_it_is() -> None:
    for text in ("plain", "e\u0301 \u00a0 {x} a@b.org\n", " leading"):
        cleaned = clean(text)
        assert (cleaned.document.text, cleaned.notes) == (text, {})


@pytest.mark.parametrize("text", ["", " \n\t", b"\n"])
def test_a_document_without_text_is_empty(text: str | bytes) -> None:
    assert clean(text) == Rejected("a", "empty")


def test_bytes_that_are_no_utf8_are_replaced_and_counted() -> None:
    cleaned = clean("caf\xe9 \ufffd".encode("latin-1", "replace") + "\ufffd".encode())
    assert cleaned.document.text.startswith("caf\ufffd")
    assert cleaned.notes == {"bytes that are no UTF-8, replaced": 1}
    assert clean("a real \ufffd".encode()).notes == {}


def test_half_a_surrogate_pair_is_replaced_and_counted() -> None:
    cleaned = clean(json.loads('"a \\ud83d b"'))
    assert cleaned.document.text == "a ? b"
    assert cleaned.notes == {"lone surrogates, replaced": 1}


def test_normal_form_and_length() -> None:
    cleaned = clean("cafe\u0301", normalise="NFC")
    assert cleaned.document.text == "café"
    assert cleaned.notes == {"not NFC, normalised": 1}
    assert clean("é" * 10, max_document_bytes=19) == Rejected("a", "over-long")
    assert isinstance(clean("é" * 10, max_document_bytes=20), Cleaned)


def test_segments_are_cleaned_one_by_one_and_keep_what_is_learnt() -> None:
    document = Document("a", (Segment("mail x@y.org", learnt=False, role="user"), Segment(b"e\xcc\x81")))
    cleaned = Cleaner(Cleaning(normalise="NFC", scrub_pii=True)).clean(document)
    assert [s.text for s in cleaned.document.segments] == ["mail <EMAIL>", "é"]
    assert [s.learnt for s in cleaned.document.segments] == [False, True]
    assert [s.role for s in cleaned.document.segments] == ["user", None]
    prompt_only = Document("a", (Segment("question", learnt=False), Segment(" ")))
    assert Cleaner(Cleaning()).clean(prompt_only) == Rejected("a", "empty")


@pytest.mark.parametrize(
    ("text", "scrubbed"),
    [
        ("write to jane.doe+x@mail.example.co.uk.", "write to <EMAIL>."),
        ("card 4111 1111 1111 1111 and 5500-0000-0000-0004", "card <CARD> and <CARD>"),
        ("amex 378282246310005", "amex <CARD>"),
        ("IBAN DE89 3704 0044 0532 0130 00, GB82WEST12345698765432", "IBAN <IBAN>, <IBAN>"),
        ("from 8.8.8.8 and 2001:4860:4860::8888", "from <IP> and <IP>"),
        ("call +49 30 1234567 or +1 (415) 555-2671", "call <PHONE> or <PHONE>"),
        ("call (415) 555-2671 or 415-555-2671 or 030 1234567", "call <PHONE> or <PHONE> or <PHONE>"),
        ("DNI 12345678Z, NIE X1234567L", "DNI <ID>, NIE <ID>"),
        ("SSN 123-45-6789", "SSN <ID>"),
        ("CPF 529.982.247-25", "CPF <ID>"),
        ("tax id 86 095 742 719", "tax id <ID>"),
        ("NIR 255081416802538", "NIR <ID>"),
        ("resident 11010519491231002X", "resident <ID>"),
    ],
)
def test_what_identifies_a_person_is_replaced(text: str, scrubbed: str) -> None:
    notes: Counter[str] = Counter()
    assert scrub(text, notes) == scrubbed
    assert notes.total() == scrubbed.count("<")


@pytest.mark.parametrize(
    "text",
    [
        "card 4111 1111 1111 1112 has a wrong checksum",
        "IBAN DE89 3704 0044 0532 0130 01",
        "a private 192.168.1.10, 127.0.0.1 and fe80::1",
        "version 8.8.8.8 and 1.2.3 and 999.1.1.1",
        "ISBN 0-06-051312-8, ISBN-13: 978-0-306-40615-7",
        "on 2024-01-15 at 12:30:45, 1990-2000, pages 100-250",
        "it costs 1,234,567.89 or 12 345 678 in total; pi is 3.14159265358979",
        "DNI 12345678A, SSN 000-12-3456 and 666-12-3456, CPF 111.111.111-11",
        "x = 1234567890123456789012345678901234567890",
        "user@localhost and @mention and a @ b",
        "11010519491331002X has no such month",
    ],
)
def test_other_numbers_stay(text: str) -> None:
    assert scrub(text, Counter()) == text


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", ["a@", "1", "1 ", "1-", ":", "a.", "a:1", "A1 ", "+1(", "0 1/", "x@x."])
def test_time_is_linear_in_the_text(unit: str) -> None:
    text = unit * (400_000 // len(unit))
    assert scrub(text, Counter())


WORDS = [f"word{i}" for i in range(60)]


def evaluation_file(tmp_path: Path, *texts: str) -> str:
    path = tmp_path / "eval.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"q": {"a": [t]}}) + "\n" for t in texts).encode()))
    return str(path)


def test_thirteen_words_of_an_evaluation_are_contamination(tmp_path: Path) -> None:
    file = evaluation_file(tmp_path, " ".join(WORDS[:20]), "only four words here", " ".join(WORDS[40:49]))
    cleaner = Cleaner(Cleaning(decontaminate=(file,)))

    def verdict(text: str) -> Cleaned | Rejected:
        return cleaner.clean(Document.plain("a", text))

    assert verdict("before, " + ", ".join(WORDS[3:16]).upper() + "!") == Rejected("a", f"contaminated: {file}")
    assert isinstance(verdict(" ".join(WORDS[3:15])), Cleaned), "twelve are no hit"
    assert isinstance(verdict("only four words here"), Cleaned), "a phrase is no evaluation"
    assert isinstance(verdict(f"x {' '.join(WORDS[40:49])} y"), Rejected), "nine words are looked for as a whole"
    with pytest.raises(DataError, match="/nowhere: cannot be read"):
        Cleaner(Cleaning(decontaminate=("/nowhere",)))


def test_words_of_scripts_without_spaces_are_characters() -> None:
    assert words_of("Héllo, WORLD-wide 猫が好き") == ["héllo", "world", "wide", "猫", "が", "好", "き"]
    assert ngram_hashes(["a"], 2).size == 0
    assert ngram_hashes(["a", "b", "a", "b"], 2).tolist()[0] == ngram_hashes(["a", "b"], 2).tolist()[0]


def test_hashes_never_change() -> None:
    """A dataset that is prepared again must lose the same documents."""
    assert ngram_hashes(["the", "cat"], 2).tolist() == GOLDEN_NGRAM
    assert bands("the quick brown fox jumps over the lazy dog").tolist()[:3] == GOLDEN_BANDS


GOLDEN_NGRAM = [16553816895296956961]
GOLDEN_BANDS = [2766896734702578466, 6275222878496928141, 2871382596093802759]


def test_near_duplicates_share_a_band_and_others_do_not() -> None:
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(5000)]
    text = [vocabulary[i] for i in rng.integers(0, 5000, 600)]
    changed = [*text[:300], "other", *text[301:]]
    different = [vocabulary[i] for i in rng.integers(0, 5000, 600)]
    own = bands(" ".join(text))
    assert own.shape == (14,)
    assert (own == bands(" ".join(changed))).any()
    assert not (own == bands(" ".join(different))).any()
    assert (bands("one") == bands("One!")).all()
    assert not (bands("!") == bands("?")).any()


@settings(max_examples=20, deadline=None)
@given(st.integers(5, 30_000))
def test_long_documents_are_hashed_in_stretches(words: int) -> None:
    text = " ".join(f"w{i * 7919 % 1000}" for i in range(words))
    assert bands(text).tolist() == bands(text + " ").tolist()


PROSE = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind that at all.\n"
    "It is said that they have been friends for a long time, with the best of reasons.\n"
) * 8


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("gopher", "Too short a text of the kind.", "gopher: too few words"),
        ("gopher", "# " * 30 + PROSE, None),
        ("gopher", "#hash " * 300 + PROSE, "gopher: too many hash signs"),
        ("gopher", "- the item of that list\n" * 60, "gopher: too many bullet points"),
        ("gopher", "the of 12 34 56 78 90 11 22 33 44 " * 20, "gopher: words too short"),
        ("gopher", "wort fuchs springt ueber faulen hund heute " * 20, "gopher: too few English stop words"),
        ("gopher-any", "wort fuchs springt ueber faulen hund heute " * 20, None),
        ("c4", PROSE + "lorem ipsum dolor sit amet.", "c4: lorem ipsum"),
        ("c4", PROSE + "A brace { in a line.", "c4: curly bracket"),
        ("c4", "One sentence of five words.", "c4: too few sentences"),
    ],
)
def test_quality_rules(name: str, text: str, rule: str | None) -> None:
    pytest.importorskip("datatrove")
    outcome = clean(text, quality=(name,))
    if rule is None:
        assert isinstance(outcome, Cleaned)
        assert outcome.document.text == text
    else:
        assert outcome == Rejected("a", rule)


def test_c4_drops_lines_and_says_so_but_cuts_no_supervised_example() -> None:
    pytest.importorskip("datatrove")
    text = f"menu\n{PROSE}home about contact"
    cleaned = clean(text, quality=("c4",))
    assert "menu" not in cleaned.document.text
    assert cleaned.notes == {"c4: lines removed": 2}
    document = Document("a", (Segment("menu\n", learnt=False), Segment(PROSE)))
    kept = Cleaner(Cleaning(quality=("c4",))).clean(document)
    assert kept.document == document


def test_quality_names_its_extra(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datatrove.pipeline.filters", None)
    with pytest.raises(DataError, match=r"--quality gopher: needs datatrove, .*; pip install 'megalm\[quality\]'"):
        Cleaner(Cleaning(quality=("gopher",)))
