"""Tokenizers: no text is lost, no text turns into a control token, and the same texts give the same tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.document import Document, Segment
from megalm.data.tokenization.document_tokens import encode_documents
from megalm.data.tokenization.library_classes import END_OF_TEXT
from megalm.data.tokenization.roles import Marks
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.data.tokenization.training import SMALLEST_VOCABULARY, train_byte_level_bpe, train_wordpiece
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
    flat, lengths, mask = encode_documents(TOKENIZER, [Document.plain("", text) for text in ("one", "", "two\n")])
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
    assert encode_documents(cutting, [Document.plain("", text)])[0].tolist() == [
        *TOKENIZER.encode(text),
        TOKENIZER.eos_id,
    ]


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


WORDPIECE = train_wordpiece([*TEXTS, "the quick brown fox jumps over lazy dogs"] * 3, 150, ["<|im_start|>"])


def test_a_wordpiece_has_the_tokens_of_bert() -> None:
    assert WORDPIECE.kind == "WordPiece"
    assert list(WORDPIECE.special_tokens) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<|im_start|>"]
    assert (WORDPIECE.eos_id, WORDPIECE.before_ids[0], WORDPIECE.mask_id) == (3, 2, 4)
    assert WORDPIECE.decode(WORDPIECE.encode("the fox")) == "the fox"
    tokens, lengths, _ = encode_documents(WORDPIECE, [Document.plain("", "the fox"), Document.plain("", "dogs")])
    assert tokens[0] == 2 and tokens[lengths[0] - 1] == 3 and tokens[lengths[0]] == 2 and tokens[-1] == 3
    with pytest.raises(DataError, match=r"vocab_size=90: too small .* at least 105"):
        train_wordpiece(TEXTS, 90)


@pytest.mark.parametrize("spelt", ["[MASK]", "[SEP]", "[CLS]", "<|im_start|>"])
def test_words_that_spell_special_tokens_stay_words(spelt: str) -> None:
    ids = WORDPIECE.encode(f"the {spelt} fox")
    assert not set(ids) & set(WORDPIECE.special_tokens.values()) - {WORDPIECE.special_tokens["[UNK]"]}


def test_case_is_kept_unless_asked_for() -> None:
    lower = train_wordpiece(["The Quick CAFÉ"] * 5, 150, lowercase=True)
    assert lower.decode(lower.encode("THE café")) == "the cafe"


def test_segments_and_their_masks() -> None:
    plain = Document.plain("", "for x")
    row = Document("", (Segment("ask (", learnt=False), Segment("return 0")))
    cut = Document("", (Segment("a"), Segment("b", learnt=False)))
    tokens, lengths, mask = encode_documents(TOKENIZER, [plain, row, cut])
    ids = TOKENIZER.encode("ask (return 0")
    second = tokens[lengths[0] : lengths[0] + lengths[1]].tolist()
    assert second == [*ids, TOKENIZER.eos_id]
    prompt = len(TOKENIZER.encode("ask ("))
    assert mask.tolist() == [1] * lengths[0] + [0] * prompt + [1] * (len(ids) + 1 - prompt) + [1, 0, 0]
    assert encode_documents(TOKENIZER, [plain])[2] is None


def test_a_token_that_a_learnt_character_is_in_is_learnt() -> None:
    """Where a word goes on from a prompt into its completion, the text is cut as it is without the border."""
    tokenizer = train_byte_level_bpe(["return x"] * 9, 290)
    assert len(tokenizer.encode("return")) == 1
    row = Document("", (Segment("re", learnt=False), Segment("turn"), Segment(" x", learnt=False)))
    tokens, _, mask = encode_documents(tokenizer, [row])
    assert tokens.tolist() == [*tokenizer.encode("return x"), tokenizer.eos_id]
    assert mask.tolist() == [1, *[0] * (len(tokens) - 1)]


def test_which_tokens_go_on_with_a_word() -> None:
    ids = TOKENIZER.encode("def main(): return")
    words = [TOKENIZER.decode([i]) for i in ids]
    starts = [not TOKENIZER.continues_word[i] for i in ids]
    assert all(start for word, start in zip(words, starts, strict=True) if not word[0].isalnum())
    assert not TOKENIZER.continues_word[TOKENIZER.special_ids].any()
    assert WORDPIECE.continues_word.sum() == sum(
        WORDPIECE.decode([i]).startswith("##") or "##" in str(WORDPIECE._tokenizer.id_to_token(i)) for i in range(150)
    )


def test_the_end_of_a_document_has_many_names(tmp_path: Path) -> None:
    renamed = TOKENIZER.definition.replace(END_OF_TEXT, "<the-end>")
    path = tmp_path / "t.json"
    path.write_text(renamed)
    assert Tokenizer.load(path, marks=Marks(eos="<the-end>")).eos_id == 0
    with pytest.raises(DataError, match="--eos </s>: it has no such token; it has <the-end>"):
        Tokenizer.load(path, marks=Marks(eos="</s>"))
    (tmp_path / "run").mkdir()
    Tokenizer.load(path, marks=Marks(eos="<the-end>")).save(tmp_path / "run")
    assert Tokenizer.load(tmp_path / "run" / "tokenizer.json").eos_id == 0, "a run remembers it"
    settings = tmp_path / "run" / "tokenizer_config.json"
    settings.write_text('{"eos_token": {"content": "<the-end>", "special": true}}')
    assert Tokenizer.load(tmp_path / "run" / "tokenizer.json").eos_id == 0, "as Hugging Face describes tokens"
    for unusable, why in (("{}", "or with --eos"), ("[]", "is a JSON list, not an object"), ("no json", "is not JSON")):
        settings.write_text(unusable)
        with pytest.raises(DataError, match=why):
            Tokenizer.load(tmp_path / "run" / "tokenizer.json")
    for name in ("</s>", "<eos>", "<|end_of_text|>"):
        assert Tokenizer(TOKENIZER.definition.replace(END_OF_TEXT, name)).eos_id == 0
