"""tools/train_tokenizer.py, called in this process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from megalm.data.shards.vocabulary import Relation, Vocabulary, relation
from megalm.data.tokenization.postprocessor import with_marks
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.data.tokenization.training import train_byte_level_bpe
from megalm.ownership import beside, owned

TOOL = Path(__file__).resolve().parents[3] / "tools" / "train_tokenizer.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("train_tokenizer_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    return path


@pytest.mark.parametrize(
    ("kind", "marks"), [("bpe", "end with <|endoftext|>"), ("wordpiece", "begin with [CLS] and end with [SEP]")]
)
def test_train_and_take_again_as_it_is(tool, text: Path, tmp_path: Path, capsys, kind: str, marks: str) -> None:
    out, copy = tmp_path / "new" / "a.json", tmp_path / "b.json"
    arguments = [str(text), "--kind", kind, "--vocab-size", "280", "--special-token", "<|im_start|>"]
    assert tool.main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "trained on 1 documents" in printed
    assert f"<|im_start|>; documents {marks}" in printed
    assert "<|im_start|>" in Tokenizer.load(out).special_tokens
    assert tool.main(["--from", str(out), "--out", str(copy)]) == 0
    assert copy.read_bytes() == out.read_bytes()


def test_marks_are_added_to_a_tokenizer_that_a_model_knows(tool, text: Path, tmp_path: Path, capsys) -> None:
    """After all others, so that its ids stay, and with what its other tokens are for."""
    old, new = tmp_path / "old" / "tokenizer.json", tmp_path / "new" / "tokenizer.json"
    assert tool.main([str(text), "--vocab-size", "280", "--out", str(old)]) == 0
    (old.parent / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}')
    marks = ["<|im_start|>", "<|im_end|>"]
    assert tool.main(["--from", str(old), "--special-token", *marks, "--out", str(new)]) == 0
    before, after = Vocabulary.of(Tokenizer.load(old), old), Vocabulary.of(Tokenizer.load(new), new)
    assert relation(before, after) is Relation.GROWN
    assert [Tokenizer.load(new).special_tokens[mark] for mark in marks] == [before.size, before.size + 1]
    assert Tokenizer.load(new).roles.pad == "<|endoftext|>"
    assert tool.main(["--from", str(old), "--special-token", "a", "--out", str(new)]) == 3
    assert "--special-token a: is an ordinary word of this tokenizer" in capsys.readouterr().err


def test_lines_of_a_corpus_are_documents(tool, text: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "a.json"
    assert tool.main([str(text), "--split-on", "line", "--vocab-size", "270", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "trained on 50 documents" in printed
    assert "the text is enough" not in printed
    assert tool.main([str(text), "--vocab-size", "9000", "--out", str(out)]) == 0
    few = Tokenizer.load(out).vocab_size
    assert f"--vocab-size 9000: the text is enough for {few} tokens only\n" in capsys.readouterr().out


def test_one_training_at_a_time_writes_to_one_file(tool, text: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "tokenizer.json"
    with owned(beside(out), "first", "wait"):
        assert tool.main([str(text), "--vocab-size", "300", "--out", str(out)]) == 2
        assert f"--out {out}: in use by another process: host " in capsys.readouterr().err
        assert tool.main([str(text), "--vocab-size", "300", "--out", str(tmp_path / "other.json")]) == 0
    assert not out.exists()


def test_all_mistakes_at_once(tool, tmp_path: Path, capsys) -> None:
    assert tool.main(["--lowercase", "--out", str(tmp_path / "a.json")]) == 2
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == [
        "INPUT",
        "--vocab-size",
        "--lowercase:",
    ]
    assert tool.main(["x", "--from", "y", "--vocab-size", "300", "--out", str(tmp_path / "a.json")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "--vocab-size is for training; --from takes a tokenizer that is there",
        "INPUT and --from: give one of them",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere", "--vocab-size", "300"], "--input /nowhere: no such file or folder"),
        (["--from", "/nowhere.json"], "tokenizer /nowhere.json cannot be read"),
        ([__file__, "--vocab-size", "10"], "vocab_size=10: too small"),
    ],
)
def test_bad_data_is_one_line(tool, tmp_path: Path, capsys, arguments: list[str], message: str) -> None:
    assert tool.main([*arguments, "--out", str(tmp_path / "a.json")]) == 3
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "a.json").exists()


def test_roles_go_with_a_tokenizer_that_is_taken(tool, tmp_path: Path, capsys) -> None:
    given, out = tmp_path / "given", tmp_path / "out" / "tokenizer.json"
    given.mkdir()
    tokenizer = train_byte_level_bpe(["the quick brown fox"], 270, ["<s>", "<end>", "<other>"])
    (given / "tokenizer.json").write_text(with_marks(tokenizer.definition, ("<s>",), ()))
    (given / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "<end>", "chat_template": "t"}')
    assert tool.main(["--from", str(given), "--out", str(out)]) == 0
    assert "documents begin with <s> and end with <end>" in capsys.readouterr().out
    assert Tokenizer.load(out).roles == Tokenizer.load(given).roles
    assert tool.main(["--from", str(given), "--eos", "<other>", "--out", str(out)]) == 3
    assert f"{out.parent / 'tokenizer_config.json'} is another tokenizer's; remove it" in capsys.readouterr().err
    assert Tokenizer.load(out).roles == Tokenizer.load(given).roles, "nothing was written"
    other = tmp_path / "other" / "mine.json"
    assert tool.main(["--from", str(given / "tokenizer.json"), "--eos", "<other>", "--out", str(other)]) == 0
    assert Tokenizer.load(other).roles.end == "<other>"
    assert tool.main(["--from", str(given), "--eos", "fox", "--out", str(other)]) == 3
    assert "--eos fox: it has no such token; it has <|endoftext|>, <s>, <end>, <other>" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["there", "there/", "missing/", "missing/deep/"])
def test_a_folder_as_out_holds_the_file_under_its_usual_name(tool, text: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "there").mkdir()
    assert tool.main([str(text), "--vocab-size", "280", "--out", f"{tmp_path}/{out}"]) == 0
    assert Tokenizer.load(tmp_path / out / "tokenizer.json").vocab_size == 280


def test_files_that_are_no_text_are_said(tool, text: Path, tmp_path: Path, capsys) -> None:
    (text.parent / "picture.txt").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(90))
    (text.parent / "latin.txt").write_bytes("Gr\xf6\xdfe".encode("latin-1"))
    assert tool.main([str(text.parent), "--vocab-size", "280", "--out", str(tmp_path / "o.json")]) == 0
    printed = capsys.readouterr().out
    assert "trained on 1 documents" in printed
    assert "1 PNG image" in printed
    assert "1 not UTF-8" in printed
