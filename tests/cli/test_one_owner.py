"""``megalm train`` beside another of its kind, and after its terminal has gone: real runs, seconds each."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import TINY, steps_of

from megalm.checkpoint.store import complete_checkpoints
from megalm.launch.logs import log_path

pytestmark = pytest.mark.slow

STEPS = 200


class Run:
    """A run of one rank that takes a few seconds, started as often as one likes."""

    def __init__(self, folder: Path, dataset: Path) -> None:
        self.folder = folder / "try1"
        self.command = [sys.executable, "-m", "megalm", "train", *TINY, "parallel=single", "launch.ranks=1"]
        self.command += [f"data.path={dataset}", f"run.dir={folder}", "run.name=try1", f"train.steps={STEPS}"]
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(self, **streams) -> subprocess.Popen[str]:
        return subprocess.Popen(self.command, env=self.environment, text=True, **streams)

    def wait_for_step(self, step: int, process: subprocess.Popen[str]) -> None:
        wait_until(lambda: (self.folder / "metrics.jsonl").exists() and steps_of(self.folder)[-1:] >= [step], process)

    @property
    def log(self) -> list[str]:
        return log_path(self.folder, 0).read_text().splitlines()


def wait_until(holds: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None and time.monotonic() < deadline, process.returncode
        time.sleep(0.01)


@pytest.fixture
def run(tmp_path: Path, tiny_dataset: Path) -> Run:
    return Run(tmp_path, tiny_dataset)


def test_a_run_outlives_its_terminal_and_shares_its_folder_with_nobody(run: Run) -> None:
    """An ssh that drops: the terminal's end closes, the session's processes get SIGHUP, what they write is EIO."""
    terminal, line = pty.openpty()
    first = run.start(
        stdin=line,
        stdout=line,
        stderr=line,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(line)
    wait_until((run.folder / "owner.lock").exists, first)
    second = run.start(stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # before the first step, as after it
    out, err = second.communicate(timeout=120)
    assert (second.returncode, out) == (2, "")
    assert err.startswith(f"run.name=try1: in use by another process: host {os.uname().nodename}, pid {first.pid}, ")
    assert len(err.splitlines()) == 1 and err.endswith("; wait for it to end, stop it, or choose another run.name\n")
    run.wait_for_step(2, first)
    os.close(terminal)
    assert first.wait(timeout=120) == 0
    assert steps_of(run.folder) == list(range(1, STEPS + 1))
    assert complete_checkpoints(run.folder / "checkpoints")[-1].step == STEPS
    gone = next(i for i, line in enumerate(run.log) if line.startswith("the console is gone (Input/output error)"))
    assert any(line.startswith(f"step {STEPS}/{STEPS}  loss") for line in run.log[gone:]), run.log
    assert any(line.startswith("done") for line in run.log[gone:])
    assert not (run.folder / "owner.lock").exists()


def test_a_run_whose_folder_was_taken_over_writes_nothing_more(run: Run) -> None:
    """The takeover is that of another machine, which has not heard of the first for a minute."""
    process = run.start(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    run.wait_for_step(3, process)
    lock = run.folder / "owner.lock"
    (file,) = lock.iterdir()
    record = json.loads(file.read_text())
    new = {**record, "token": "another", "owner": {**record["owner"], "host": "node07", "kernel": "other", "pid": 1}}
    shutil.rmtree(lock)
    rows = (run.folder / "metrics.jsonl").read_bytes().count(b"\n")
    lock.mkdir()
    (lock / "another").write_text(json.dumps(new))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    assert "run.name=try1: taken over by another owner (host node07, pid 1, since" in output
    assert "Traceback" not in output
    assert steps_of(run.folder)[-1] <= rows + 1, "at most the step whose row was being written"
    assert complete_checkpoints(run.folder / "checkpoints") == []
    assert [path.name for path in lock.iterdir()] == ["another"], "what is another's stays"
