"""The owner that a lock's file records, and whether a process of this machine is alive. No torch."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Identity:
    """Who asks.

    Attributes:
        host: for people.
        kernel: of the running system: of two processes with the same one, one can ask after the other.
        pids: the namespace that process numbers are from, as a container has its own.
        pid: process number.
        started: when the process began, in the kernel's ticks; None where the system does not say.
        job: name of the scheduler's job, None outside of any; no other job of the cluster has it.
        attempt: how often the scheduler has requeued the job.
    """

    host: str
    kernel: str
    pids: str
    pid: int
    started: int | None
    job: str | None = None
    attempt: int = 0

    @classmethod
    def here(cls, environ: Mapping[str, str] = os.environ) -> Identity:
        """This process."""
        host = platform.node()
        # torchrun's id is no job's name: users choose it, and "none" is the default.
        number = environ.get("SLURM_JOB_ID")
        restarts = environ.get("SLURM_RESTART_COUNT", "0")
        return cls(
            host=host,
            kernel=_read("/proc/sys/kernel/random/boot_id") or f"host {host}",
            pids=_link("/proc/self/ns/pid"),
            pid=os.getpid(),
            started=_start_of(os.getpid()),
            job=f"SLURM job {number}{_of_cluster(environ)}" if number else None,
            attempt=int(restarts) if restarts.isdigit() else 0,
        )


@dataclass(frozen=True)
class Record:
    """What a lock says of its owner.

    Attributes:
        token: name of the file.
        owner: who it is.
        since: when it took the lock, by its own clock.
        flocked: whether the file system let it hold ``flock`` on the file.
        beat: changes with every heartbeat.
    """

    token: str
    owner: Identity
    since: str
    flocked: bool
    beat: str

    def to_bytes(self) -> bytes:
        """As many for every beat."""
        return (json.dumps(asdict(self)) + "\n").encode()

    @classmethod
    def read(cls, path: Path) -> Record | None:
        """The record of a file; None if there is none in it.

        Raises:
            FileNotFoundError: there is no such file.
        """
        try:
            fields: dict[str, Any] = json.loads(path.read_bytes())
            return cls(**{**fields, "owner": Identity(**fields["owner"])})
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno == errno.ESTALE:  # removed on another host
                raise FileNotFoundError(path) from None
            return None
        except (ValueError, TypeError, KeyError):
            return None

    def describe(self, heard_seconds: float) -> str:
        """The owner for people: where, what, since when, and when it was last heard of."""
        job = f", {self.owner.job}" if self.owner.job else ""
        again = f" (restart {self.owner.attempt})" if self.owner.attempt else ""
        return (
            f"host {self.owner.host}, pid {self.owner.pid}{job}{again}, since {self.since}, "
            f"last heartbeat {max(heard_seconds, 0.0):.0f} s ago"
        )


def is_alive(record: Record, path: Path, me: Identity) -> bool | None:
    """Whether the owner that a file names lives, as far as this machine can tell; None: only its heartbeat can."""
    owner = record.owner
    if owner.job is not None and owner.job == me.job and owner.attempt < me.attempt:
        return False  # a job that is run again has ended before
    if owner.kernel != me.kernel:
        return None
    if owner.pids == me.pids:
        return _exists(owner.pid) if owner.started is None else _start_of(owner.pid) == owner.started
    return is_flocked(path) if record.flocked else None  # a container next door


def flock(descriptor: int) -> bool:
    """Lock a file; False where the file system has no locks, or another has this one."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_flocked(path: Path) -> bool:
    """Whether another process holds :func:`flock` on a file; those who ask do not disturb each other."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def _start_of(pid: int) -> int | None:
    """When a process began, in ticks since the machine did; None: there is none, or it has only to be waited for."""
    text = _read(f"/proc/{pid}/stat")
    fields = text.rpartition(")")[2].split()  # its name may hold anything
    return int(fields[19]) if len(fields) > 19 and fields[0] not in ("Z", "X") else None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _of_cluster(environ: Mapping[str, str]) -> str:
    name = environ.get("SLURM_CLUSTER_NAME")
    return f" of {name}" if name else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""
