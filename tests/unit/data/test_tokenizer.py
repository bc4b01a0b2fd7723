"""Tokenizers: no text is lost, no text turns into a control token, and the same texts give the same tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.document import Document
from megalm.data.tokenizer import END_OF_TEXT, SMALLEST_VOCABULARY, Tokenizer, train_byte_level_bpe
from megalm.errors import DataError

TEXTS = ["def main():\n    return 0\n" * 20, "for x in range(10): print(x)\n" * 20, "naïve café\n"]
TOKENIZER = train_byte_level_bpe(TEXTS, 300)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= i < TOKENIZER.vocab_size for i in ids)


def test_text_that_spells_a_special_token_stays_text() -> None:
    text = f"a document about {END_OF_TEXT}, and {END_OF_TEXT}"
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.eos_id not in ids
    assert TOKENIZER.decode(ids) == text


def test_documents_are_joined_with_end_of_text() -> None:
    flat, lengths, mask = TOKENIZER.encode_documents([Document.plain("", text) for text in ("one", "", "two\n")])
    assert mask is None
    expected = [*TOKENIZER.encode("one"), 0, 0, *TOKENIZER.encode("two\n"), 0]
    assert TOKENIZER.eos_id == 0
    assert flat.tolist() == expected
    assert int(lengths.sum()) == len(expected)
    assert lengths[1] == 1


def test_training_is_deterministic() -> None:
    again = train_byte_level_bpe(TEXTS, 300)
    assert again.definition == TOKENIZER.definition
    assert again.sha256 == TOKENIZER.sha256
    assert train_byte_level_bpe(TEXTS[:1], 300).sha256 != TOKENIZER.sha256


@pytest.mark.parametrize("vocab_size", [SMALLEST_VOCABULARY, 280])
def test_the_vocabulary_has_the_size_asked_for(vocab_size: int) -> None:
    assert train_byte_level_bpe(TEXTS, vocab_size).vocab_size == vocab_size


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(DataError, match=r"vocab_size=256: too small.*at least 257"):
        train_byte_level_bpe(TEXTS, 256)


def test_unused_ids_count_into_the_vocabulary() -> None:
    definition = json.loads(TOKENIZER.definition)
    definition["added_tokens"][0]["id"] = 0
    definition["model"]["vocab"]["zz"] = 999
    assert Tokenizer(json.dumps(definition)).vocab_size == 1000


def test_a_tokenizer_that_cuts_texts_loses_no_tokens_here() -> None:
    definition = json.loads(TOKENIZER.definition)
    definition["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    text = "a text of more than four tokens"
    cutting = Tokenizer(json.dumps(definition))
    assert cutting.decode(cutting.encode(text)) == text
    assert cutting.encode_documents([Document.plain("", text)])[0].tolist() == [*TOKENIZER.encode(text), TOKENIZER.eos_id]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"{}", "is not a tokenizer.json"),
        (b"\xff\xfe\x00", "is not a tokenizer.json"),
        (b"not json", "is not a tokenizer.json"),
        (TOKENIZER.definition.replace(END_OF_TEXT, "<end>").encode(), r"no token of it is known to end .*has <end>"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value)
