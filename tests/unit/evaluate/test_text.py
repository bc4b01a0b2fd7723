"""Raw text whose perplexity is asked for: which documents a file has."""

from __future__ import annotations

import gzip
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


def test_a_compressed_file_is_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert RawText.read(tmp_path / "a.jsonl.gz").documents == ("one", "two")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b'one\r\n{"text": "two"}\n'))
    assert RawText.read(tmp_path / "a.txt.gz").documents == ('one\n{"text": "two"}\n',)
    (tmp_path / "b.txt").write_bytes("one\n".encode("utf-8-sig"))
    assert RawText.read(tmp_path / "b.txt").documents == ("one\n",)
    for name, holds in (("cut.gz", gzip.compress(b"one " * 99)[:-9]), ("latin.txt", b"d\xe9")):
        (tmp_path / name).write_bytes(holds)
        with pytest.raises(DataError, match=r"damaged or cut short|not UTF-8"):
            RawText.read(tmp_path / name)


def test_half_a_character_is_said_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "right"}\n\n{"text": "a\\ud83d"}\n')
    with pytest.raises(DataError, match=r"line 3: text: character 2 is half of one \(the lone surrogate \\ud83d\)"):
        RawText.read(path)
