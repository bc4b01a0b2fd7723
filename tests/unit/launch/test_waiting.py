"""Ranks that wait for others say who is missing, a signal ends the wait at once, and nothing waits without need."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from megalm.errors import ConfigError, ExitCode
from megalm.launch import RankInfo, discover, mpi, waiting
from megalm.launch import store as store_module
from megalm.launch.discovery import variables_of
from megalm.launch.rendezvous import Meeting
from megalm.launch.signals import StopRequest
from megalm.launch.store import open_store
from megalm.launch.waiting import Patience, StoppedError, how_to_be_alone

STALE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}


def rank_of(rank: int, world_size: int = 2, port: int = 29511, launcher: str = "torchrun") -> RankInfo:
    return RankInfo(
        rank=rank,
        world_size=world_size,
        local_rank=0,
        local_world_size=1,
        launcher=launcher,
        master_addr="127.0.0.1",
        master_port=port,
    )


@pytest.fixture
def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def store() -> HashStore:
    return HashStore()


@pytest.fixture(autouse=True)
def _no_wait_outlives_its_test(monkeypatch: pytest.MonkeyPatch, store: HashStore) -> Iterator[None]:
    """A thread inside the store that wakes while the interpreter winds down would abort the process of the tests."""
    monkeypatch.setattr(store_module, "START_TIMEOUT", timedelta(seconds=3))
    yield
    for key in ("plan", "cuda-asked-all", "ended-all"):
        store.set(key, "")
    for thread in threading.enumerate():
        if thread.name == "waiting":
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(waiting, "_FIRST_LINE_SECONDS", 0.1)
    return []


def signalled(name: str) -> StopRequest:
    """A request that a signal brings a moment later."""
    stop = StopRequest()
    threading.Timer(0.6, lambda: stop._receive(getattr(signal, f"SIG{name}"), None)).start()
    return stop


def test_rank_0_says_how_many_ranks_are_missing_and_a_signal_ends_it(lines: list[str]) -> None:
    info = rank_of(0)
    meeting = Meeting(HashStore(), info, Patience(info, signalled("INT"), lines.append, STALE))
    with pytest.raises(StoppedError) as caught:
        meeting.gather()
    assert caught.value.exit_code == ExitCode.INTERRUPTED
    assert len(lines) == 3, "after 1, 2 and 4 times the first interval"
    assert set(lines) == {
        "waiting for 1 of 2 ranks at 127.0.0.1:29511 (RANK and WORLD_SIZE are set in this shell; `env -u RANK "
        "-u WORLD_SIZE -u MASTER_ADDR -u MASTER_PORT megalm train …` starts own ranks)"
    }


def test_others_say_that_rank_0_is_missing_and_a_signal_ends_it(lines: list[str], free_port: int) -> None:
    info = rank_of(1, port=free_port)
    started = time.monotonic()
    with pytest.raises(StoppedError):
        open_store(info, None, Patience(info, signalled("TERM"), lines.append, STALE), STALE)
    assert time.monotonic() - started < 5
    assert f"waiting for 1 of 2 ranks at 127.0.0.1:{free_port}: rank 0 (connection refused) (RANK and" in lines[0]


def test_something_else_that_listens_where_rank_0_is_to_be(lines: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        info = rank_of(1, port=silent.getsockname()[1])
        with pytest.raises(StoppedError):
            open_store(info, None, Patience(info, signalled("INT"), lines.append, STALE), STALE)
    assert "rank 0 does not answer" in lines[0]


@pytest.mark.parametrize("wait", [Meeting.receive, lambda meeting: meeting.all_agree("cuda", True)])
def test_every_wait_for_others_hears_signals(wait, lines: list[str], store: HashStore) -> None:
    info = rank_of(1)
    meeting = Meeting(store, info, Patience(info, signalled("INT"), lines.append, STALE))
    started = time.monotonic()
    with pytest.raises(StoppedError):
        wait(meeting)
    assert time.monotonic() - started < 5
    assert lines[0].startswith("waiting for ")


def test_ranks_that_end_are_not_waited_for_after_a_new_signal(store: HashStore) -> None:
    info, stop = rank_of(0), signalled("INT")
    stop._receive(signal.SIGTERM, None)  # what stopped the run
    started = time.monotonic()
    Meeting(store, info, Patience(info, stop)).leave_together(60)
    assert 0.3 < time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("name", "launcher", "code"),
    [
        ("INT", "torchrun", 130),
        ("TERM", "torchrun", 130),
        ("INT", "srun", 130),
        ("TERM", "srun", 85),
        ("USR1", "mpirun", 85),
    ],
)
def test_what_a_scheduler_stopped_is_to_be_queued_again(name: str, launcher: str, code: int) -> None:
    stop = StopRequest()
    stop._receive(getattr(signal, f"SIG{name}"), None)
    with pytest.raises(StoppedError) as caught:
        Patience(rank_of(0, launcher=launcher), stop).check()
    assert caught.value.exit_code == code


@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_that_does_not_resolve_is_one_line(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_NAME_SECONDS", 0.0)
    info = replace(rank_of(rank), master_addr="no-such-host.invalid")
    with pytest.raises(ConfigError, match=r"^MASTER_ADDR=no-such-host\.invalid: no such host .*`env -u RANK") as caught:
        open_store(info, None, Patience(info), STALE)
    assert "\n" not in str(caught.value)


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        info = rank_of(0, port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=rf"^MASTER_PORT={info.master_port}: .*address already in use") as caught:
            open_store(info, None, Patience(info), STALE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("port", ["0", "70000", "-1", "x"])
@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_a_port_that_is_none(port: str, launcher: str) -> None:
    srun = {
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "a",
        "SLURM_JOB_ID": "7",
    }
    variables = {**(STALE if launcher == "torchrun" else srun), "MASTER_PORT": port}
    with pytest.raises(ConfigError, match=f"MASTER_PORT={port}: not a"):
        discover(variables)


def test_a_rank_without_others_needs_no_place_to_meet() -> None:
    info = discover({**STALE, "WORLD_SIZE": "1", "MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "70000"})
    assert info is not None
    assert (info.rank, info.world_size, info.master_addr, info.master_port) == (0, 1, "", 0)
    started = time.monotonic()
    Meeting(HashStore(), info, Patience(info)).gather()
    assert time.monotonic() - started < 1


def test_what_has_to_be_unset_to_start_own_ranks() -> None:
    both = {**STALE, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    told, unset = variables_of(both)
    assert told == "RANK and WORLD_SIZE"
    assert discover({name: value for name, value in both.items() if name not in unset}) is None


class CountingStore:
    """A store that counts what each rank asks of it."""

    def __init__(self, store: HashStore, calls: Counter[str]) -> None:
        self._store, self._calls = store, calls

    def __getattr__(self, name: str):
        self._calls[name] += 1
        return getattr(self._store, name)


@pytest.mark.parametrize("ranks", [4, 12])
def test_ranks_ask_the_store_as_often_however_many_there_are_and_however_long_it_takes(ranks: int) -> None:
    store, calls = HashStore(), [Counter[str]() for _ in range(ranks)]

    def run(rank: int) -> None:
        info = rank_of(rank, ranks)
        meeting = Meeting(CountingStore(store, calls[rank]), info, Patience(info))
        time.sleep(0.5 if rank == 2 else 0)
        meeting.gather()
        meeting.publish("plan") if rank == 0 else meeting.receive()
        meeting.all_agree("cuda", True)
        meeting.leave_together(10)

    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(run, range(ranks)))
    # here, all-here; plan; yes, asked, all (and opening the gate), agreed; ended, all (and opening the gate), left
    assert all(sum(counts.values()) <= 12 for counts in calls[1:]), calls


def test_stale_variables_of_torchrun(free_port: int) -> None:
    """The command itself, rank 1 of two: says what it waits for after 5 s, and ends at once, without a stack."""
    environment = {**os.environ, **STALE, "RANK": "1", "MASTER_PORT": str(free_port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megalm", "train", "experiment=quickstart"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        asked = time.monotonic()
        rest = process.stderr.read()
        assert process.wait(timeout=20) == 130, rest
    assert time.monotonic() - asked < 3
    assert line.startswith(f"waiting for 1 of 2 ranks at 127.0.0.1:{free_port}: rank 0 (connection refused)")
    assert rest == ""


def test_ranks_that_come_when_there_is_nothing_to_do_are_told_so() -> None:
    store = HashStore()
    first, second = (Meeting(store, rank_of(rank), Patience(rank_of(rank))) for rank in range(2))
    first.dismiss()
    second.gather()
    assert second.receive() == ""


def test_torchrun_is_told_of_its_own_options() -> None:
    told = how_to_be_alone({"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"})
    assert "torchrun" in told and "--nproc-per-node" in told and "env -u" not in told
    assert "env -u" in how_to_be_alone({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"})


def test_a_rank_of_mpirun_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """mpirun was killed before rank 0 has said where it listens, and this rank is left alone."""

    class Silent:
        size = 4

        def Ibcast(self, buffer: bytearray, root: int) -> Silent:  # noqa: N802 - MPI's name
            return self

        def Test(self) -> bool:  # noqa: N802 - MPI's name
            return False

    monkeypatch.setattr(mpi, "START_TIMEOUT", timedelta(seconds=0.1))
    with pytest.raises(ConfigError, match=r"^mpirun: rank 0 has said nothing within 0:00:00\.1"):
        mpi._broadcast(Silent(), b"", Patience(rank_of(1, 4, launcher="mpirun")))
