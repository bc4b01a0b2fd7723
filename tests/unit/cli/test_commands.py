"""The table of commands: each has its module, says what it does, and imports no more than it must."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import megalm
from megalm.cli.main import main
from megalm.cli.table import COMMANDS
from megalm.errors import ExitCode

TOOLS = Path(__file__).parents[3] / "tools"
NAMES = {
    "prepare": "prepare_data.py",
    "tokenizer": "train_tokenizer.py",
    "convert": "convert_checkpoint.py",
    "inspect": "inspect_checkpoint.py",
}


def test_every_command_has_a_module_and_a_line_of_help(capsys: pytest.CaptureFixture) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert (Path(megalm.__file__).parent / "cli" / f"{name}.py").is_file()
        assert f"  {name:9} {command.help}" in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_is_under_its_name(name: str, capsys: pytest.CaptureFixture) -> None:
    assert main([name, "--help"]) == ExitCode.DONE
    assert capsys.readouterr().out.startswith(f"usage: megalm {name} ")


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"], ["compare", "--help"], ["inspect", "--help"]])
def test_what_is_told_without_torch_imports_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from megalm.cli.main import main\n"
        f"assert main({arguments!r}) == 0\n"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_tool_is_its_command_under_another_name(name: str) -> None:
    tool = TOOLS / NAMES[name]
    assert os.access(tool, os.X_OK)
    shown = subprocess.run([sys.executable, tool, "--help"], capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"usage: tools/{NAMES[name]} ")
    wrong = subprocess.run([sys.executable, tool, "--no-such"], capture_output=True, text=True, check=False)
    assert wrong.returncode == ExitCode.BAD_CONFIG
    assert len(wrong.stderr.splitlines()) == 1


def test_a_command_that_does_not_exist_is_said(capsys: pytest.CaptureFixture) -> None:
    assert main(["trian"]) == ExitCode.BAD_CONFIG
    assert "invalid choice: 'trian'" in capsys.readouterr().err
