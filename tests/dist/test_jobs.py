"""Ranks do any job: one that is not training, under every launcher of this machine. ``tests/slurm`` has it under srun.

What must hold for each: all ranks take part; rank 0 alone speaks; an error is one line, said once; the exit code is the
error's (torchrun turns it into 1); a note, and a job with nothing to do, are said.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from test_launchers import LAUNCHERS

RANKS = 4
COMMANDS = {"megalm": (sys.executable, "-m"), **{name: command[:-1] for name, command in LAUNCHERS.items()}}
SECONDS = 120


def run(launcher: str, folder: Path, outcome: str) -> tuple[int, str]:
    """(exit code, everything that was printed)."""
    command = COMMANDS[launcher]
    if not Path(command[0]).exists():
        pytest.skip(f"{launcher} is not installed beside {sys.executable}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(
        [*command, "second_job", str(RANKS), str(folder), outcome],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("launcher", COMMANDS)
def test_a_second_job_runs_on_all_ranks(launcher: str, tmp_path: Path) -> None:
    code, output = run(launcher, tmp_path, "done")
    assert code == 0, output
    assert [(tmp_path / f"sum-{rank}").read_text() for rank in range(RANKS)] == ["10"] * RANKS
    assert output.count("the sum is 10") == 1, "rank 0 alone speaks on the terminal"
    assert output.count("a second job") == 1
    logs = [(tmp_path / "logs" / f"rank-{rank}.log").read_text() for rank in range(RANKS)]
    assert all("the sum is 10" in log for log in logs), "and every rank in its log"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", COMMANDS)
@pytest.mark.parametrize(
    ("outcome", "line", "exit_code"),
    [
        ("refused", "numbers=none: nothing to add up; give one per rank", 2),
        ("bad-data", "numbers: a rank has none; give it one", 3),
        ("diverged", "the sum is not finite", 4),
    ],
)
def test_its_errors_are_said_once_and_have_their_codes(
    launcher: str, outcome: str, line: str, exit_code: int, tmp_path: Path
) -> None:
    code, output = run(launcher, tmp_path, outcome)
    assert output.splitlines().count(line) == 1, output
    assert code == (1 if launcher == "torchrun" else exit_code)
    if launcher != "torchrun":  # which shows stack frames of its own
        assert "Traceback" not in output


@pytest.mark.slow
def test_a_bug_names_its_rank_and_shows_where(tmp_path: Path) -> None:
    code, output = run("megalm", tmp_path, "bug")
    assert code == 70
    assert output.count("rank 1 failed:") == 1
    assert "ZeroDivisionError: divides by zero" in output
    assert 'second_job.py", line' in output


@pytest.mark.slow
def test_its_own_exit_code_is_the_commands(tmp_path: Path) -> None:
    assert run("megalm", tmp_path, "interrupted")[0] == 130


@pytest.mark.parametrize("launcher", ["megalm", "mpirun"])
def test_a_job_with_nothing_to_do_says_so(launcher: str, tmp_path: Path) -> None:
    code, output = run(launcher, tmp_path, "complete")
    assert (code, output.count("everything is added up already")) == (0, 1), output
    assert not list(tmp_path.glob("sum-*"))


@pytest.mark.slow
def test_ranks_that_a_failed_one_leaves_waiting_end_with_its_code(tmp_path: Path) -> None:
    """No launcher ends them: rank 0 is in a collective with rank 2, which sleeps; neither has a connection that breaks.

    As on GPUs, where a collective waits for a lost rank until its timeout.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent), "WORLD_SIZE": "3"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "3"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "second_job", "3", str(tmp_path), "stuck"],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        shown = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [4, 4, 4], shown
    assert [text.splitlines() for text in shown[1:]] == [["the sum is not finite"], []]
    for rank in (0, 2):
        log = (tmp_path / "logs" / f"rank-{rank}.log").read_text()
        assert "rank 1 failed (exit code 4), and this rank waits in vain: it ends, too" in log
    assert sorted(path.name for path in tmp_path.glob("wish-*")) == ["wish-0", "wish-2"]
