"""A lock among real processes: one owner at a time, a dead one's lock is free, one that was passed over stops."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megalm.errors import ConfigError
from megalm.ownership import Identity, WaitEndedError, acquire, beside, claim, lock, owned

REMEDY = "choose another run.name"
HERE = Identity.here({})
ELSEWHERE = replace(HERE, host="node07", kernel="another", pid=4242)

OWNER = """
import sys, time
from pathlib import Path
from megalm.errors import ConfigError
from megalm.ownership import acquire, lock

path, start, seconds = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
lock.STALE_SECONDS = lock.WATCH_SECONDS = 0.3
time.sleep(max(start - time.time(), 0.0))
try:
    acquire(path, "run.name=a", "wait")
except ConfigError as error:
    print("refused", error, flush=True)
else:
    print("owner", flush=True)
    time.sleep(seconds)
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.4)
    monkeypatch.setattr(lock, "WATCH_SECONDS", 0.4)
    monkeypatch.setattr(lock, "_POLL_SECONDS", 0.02)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "owner.lock"


def take(path: Path, me: Identity = HERE):
    return acquire(path, "run.name=a", REMEDY, me=me)


def leave_behind(path: Path, me: Identity) -> None:
    """The lock of an owner that was killed."""
    ownership = take(path, me)
    ownership._exit.close()  # its heartbeat
    os.close(ownership.descriptor)


def start(path: Path, at: float = 0.0, seconds: float = 60.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", OWNER, str(path), str(at), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_second_owner_is_refused_and_told_of_the_first(path: Path) -> None:
    first = replace(HERE, job="SLURM job 77 of big", attempt=2)
    with owned(path, "run.name=a", REMEDY, me=first):
        (since,) = [json.loads(file.read_text())["since"] for file in path.iterdir()]
        with pytest.raises(ConfigError) as refused:
            take(path)
        assert str(refused.value) == (
            f"run.name=a: in use by another process: host {HERE.host}, pid {HERE.pid}, SLURM job 77 of big "
            f"(restart 2), since {since}, last heartbeat 0 s ago; {REMEDY}"
        )
        assert [entry.name for entry in path.parent.iterdir()] == ["owner.lock"]
    assert not path.parent.exists(), "made for the lock, and nothing else was put there"


def test_it_is_given_back_whatever_happens(path: Path) -> None:
    with pytest.raises(ZeroDivisionError), owned(path, "run.name=a", REMEDY):
        (path.parent / "metrics.jsonl").touch()
        raise ZeroDivisionError
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.jsonl"]
    take(path).release()


def test_a_killed_owner_is_followed_at_once(path: Path) -> None:
    process = start(path)
    assert process.stdout.readline() == "owner\n"
    with pytest.raises(ConfigError, match=f"pid {process.pid}, "):
        take(path)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(ConfigError, match=f"pid {process.pid}, "):
        take(path)
    process.kill()
    process.communicate()
    began = time.monotonic()
    take(path).release()
    assert time.monotonic() - began < lock.WATCH_SECONDS / 2


def test_processes_that_the_owner_started_are_waited_for(path: Path) -> None:
    code = OWNER.replace(
        "    print(\"owner\"", "    import os, subprocess\n"
        "    descriptor = next(int(f) for f in os.listdir('/proc/self/fd')"
        " if os.path.exists(f'/proc/self/fd/{f}') and str(path) in os.readlink(f'/proc/self/fd/{f}'))\n"
        "    subprocess.Popen(['sleep', '0.8'], pass_fds=(descriptor,), stdout=subprocess.DEVNULL)\n"
        "    print(\"owner\"")  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code, str(path), "0", "60"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "owner\n"
    process.kill()
    process.communicate()
    began = time.monotonic()
    take(path).release()
    assert time.monotonic() - began > 0.3


def test_a_process_number_that_was_given_out_again_is_no_owner(path: Path) -> None:
    leave_behind(path, replace(HERE, started=(HERE.started or 0) - 1))
    take(path).release()


@pytest.mark.parametrize("dead", [replace(HERE, started=1), ELSEWHERE], ids=["here", "elsewhere"])
def test_of_many_newcomers_one_wins(path: Path, dead: Identity) -> None:
    leave_behind(path, dead)
    at = time.time() + 2.0
    processes = [start(path, at) for _ in range(8)]
    said = [process.stdout.readline() for process in processes]
    winners = [process.pid for process, line in zip(processes, said, strict=True) if line == "owner\n"]
    assert len(winners) == 1, said
    assert sum(f"refused run.name=a: in use by another process: host {HERE.host}, pid {winners[0]}" in line
               for line in said) == 7, said  # fmt: skip
    for process in processes:
        process.kill()
        process.communicate()


def test_an_owner_on_another_machine_is_dead_when_its_heart_stops(path: Path, quick) -> None:
    leave_behind(path, ELSEWHERE)
    heard: list[str] = []
    with owned(path, "run.name=a", REMEDY, say=heard.append) as ownership:
        ownership.claim.check()
        assert len(heard) == 1 and "host node07, pid 4242" in heard[0]


def test_an_owner_on_another_machine_lives_while_its_heart_beats(
    path: Path, quick, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "WATCH_SECONDS", 30.0)
    with owned(path, "run.name=a", REMEDY, me=ELSEWHERE):
        began = time.monotonic()
        with pytest.raises(ConfigError, match="host node07, pid 4242"):
            take(path)
        assert time.monotonic() - began < 10.0


def test_a_requeued_job_does_not_wait_for_its_last_attempt(path: Path) -> None:
    job = replace(ELSEWHERE, job="SLURM job 77 of big")
    leave_behind(path, job)
    again = replace(HERE, job="SLURM job 77 of big", attempt=1)
    ownership = take(path, again)
    with pytest.raises(ConfigError, match="in use"):
        take(path, again)  # another step of the same attempt
    ownership.release()


def test_what_the_scheduler_calls_this_job() -> None:
    slurm = {"SLURM_JOB_ID": "77", "SLURM_CLUSTER_NAME": "big", "SLURM_RESTART_COUNT": "3"}
    assert (Identity.here(slurm).job, Identity.here(slurm).attempt) == ("SLURM job 77 of big", 3)
    assert (Identity.here({"SLURM_JOB_ID": "77"}).job, Identity.here({}).job) == ("SLURM job 77", None)


def test_an_owner_that_was_passed_over_writes_nothing_more(path: Path, quick) -> None:
    asleep = take(path, ELSEWHERE)
    asleep._exit.close()  # stopped: no heartbeat
    awake = take(path)
    with pytest.raises(ConfigError, match=f"taken over by another owner .host {HERE.host}, pid {HERE.pid}, since"):
        asleep.claim.check()
    with pytest.raises(FileNotFoundError):
        asleep.claim.renew()
    asleep.release()
    awake.claim.check()
    awake.release()
    with pytest.raises(ConfigError, match="was removed"):
        awake.claim.check()


def test_a_heartbeat_changes_the_file_and_nothing_that_it_says(path: Path) -> None:
    with owned(path, "run.name=a", REMEDY) as ownership:
        file = path / ownership.claim.token
        before = file.read_bytes()
        ownership.claim.renew()
        after = file.read_bytes()
        assert before != after and len(before) == len(after)
        assert {**json.loads(before), "beat": ""} == {**json.loads(after), "beat": ""}
        assert json.loads(after)["owner"] == dataclasses.asdict(Identity.here())


def test_a_place_that_cannot_be_made_is_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        take(tmp_path / "file" / "owner.lock")


def test_waiting_can_be_ended(path: Path) -> None:
    leave_behind(path, ELSEWHERE)
    with pytest.raises(WaitEndedError):
        acquire(path, "run.name=a", REMEDY, cancelled=lambda: True)
    assert [entry.name for entry in path.parent.iterdir()] == ["owner.lock"]


def test_a_lock_beside_what_is_made() -> None:
    assert beside(Path("data/books")) == Path.cwd() / "data" / ".books.owner"
