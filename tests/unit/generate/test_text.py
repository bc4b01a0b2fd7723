"""Text as it grows: whole characters, stop texts across tokens, what may yet be one is held back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.data.tokenization.training import train_byte_level_bpe
from megalm.generate.text import GrowingText, cut_at_stop, text_after


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_byte_level_bpe(["the cat sat on the mat. " * 3], 290)


@given(text=st.text(max_size=40), prompt=st.text(max_size=10))
def test_pieces_are_the_text(tokenizer: Tokenizer, text: str, prompt: str) -> None:
    before, tokens = tokenizer.encode(prompt), tokenizer.encode(text)
    growing = GrowingText(tokenizer, before)
    pieces = []
    for token in tokens:
        growing.add(token)
        pieces.append(growing.piece())
    pieces.append(growing.piece(ended=True))
    assert "".join(pieces) == text == text_after(tokenizer, before, tokens)


def test_a_stop_text_across_tokens_ends_it_and_is_never_shown(tokenizer: Tokenizer) -> None:
    growing = GrowingText(tokenizer, [], stop=("mat.",))
    shown = ""
    for token in tokenizer.encode("the cat on the mat. the"):
        stopped = growing.add(token)
        shown += growing.piece(ended=stopped)
        if stopped:
            break
    assert stopped
    assert shown == "the cat on the "


def test_what_follows_a_stop_text_is_cut_with_its_tokens(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("the cat sat on the mat")
    kept, text = cut_at_stop(tokenizer, [], tokens, ["t on", "zzz"])
    assert text == "the cat sa"
    assert text.startswith(tokenizer.decode(kept))
    assert cut_at_stop(tokenizer, [], tokens, ["zzz"]) == (tokens, "the cat sat on the mat")
