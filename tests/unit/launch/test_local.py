"""Ranks that megalm starts itself: how they end, and what signals do. The ranks are real processes without torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.launch.local import LocalJob, run_local

HERE = Path(__file__).resolve().parent
Ended = tuple[int, list[str]]


@pytest.fixture(autouse=True)
def probe_can_be_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("PROBE_DIR", str(tmp_path))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Ended]:
    def run(mode: str, ranks: int = 3, **fields) -> Ended:
        monkeypatch.setenv("PROBE_MODE", mode)
        said: list[str] = []
        job = LocalJob(**{"world_size": ranks, "threads_per_rank": 1, "plan": "", "module": "probe", **fields},
                       run_dir=tmp_path)  # fmt: skip
        return run_local(job, said.append), said

    return run


@pytest.mark.parametrize(
    ("codes", "expected"),
    [("0,0,0", 0), ("85,85,85", 85), ("130,130,130", 130), ("0,3,0", 3), ("0,0,70", 70), ("0,-9,0", 137)],
)
def test_the_exit_code_is_that_of_the_rank_that_failed(run, codes: str, expected: int) -> None:
    assert run(f"exit:{codes}")[0] == expected


@pytest.mark.parametrize(
    ("codes", "words"), [("0,70,0", "rank 1 failed with exit code 70"), ("0,0,-9", "rank 2 was killed (SIGKILL)")]
)
def test_it_says_which_rank_failed_and_where_its_log_is(run, tmp_path: Path, codes: str, words: str) -> None:
    (line,) = run(f"exit:{codes}")[1]
    rank = words.split()[1]
    assert line.startswith(words)
    assert line.endswith(str(tmp_path / "logs" / f"rank-{rank}.log"))


@pytest.mark.parametrize("code", [2, 3, 4])
def test_nothing_is_added_to_what_a_rank_has_explained(run, code: int) -> None:
    assert run(f"exit:0,{code},0") == (code, [])


def test_one_rank_that_fails_ends_those_that_wait_for_it(run) -> None:
    started = time.monotonic()
    code, (line,) = run("one-fails:70")
    assert code == 70
    assert line.startswith("rank 1 failed")
    assert time.monotonic() - started < 20


def test_rank_0_gets_the_plan_and_a_socket_on_the_port_that_all_are_told(run, tmp_path: Path) -> None:
    assert run("tell", plan='{"any": "text"}', threads_per_rank=3) == (0, [])
    assert (tmp_path / "told").read_text() == 'True {"any": "text"}'
    assert [(tmp_path / f"rank-{rank}.threads").read_text() for rank in range(3)] == ["3", "3", "3"]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Starts a launcher of two ranks in a process group of its own, as a shell does, and waits until they are up."""
    started: list[subprocess.Popen[str]] = []

    def start(mode: str) -> subprocess.Popen[str]:
        monkeypatch.setenv("PROBE_MODE", mode)
        command = [sys.executable, "-m", "probe_launcher", "2", str(tmp_path)]
        own = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, and what is started inherits that
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0)
        signal.signal(signal.SIGHUP, own)
        started.append(process)
        wait_until(lambda: len(list(tmp_path.glob("rank-*.ready"))) == 2)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_until(holds: Callable[[], bool], timeout_seconds: float = 20) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not holds():
        assert time.monotonic() < deadline, "still not so"
        time.sleep(0.02)


def test_ctrl_c_reaches_every_rank_exactly_once(launcher, tmp_path: Path) -> None:
    process = launcher("count-signals")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole foreground process group
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130, output
    assert [(tmp_path / f"rank-{rank}.signals").read_text() for rank in range(2)] == ["SIGINT", "SIGINT"]
    assert output.count("stopping after this step") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_signals_of_a_scheduler_are_passed_on(launcher, tmp_path: Path, number: signal.Signals) -> None:
    process = launcher("count-signals")
    process.send_signal(number)
    process.communicate(timeout=20)
    assert [(tmp_path / f"rank-{rank}.signals").read_text() for rank in range(2)] == [number.name] * 2


def test_a_closed_terminal_neither_stops_nor_ends_the_ranks(launcher, tmp_path: Path) -> None:
    process = launcher("count-signals")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert [(tmp_path / f"rank-{rank}.signals").read_text() for rank in range(2)] == ["SIGTERM", "SIGTERM"]


def test_a_signal_during_the_start_is_neither_lost_nor_fatal(launcher) -> None:
    process = launcher("slow-start")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 85


def test_the_third_ctrl_c_ends_ranks_that_do_not_listen(launcher, tmp_path: Path) -> None:
    process = launcher("hang")
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "ended without saving" in output
    wait_until(lambda: not any(map(is_running, pids(tmp_path))))


def test_ranks_die_with_their_launcher(launcher, tmp_path: Path) -> None:
    process = launcher("hang")
    assert all(map(is_running, pids(tmp_path)))
    process.kill()
    wait_until(lambda: not any(map(is_running, pids(tmp_path))))


def pids(folder: Path) -> list[int]:
    return [int((folder / f"rank-{rank}.ready").read_text()) for rank in range(2)]


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie that nobody has waited for."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
