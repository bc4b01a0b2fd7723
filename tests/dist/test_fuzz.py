"""A few of the fuzzer's configs, the same in every run of the tests; ``tools/fuzz.py`` tries as many as one likes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / "fuzz.py"), *arguments]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # as some users set it; Python then looks in no script's folder
    return subprocess.run(command, capture_output=True, text=True, timeout=290, check=False, env=environment)


@pytest.mark.slow
def test_random_accepted_configs_train_and_resume_on_random_layouts_like_one_rank() -> None:
    """On two ranks at most: to start ranks takes longer than to train on them."""
    done = fuzz("--seeds", "4..7", "--ranks", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "4 of 4 seeds, 0 failed"


@pytest.mark.parametrize("arguments", [(), ("--seeds", "5..4"), ("--seeds", "a"), ("--seeds", "0", "--ranks", "0")])
def test_bad_arguments_exit_with_2(arguments: tuple[str, ...]) -> None:
    assert fuzz(*arguments).returncode == 2
