"""Raw text whose perplexity is asked for: which documents a file has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megalm.errors import DataError
from megalm.evaluate.text import RawText


def test_line_ends_of_unicode_stand_in_a_line_of_json(tmp_path: Path) -> None:
    """JSON lets them stand in a string as they are; ``str.splitlines`` would cut there."""
    texts = ["one\u2028two", "three\u2029four", "five\x85six", "seven\x7f"]
    path = tmp_path / "texts.jsonl"
    path.write_bytes("".join(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" for text in texts).encode())
    assert RawText.read(path).documents == tuple(texts)


def test_half_a_character_is_said_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "right"}\n\n{"text": "a\\ud83d"}\n')
    with pytest.raises(DataError, match=r"line 3: text: character 2 is half of one \(the lone surrogate \\ud83d\)"):
        RawText.read(path)
