"""Proof of ownership, checked before each write, and the heartbeat that keeps the lock. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from megalm.errors import ConfigError
from megalm.ownership.record import Record

BEAT_SECONDS = 5.0
"""Seconds between heartbeats."""

_REMOVED_OPEN_PREFIX = ".nfs"
"""Prefix that an NFS client gives a file that was removed while open."""
_GRACE_SECONDS = 0.2


@dataclass(frozen=True)
class Claim:
    """Proof of ownership that can be sent to other processes of the owner.

    Attributes:
        lock: the lock's folder, as this process names it.
        token: of the owner.
        what: is owned, as messages name it.
    """

    lock: Path
    token: str
    what: str

    def check(self) -> None:
        """Ask whether the lock is held still, before something is written.

        Raises:
            ConfigError: another has taken it, as this process was stopped or its machine slept; or it was removed.
        """
        if (problem := self.problem()) is not None:
            raise ConfigError(problem)

    def problem(self) -> str | None:
        """Why nothing may be written any more; None if the lock is still held."""
        try:
            os.close(os.open(self.lock / self.token, os.O_RDONLY))  # unlike stat, it makes an NFS client ask the server
        except (FileNotFoundError, NotADirectoryError):
            return self._loss()
        except OSError as error:
            return self._loss() if error.errno == errno.ESTALE else None  # a disk that does not answer proves nothing
        return None

    def _loss(self) -> str:
        with contextlib.suppress(OSError):
            for path in entries_of(self.lock):
                if record := Record.read(path):
                    owner = f"host {record.owner.host}, pid {record.owner.pid}, since {record.since}"
                    return (
                        f"{self.what}: taken over by another owner ({owner}) while this process was stopped or not "
                        "heard of; it ends here and writes nothing more"
                    )
        return f"{self.what}: its lock {self.lock} was removed; this process ends here and writes nothing more"

    @contextmanager
    def kept_alive(self) -> Iterator[None]:
        """A thread that renews the heartbeat, for as long as this process lives and the lock is held."""
        stop = threading.Event()
        thread = threading.Thread(target=self._beat_until, args=(stop,), name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(_GRACE_SECONDS)  # a disk that does not answer holds nobody up

    def _beat_until(self, stop: threading.Event) -> None:
        while not stop.wait(BEAT_SECONDS):
            try:
                self.renew()
            except FileNotFoundError:
                return
            except OSError:
                continue

    def renew(self) -> None:
        """One heartbeat: written over the last one, in one go.

        Raises:
            FileNotFoundError: the lock is lost.
        """
        path = self.lock / self.token
        record = Record.read(path)
        if record is None:
            return
        descriptor = os.open(path, os.O_WRONLY)
        try:
            os.pwrite(descriptor, replace(record, beat=beat_now()).to_bytes(), 0)
            os.fsync(descriptor)  # or other hosts would not see it
        finally:
            os.close(descriptor)


def beat_now() -> str:
    """What a heartbeat writes: as many characters each time, never the same."""
    return f"{time.time_ns():020d}"


def entries_of(lock: Path) -> list[Path]:
    """The files of a lock's folder: one, or none while it changes hands."""
    try:
        return sorted(path for path in lock.iterdir() if not path.name.startswith(_REMOVED_OPEN_PREFIX))
    except (FileNotFoundError, NotADirectoryError):
        return []
