"""Acquires a lock, free or left by a dead owner, and releases it. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from megalm.errors import ConfigError, ExitCode, MegalmError
from megalm.ownership.claim import Claim, beat_now, entries_of
from megalm.ownership.record import Identity, Record, flock, is_alive, is_flocked

STALE_SECONDS = 60.0
"""An owner on another machine that was not heard of for so long is dead."""

WATCH_SECONDS = 20.0
"""Shortest that a silent heartbeat is watched, however old it looks: clocks of file servers are not to be relied on."""

_POLL_SECONDS = 0.2
_DYING_SECONDS = 10.0
"""Longest that the processes of an owner that is gone may need to end."""
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)
_GONE = (errno.ENOENT, errno.ESTALE)

Say = Callable[[str], object]


class WaitEndedError(MegalmError):
    """A signal came while a silent owner's heartbeat was watched; nothing had begun."""

    exit_code = ExitCode.INTERRUPTED


@dataclass
class Ownership:
    """A lock that this process holds; see :func:`owned`.

    Attributes:
        claim: proof of it.
        descriptor: an open file; processes that inherit it keep ``flock`` held until they have ended, too.
        made: the folders that were made for the lock, innermost first; they go with it if nothing else came into them.
    """

    claim: Claim
    descriptor: int
    made: tuple[Path, ...] = ()
    _exit: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self.descriptor < 0:
            return
        self._exit.close()
        with contextlib.suppress(OSError):
            (self.claim.lock / self.claim.token).unlink()
        os.close(self.descriptor)
        self.descriptor = -1
        with contextlib.suppress(OSError):  # another may be there by now
            self.claim.lock.rmdir()
            for folder in self.made:
                folder.rmdir()


@contextmanager
def owned(
    lock: Path,
    what: str,
    remedy: str,
    *,
    say: Say = lambda _: None,
    me: Identity | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Ownership]:
    """Hold a lock while the block runs.

    Args:
        lock: the lock's folder; its parent is made where it does not exist.
        what: is owned, as messages name it: ``run.name=try1``.
        remedy: what else a second owner could do.
        say: called with the reason for a wait.
        me: this process.
        cancelled: polled while waiting; True ends the wait.

    Raises:
        ConfigError: another live process owns it.
        OSError: the lock cannot be made.
        WaitEndedError: cancelled.
    """
    ownership = acquire(lock, what, remedy, say=say, me=me, cancelled=cancelled)
    try:
        yield ownership
    finally:
        ownership.release()


def acquire(
    lock: Path,
    what: str,
    remedy: str,
    *,
    say: Say = lambda _: None,
    me: Identity | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Ownership:
    """As :func:`owned`; the caller releases."""
    newcomer = _Newcomer(what, remedy, me or Identity.here(), say, cancelled)
    token = secrets.token_hex(8)
    prepared = lock.with_name(f"{lock.name}.{token}")
    made = tuple(folder for folder in lock.parents if not folder.exists())
    if made:
        lock.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as undo:
        undo.callback(shutil.rmtree, prepared, ignore_errors=True)
        descriptor = _prepare(prepared, token, newcomer.me)
        undo.callback(os.close, descriptor)
        _take(lock, prepared, newcomer)
        undo.pop_all()
    _remove_leftovers(lock, newcomer.me)
    ownership = Ownership(Claim(lock, token, what), descriptor, made)
    ownership._exit.enter_context(ownership.claim.kept_alive())
    return ownership


def beside(path: Path) -> Path:
    """The lock for a file or folder that is going to be put in its place by a rename."""
    return path.absolute().with_name(f".{path.name}.owner")


def _prepare(folder: Path, token: str, me: Identity) -> int:
    """A folder that needs only to be renamed; the descriptor of the file in it, which is this process's alone."""
    folder.mkdir()
    descriptor = os.open(folder / token, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        os.write(descriptor, Record(token, me, since, flock(descriptor), beat_now()).to_bytes())
        os.fsync(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@dataclass(frozen=True)
class _Newcomer:
    """Who wants a lock, and how it is told of it."""

    what: str
    remedy: str
    me: Identity
    say: Say
    cancelled: Callable[[], bool]

    def pause(self) -> None:
        if self.cancelled():
            raise WaitEndedError(f"{self.what}: stopped while waiting for its lock; nothing was begun")
        time.sleep(_POLL_SECONDS)

    def refused(self, who: str) -> ConfigError:
        return ConfigError(f"{self.what}: in use by another process: {who}; {self.remedy}")


def _take(lock: Path, prepared: Path, newcomer: _Newcomer) -> None:
    """Rename the prepared folder to the lock's name, once no live process owns it."""
    deadline = time.monotonic() + STALE_SECONDS
    while True:
        with contextlib.suppress(OSError):
            lock.rmdir()  # an empty one is nobody's; not every file system renames over it
        try:
            prepared.rename(lock)
            return
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
        entries = entries_of(lock)
        for path in entries:
            _end_if_alive(path, prepared, newcomer)
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
        if not entries:  # it is being released, or taken
            newcomer.pause()
            if time.monotonic() > deadline:
                raise newcomer.refused(f"{lock} cannot be emptied")


def _end_if_alive(path: Path, prepared: Path, newcomer: _Newcomer) -> None:
    """Raise ConfigError if an owner lives; return once it is known to be dead, or gone."""
    try:
        record = Record.read(path)
        heard = _age(path, prepared)
        alive = None if record is None else is_alive(record, path, newcomer.me)
        if record is not None and alive:
            raise newcomer.refused(record.describe(heard))
        if record is None or alive is None:
            _watch(path, record, heard, newcomer)
        elif record.flocked and record.owner.kernel == newcomer.me.kernel and not _released(path, newcomer):
            raise newcomer.refused(f"{record.describe(heard)}; it has ended, processes that it started have not yet")
    except OSError as error:
        if error.errno not in _GONE:
            raise


def _released(path: Path, newcomer: _Newcomer) -> bool:
    """Whether the processes that a dead owner started have ended too, as they do with it; waits for them."""
    deadline = time.monotonic() + _DYING_SECONDS
    while is_flocked(path):
        if time.monotonic() > deadline:
            return False
        newcomer.pause()
    return True


def _watch(path: Path, record: Record | None, heard_seconds: float, newcomer: _Newcomer) -> None:
    """Return once a heartbeat has not changed for long enough; raise ConfigError when it does."""
    seconds = max(STALE_SECONDS - heard_seconds, WATCH_SECONDS)
    who = "an owner that cannot be told" if record is None else record.describe(heard_seconds)
    newcomer.say(
        f"{newcomer.what}: the lock is held by {who}; it is on another machine, so its heartbeat is watched: without "
        f"one in {seconds:.0f} s the lock is taken over"
    )
    before = path.read_bytes()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        newcomer.pause()
        if path.read_bytes() != before:
            now = Record.read(path) or record
            raise newcomer.refused(who if now is None else now.describe(0.0))


def _age(path: Path, prepared: Path) -> float:
    """Seconds since a file was written, by the clock of the file system that also dates a file written now."""
    probe = prepared.with_name(f"{prepared.name}.now")
    try:
        probe.write_bytes(b"")
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _remove_leftovers(lock: Path, me: Identity) -> None:
    """Remove what newcomers that were killed had prepared, as far as this machine can tell."""
    for folder in lock.parent.glob(f"{lock.name}.*"):
        with contextlib.suppress(OSError):
            records = [(path, Record.read(path)) for path in entries_of(folder)]
            if records and all(record and is_alive(record, path, me) is False for path, record in records):
                shutil.rmtree(folder)
