"""``tools/inspect_checkpoint.py``: shows what is there, and its exit code says whether it is sound."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from layouts import Layout, pieces_of, save

TOOL = Path(__file__).parents[3] / "tools" / "inspect_checkpoint.py"


def _inspect(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run it in a narrow terminal."""
    return subprocess.run(
        [sys.executable, TOOL, *arguments], capture_output=True, text=True, check=False, env={"COLUMNS": "60"}
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
    (row,) = (line for line in result.stdout.splitlines() if "qkv.weight" in line)
    assert "36×6" in row and "dim 0, 2 ways" in row, "a tensor is one line, whatever the terminal's width"
    assert "exp_avg exp_avg_sq weight" in row
    assert "dim 1, 2 ways" in result.stdout
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


def test_layouts_alone_are_no_difference_of_tensors(checkpoint: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", Layout(tp=3), step=1200)[0]
    result = _inspect(checkpoint, "--diff", other)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all 4 are equal, in exp_avg, exp_avg_sq, weight" in result.stdout


def test_what_differs_is_named_element_by_element(checkpoint: Path, tmp_path: Path) -> None:
    def changed(layout: Layout, tp_rank: int, dp_rank: int):
        pieces = pieces_of(layout, tp_rank, dp_rank)
        for piece in pieces:
            if piece.name == "norm.weight" and piece.kind != "exp_avg":
                piece.values[2] += 0.5
        return [piece for piece in pieces if piece.name != "qkv.weight"]

    other = save(tmp_path / "other", Layout(), step=1300, pieces=changed)[0]
    result = _inspect(checkpoint, "--diff", other)
    assert result.returncode == 1
    rows = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "norm.weight weight 1 of 6 elements, by at most 0.5" in rows
    assert "norm.weight exp_avg_sq 1 of 6 elements, by at most 0.5" in rows
    assert not any(row.startswith("norm.weight exp_avg ") for row in rows)
    assert "qkv.weight weight only in the first" in rows
    assert "step 1200 1300" in rows
    assert not any("embedding.weight" in row for row in rows)


def test_a_damaged_one_is_not_compared(checkpoint: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", Layout(), step=1200)[0]
    (other / "rank-00000.safetensors").write_bytes(b"\0" * 64)
    result = _inspect(checkpoint, "--diff", other, "--verify")
    assert result.returncode == 3
    assert "rank-00000.safetensors" in result.stderr


def test_an_interrupted_save_is_reported(checkpoint: Path) -> None:
    (checkpoint.parent / ".unfinished-step-00001300-1").mkdir()
    assert "step-00001300-1, an interrupted save" in _inspect(checkpoint.parent).stdout
