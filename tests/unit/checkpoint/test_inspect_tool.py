"""``tools/inspect_checkpoint.py``: shows what is there, and its exit code says whether it is sound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from layouts import Layout, save

TOOL = Path(__file__).parents[3] / "tools" / "inspect_checkpoint.py"


def _inspect(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, TOOL, *arguments], capture_output=True, text=True, check=False, env={"COLUMNS": "160"}
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = save(tmp_path, Layout(tp=2, dp=2, cuts=(0.3,)), step=1200)[0]
    assert isinstance(path, Path)
    return path


def test_a_sound_checkpoint_is_shown_and_verified(checkpoint: Path) -> None:
    result = _inspect(checkpoint.parent, "--verify")
    assert result.returncode == 0, result.stderr
    assert "1,200" in result.stdout
    assert "36×6" in result.stdout
    assert "dim 1, 2 ways" in result.stdout
    assert "exp_avg exp_avg_sq weight" in result.stdout
    assert "every sha256 is right" in result.stdout


def test_damage_is_named_only_when_asked_for_and_exits_3(checkpoint: Path) -> None:
    file = checkpoint / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    assert _inspect(checkpoint).returncode == 0
    result = _inspect(checkpoint, "--verify")
    assert result.returncode == 3
    assert "rank-00001.safetensors" in result.stderr
    assert "every sha256 is right" not in result.stdout


def test_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    result = _inspect(tmp_path / "nothing")
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr.splitlines() == [f"{tmp_path / 'nothing'}: no such checkpoint"]
