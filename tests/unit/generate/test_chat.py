"""A conversation: what the model is asked each turn, and what becomes of turns that fail or do not fit."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import ConfigError, DataError
from megalm.generate.chat import check_chat, converse
from megalm.generate.prompts import Settings
from megalm.generate.requests import Completion, GenerateRequest
from tests import chat_models

QWEN = chat_models.MODELS["qwen"]


class Model:
    """Answers each turn with its number, and remembers what it was asked."""

    def __init__(self, tokenizer: Tokenizer, longest: int = 4096) -> None:
        self.tokenizer = tokenizer
        self.config = SimpleNamespace(model=SimpleNamespace(sequence_length=longest))
        self.asked: list[str] = []

    def generate(self, requests: list[GenerateRequest], on_text: Callable[..., None]) -> list[list[Completion]]:
        (request,) = requests
        longest = self.config.model.sequence_length
        if len(request.tokens) + request.max_new_tokens > longest:
            raise ConfigError(f"prompt: more than {longest} tokens")
        self.asked.append(self.tokenizer._tokenizer.decode(list(request.tokens), skip_special_tokens=False))
        text = f"answer {len(self.asked)}"
        for piece in (text[:3], text[3:]):
            on_text(0, 0, piece)
        return [[Completion(tokens=(), text=text, finish="end")]]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer.load(QWEN.write(tmp_path) / "tokenizer.json")


def talk(model: Any, *lines: str, system: str | None = None) -> str:
    turns: Iterator[str] = iter(lines)

    def read_line() -> str:
        try:
            return next(turns)
        except StopIteration:
            raise EOFError from None

    out = io.StringIO()
    converse(model, Settings(max_new_tokens=8), system=system, read_line=read_line, out=out)
    return out.getvalue()


def rendered(*messages: tuple[str, str]) -> str:
    if messages[0][0] != "system":
        messages = (("system", "You are a helpful assistant."), *messages)  # the template's own
    turns = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    return f"{turns}<|im_start|>assistant\n"


def test_each_turn_has_those_before_it_as_the_template_writes_them(tokenizer: Tokenizer) -> None:
    model = Model(tokenizer)
    assert talk(model, "two", "", "four", system="one word") == "answer 1\nanswer 2\n"
    first = [("system", "one word"), ("user", "two")]
    assert model.asked == [
        rendered(*first),
        rendered(*first, ("assistant", "answer 1"), ("user", "four")),
    ]


def test_a_new_conversation_keeps_the_system_message_alone(tokenizer: Tokenizer) -> None:
    model = Model(tokenizer)
    talk(model, "two", "/new", "four", system="one word")
    assert model.asked[1] == rendered(("system", "one word"), ("user", "four"))


def test_the_oldest_turns_are_forgotten_where_all_do_not_fit(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    two_turns = [("user", "two"), ("assistant", "answer 1"), ("user", "four")]
    room = len(tokenizer.encode_conversation([{"role": r, "content": c} for r, c in two_turns])) + 8
    model = Model(tokenizer, longest=room)
    talk(model, "two", "four", "two")
    assert model.asked[1] == rendered(*two_turns)
    assert model.asked[2] == rendered(("user", "four"), ("assistant", "answer 2"), ("user", "two"))
    assert f"(forgot 2 turns: model.sequence_length={room} has no room for them)" in capsys.readouterr().err


def test_a_turn_that_fails_is_said_and_leaves_the_conversation(
    tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model(tokenizer, longest=100)
    talk(model, "word " * 200, "four")
    assert capsys.readouterr().err == "prompt: more than 100 tokens\n"
    assert model.asked == [rendered(("user", "four"))]


def test_what_no_conversation_can_be_led_with_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError) as refused:
        check_chat(tokenizer, Settings(samples=2, beams=3), None)
    assert refused.value.lines == [
        "samples=2: a conversation goes on from one text; samples=1",
        "beams=3: a conversation goes on from one text; beams=1",
    ]
    from megalm.data.tokenization.training import train_byte_level_bpe

    with pytest.raises(DataError, match="chat"):
        check_chat(train_byte_level_bpe(["a text"], 300), Settings(), None)
