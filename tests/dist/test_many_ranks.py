"""Hundreds of real processes meet over one TCP store, agree, and leave; where one fails, all leave with its code."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from light_ranks import CLIENT_FILES, FAILING, WITNESS

pytestmark = pytest.mark.slow

HUNDREDS, FEWER = 256, 64


def run(ranks: int, outcome: str, folder: Path) -> tuple[list[int], str, float]:
    """(exit codes by rank, what the terminal shows, seconds)."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "light_ranks", str(ranks), outcome, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=560,
        check=True,
    )
    shown = [line for line in done.stderr.splitlines() if not line.startswith("waiting for ")]  # on a busy machine
    return json.loads(done.stdout.splitlines()[-1]), "\n".join(shown), time.monotonic() - began


def found(folder: Path, ranks: int) -> list[dict]:
    return [json.loads((folder / f"{rank}").read_text()) for rank in range(ranks)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [FEWER, 1024])
def test_they_meet_agree_and_leave(ranks: int, tmp_path: Path) -> None:
    codes, shown, _ = run(ranks, "done", tmp_path)
    assert codes == [0] * ranks, shown
    assert shown == "", "nobody has anything to say"
    saw = found(tmp_path, ranks)
    assert all(each["agreed"] == [True, False, True] for each in saw)
    assert all(each["limit"] == CLIENT_FILES and each["files"] < 64 for each in saw[1:]), "far below `ulimit -n 256`"
    assert saw[0]["limit"] == resource.getrlimit(resource.RLIMIT_NOFILE)[1], "the host has raised its own"
    assert saw[0]["files"] > ranks
    assert not list(tmp_path.glob("*.wish"))


def test_one_fails_and_all_leave_with_its_code_within_seconds(tmp_path: Path) -> None:
    codes, shown, seconds = run(HUNDREDS, "fails", tmp_path)
    assert codes == [3] * HUNDREDS
    assert shown == "data: damaged; another copy", "said once, by the rank that failed"
    assert seconds < 120, "and not after the collective's timeout"
    wishes = {int(path.stem) for path in tmp_path.glob("*.wish")}
    assert wishes == set(range(HUNDREDS)) - {FAILING}, "each had its time for a checkpoint"


def test_one_is_killed_and_a_witness_tells_the_others(tmp_path: Path) -> None:
    codes, shown, seconds = run(FEWER, "killed", tmp_path)
    assert codes[FAILING] == -9
    assert [code for rank, code in enumerate(codes) if rank != FAILING] == [1] * (FEWER - 1)
    assert "Traceback" not in shown, "whoever is killed is the launcher's news"
    assert seconds < 120
    assert not (tmp_path / f"{WITNESS}.wish").exists(), "it left by itself"
