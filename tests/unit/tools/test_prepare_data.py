"""The command line of tools/prepare_data.py, called in this process."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from megalm.data.prepare.progress import PrepareProgress
from megalm.data.tokenization.postprocessor import with_marks
from megalm.data.tokenization.training import train_byte_level_bpe

TOOL = Path(__file__).resolve().parents[3] / "tools" / "prepare_data.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("prepare_data_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_mistake_is_reported_at_once(tool, capsys) -> None:
    assert (
        tool.main(["--corpus", "stdlib", "--out", "x", "--val-fraction", "2", "--workers", "0", "--chunk-tokens", "0"])
        == 2
    )
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == [
        "give",
        "--val-fraction",
        "--chunk-tokens",
        "--workers",
    ]


def test_an_unknown_option_is_one_line(tool, capsys) -> None:
    assert tool.main(["--coprus", "stdlib"]) == 2
    assert capsys.readouterr().err == "unrecognized arguments: --coprus stdlib\n"


def test_an_interrupt_says_what_is_true(tool, tmp_path: Path, capsys, monkeypatch) -> None:
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PrepareProgress, "update", interrupt)
    code = tool.main(["--corpus", "stdlib", "--tokenizer-vocab", "300", "--out", str(tmp_path / "d"), "--workers", "1"])
    assert code == 130
    assert "interrupted; the same command goes on where this one ended" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".d.partial"]


def test_a_place_that_cannot_be_written_is_one_line(tool, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "d"
    code = tool.main(["--corpus", "stdlib", "--tokenizer-vocab", "300", "--out", str(out), "--workers", "1"])
    assert code == 3
    assert capsys.readouterr().err.splitlines()[-1].endswith("Not a directory")


def test_verify_of_a_sound_dataset(tool, tiny_dataset: Path, capsys) -> None:
    assert tool.main(["--verify", str(tiny_dataset)]) == 0
    assert "every chunk of train and val is as it was written" in capsys.readouterr().out


@pytest.fixture
def beginning(tmp_path: Path) -> Path:
    """A folder with a tokenizer that begins every text with ``<s>``."""
    tokenizer = train_byte_level_bpe(["the quick brown fox"], 280, ["<s>", "</s>"])
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "tokenizer.json").write_text(with_marks(tokenizer.definition, ("<s>",), ()))
    (tmp_path / "given" / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return tmp_path / "given"


@pytest.mark.parametrize(
    ("option", "begins"),
    [
        ([], "begins with `<s>` (as the tokenizer's own files say)"),
        (["--add-bos"], "begins with `<s>` (--add-bos)"),
        (["--no-add-bos"], "begins with its text (--no-add-bos)"),
    ],
)
def test_what_begins_a_document_is_said(tool, beginning: Path, tmp_path: Path, capsys, option, begins: str) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"the fox number {i}\n" for i in range(50)))
    out = tmp_path / "data"
    command = ["--corpus", "text", "--input", str(texts), "--split-on", "line", "--workers", "1"]
    command += ["--val-fraction", "0.3", "--chunk-tokens", "64"]
    assert tool.main([*command, "--tokenizer", str(beginning), *option, "--out", str(out)]) == 0
    assert (f"each document {begins} and ends with `</s>`" in capsys.readouterr().out) == ("<s>" in begins)
    assert f"Each document {begins} and ends with `</s>`." in (out / "data_card.md").read_text()
    for place in (out, out / "tokenizer.json"):  # as a user gives the tokenizer of other data, or of a run
        again = tmp_path / f"again-{place.name}"
        assert tool.main([*command, "--tokenizer", str(place), "--out", str(again)]) == 0
        for split in ("train", "val"):
            assert (again / split / "index.json").read_text() == (out / split / "index.json").read_text()


def test_a_token_that_cannot_end_or_begin_documents_is_refused(tool, beginning: Path, tmp_path: Path, capsys) -> None:
    command = ["--corpus", "stdlib", "--tokenizer", str(beginning), "--workers", "1", "--out", str(tmp_path / "d")]
    assert tool.main([*command, "--eos", "x"]) == 3
    assert "--eos x: an ordinary word, which would end documents" in capsys.readouterr().err
    (beginning / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "</s>"}')
    assert tool.main([*command, "--add-bos"]) == 3
    assert "--add-bos: it has no token that begins a text; it has <|endoftext|>, <s>, </s>" in capsys.readouterr().err
    assert tool.main(["--corpus", "stdlib", "--tokenizer-vocab", "300", "--add-bos", "--out", str(tmp_path / "d")]) == 2
    assert "--add-bos: a tokenizer that is trained here has no bos" in capsys.readouterr().err


def test_a_dataset_is_made_though_nobody_reads_what_is_said(tool, tmp_path: Path, monkeypatch) -> None:
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"document {number} of twenty, with {number * 7919} as its own word\n")
    reading, writing = os.pipe()
    os.close(reading)
    out = tmp_path / "out" / "d"
    arguments = ["--corpus", "text", "--input", *map(str, sorted(tmp_path.glob("*.txt"))), "--tokenizer-vocab", "280"]
    with os.fdopen(writing, "w") as broken:
        monkeypatch.setattr("sys.stdout", broken)
        monkeypatch.setattr("sys.stderr", broken)
        assert tool.main([*arguments, "--val-fraction", "0.3", "--workers", "1", "--out", str(out)]) == 0
    assert tool.main(["--verify", str(out)]) == 0


def test_verify_of_no_folder_names_its_option(tool, tmp_path: Path, capsys) -> None:
    assert tool.main(["--verify", str(tmp_path / "none")]) == 3
    assert f"--verify {tmp_path}/none: no such folder" in capsys.readouterr().err
