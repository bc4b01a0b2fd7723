"""The command line of tools/prepare_data.py, called in this process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[3] / "tools" / "prepare_data.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("prepare_data_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_mistake_is_reported_at_once(tool, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--corpus", "stdlib", "--out", "x", "--val-fraction", "2", "--workers", "0", "--chunk-tokens", "0"])
    assert stopped.value.code == 2
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == [
        "give",
        "--val-fraction",
        "--chunk-tokens",
        "--workers",
    ]


def test_an_unknown_option_is_one_line(tool, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        tool.main(["--coprus", "stdlib"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "unrecognized arguments: --coprus stdlib\n"


def test_an_interrupt_says_what_is_true(tool, tmp_path: Path, capsys, monkeypatch) -> None:
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tool.PrepareProgress, "update", interrupt)
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
