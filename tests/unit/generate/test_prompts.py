"""Files of prompts: every line is read whole, and what cannot be continued is said with its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import ConfigError, DataError
from megalm.generate.prompts import Settings, check_settings, read_prompts
from megalm.generate.requests import Sampling
from tests.chat_models import MODELS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(MODELS["qwen"].write(tmp_path_factory.mktemp("qwen")))


def _file(folder: Path, *lines: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_a_compressed_file_and_one_with_a_mark(tmp_path: Path, tokenizer: Tokenizer) -> None:
    line = json.dumps({"prompt": "dé"}, ensure_ascii=False) + "\r\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    (tmp_path / "b.jsonl").write_bytes(line.encode("utf-8-sig"))
    for name in ("a.jsonl.gz", "b.jsonl"):
        (prompt,) = read_prompts(tmp_path / name, tokenizer)
        assert tokenizer.decode(prompt.tokens) == "dé"
    (tmp_path / "c.jsonl").write_bytes(line.encode("latin-1"))
    for name, wrong in (("c.jsonl", "not UTF-8"), ("d.jsonl", "cannot be read: No such file")):
        with pytest.raises(DataError, match=wrong):
            read_prompts(tmp_path / name, tokenizer)


def test_line_ends_of_unicode_stand_in_a_prompt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "one\u2028two\u2029three\x85four\x0bfive"
    path = _file(tmp_path, json.dumps({"prompt": text}, ensure_ascii=False))
    (prompt,) = read_prompts(path, tokenizer)
    assert tokenizer.decode(prompt.tokens) == text


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"prompt": "a", "text": "mine"}, "field text: the output has one of this name; another name, or without it"),
        ({"prompt": "a\ud83d"}, r"line 2: prompt: character 2 is half of one \(the lone surrogate \\ud83d\)"),
        ({"messages": [{"role": "user", "content": "\ude00"}]}, r"line 2: messages: character 1 is half of one"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, 'line 2: has "prompt" and "messages"'),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "line 2: message 1: has tool_calls, and text alone is read",
        ),
        ({"prompt": "ab\udcff"}, "line 2: prompt: character 3 is the byte 0xff, which is no UTF-8; text in UTF-8"),
        ({"messages": None}, "line 2: messages=null: no messages"),
        ({"prompt": None}, "line 2: prompt=null: no text"),
    ],
)
def test_what_is_no_prompt(fields: dict[str, Any], wrong: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=wrong):
        read_prompts(_file(tmp_path, '{"prompt": "right"}', json.dumps(fields)), tokenizer)


def test_a_field_without_a_value_is_none(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """As tables write it in which some rows are prompts and some conversations."""
    messages = [{"role": "user", "content": "two?", "tool_calls": None}]
    rows = [{"prompt": "two?", "messages": None}, {"prompt": None, "messages": messages}]
    one, other = read_prompts(_file(tmp_path, *map(json.dumps, rows)), tokenizer)
    assert list(one.tokens) == tokenizer.encode_prompt("two?")
    assert list(other.tokens) == tokenizer.encode_conversation(messages)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5: no whole number"),
        ({"samples": "3"}, "samples=3: no whole number"),
        ({"length_penalty": None}, "length_penalty=null: no number"),
        ({"stop": "END"}, r"stop=END: no tuple of texts, such as \('\.', 'END'\)"),
        ({"stop": ("END", 5)}, "stop=.*: no tuple of texts"),
        ({"stop": ("END", "")}, "stop: an empty text"),
    ],
)
def test_settings_of_another_type(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_settings(Settings(**wrong))


def test_sampling_of_another_type() -> None:
    with pytest.raises(ConfigError) as refused:
        Sampling(temperature="hot", top_k=4.0, seed=None)  # type: ignore[arg-type]
    assert refused.value.lines == [
        "top_k=4.0: no whole number",
        "seed=null: no whole number",
        "temperature=hot: no number",
    ]
