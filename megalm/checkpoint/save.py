"""One save, in a thread of its own: training goes on while it is written.

No rank communicates from the thread: collectives of two threads would meet in different orders on different ranks. What
ranks must agree on, they agree on in :meth:`Save.finish`, which all call at the same point of the training loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event, Thread

from megalm.checkpoint.manifest import COMPLETE_FILE
from megalm.checkpoint.store import remove_folder, step_folder
from megalm.checkpoint.writer import (
    CANCELLED,
    Header,
    PieceToWrite,
    complete_checkpoint,
    error_of,
    temporary_folder,
    write_rank,
)
from megalm.errors import CheckpointError

Agree = Callable[[str | None], str | None]
"""Collective: takes this rank's word, returns the first word of any rank (None: no rank has any)."""

INDEX_WAIT_SECONDS = 150.0
"""Longest that rank 0 waits for indexes that all ranks have written. NFS shows another node's new files only when its
cache of attributes expires, by default after a minute at most."""

_WAITING = "waiting"
_POLL_SECONDS = 5.0
"""Ranks that wait for others' disks tell each other so often: no single collective waits for a disk."""


class Save:
    """One rank's part of one checkpoint; it begins to write at once.

    Args:
        folder: the run's checkpoint folder, on a file system that all ranks share.
        header: the same on every rank.
        pieces: what this rank is to write; their values must not change until the save is finished.
        rank: this rank.
        world_size: number of ranks.
        attempt: tells this save from all others of the run; the same on every rank.
        forbidden: asked before the checkpoint comes into being; a reason ends the save.
        on_complete: called in the thread of rank 0 after the checkpoint is complete, such as to delete older ones; what
            it raises is told as a warning.

    Attributes:
        step: the checkpoint's.
        path: of the checkpoint, once it is complete.
        nbytes: of all pieces of all ranks; 0 until rank 0 has completed the checkpoint.
        seconds: from the beginning until this rank's part was done, for rank 0 until the checkpoint was complete.
        warnings: what went wrong without costing the checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        header: Header,
        pieces: Sequence[PieceToWrite],
        *,
        rank: int,
        world_size: int,
        attempt: int | str = 0,
        forbidden: Callable[[], str | None] = lambda: None,
        on_complete: Callable[[], None] = lambda: None,
    ) -> None:
        self.step = header.step
        self.path = folder / step_folder(header.step)
        self.nbytes = 0
        self.seconds = 0.0
        self.warnings: list[str] = []
        self._temporary = temporary_folder(folder, header.step, attempt)
        self._rank = rank
        self._forbidden = forbidden
        self._error: str | None = None
        self._cancelled = Event()
        self._deadline: float | None = None
        self._written = Event()
        self._done = Event()
        self._started = time.monotonic()
        # A daemon: a rank that fails elsewhere must not wait here for ranks that will never write.
        self._thread = Thread(
            target=self._run, args=(header, pieces, world_size, on_complete), name="checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether this rank could not do its part."""
        return self._error is not None

    @property
    def is_complete(self) -> bool:
        """Whether the checkpoint can be loaded; rank 0 alone knows before :meth:`finish`."""
        return self._rank == 0 and self._done.is_set() and not self.failed

    def cancel(self) -> None:
        """Stop writing at once: another rank has failed, so that nothing will come of it."""
        self._cancelled.set()

    def finish(self, agree: Agree) -> None:
        """Wait until the checkpoint is complete; collective over all ranks.

        Raises:
            CheckpointError: on every rank, if any of them could not write; nothing of the save is left, and checkpoints
                before it are untouched.
        """
        error = self._agreed_end(self._written, agree)
        if error is None:
            self._deadline = time.monotonic() + INDEX_WAIT_SECONDS
            error = self._agreed_end(self._done, agree)
        if error is None:
            return
        self.cancel()
        self._done.wait()
        agree(None)  # no rank writes any more
        if self._temporary.exists():
            # On every rank, as the folder may not be shared. What cannot be deleted is ignored, like a torn save.
            error_of(lambda: remove_folder(self._temporary))
        raise CheckpointError(f"checkpoint of step {self.step} was not saved: {error}")

    def join(self, seconds: float | None = None) -> None:
        """Wait for this rank's thread, which may still be deleting older checkpoints."""
        self._thread.join(seconds)

    def linger(self, seconds: float) -> None:
        """Give a save that is under way its chance, before this process ends for another reason; no collective."""
        deadline = time.monotonic() + seconds
        while not self.failed and time.monotonic() < deadline and not (self.path / COMPLETE_FILE).exists():
            time.sleep(_POLL_SECONDS / 50)

    def _agreed_end(self, event: Event, agree: Agree) -> str | None:
        """Wait until all ranks have seen the event; the first error of any."""
        while agree(None if event.wait(_POLL_SECONDS) else _WAITING) is not None:
            pass
        # A rank that was cancelled has no error of its own: the one that failed has it.
        return agree(None if self._error == CANCELLED else self._error)

    def _run(
        self, header: Header, pieces: Sequence[PieceToWrite], world_size: int, on_complete: Callable[[], None]
    ) -> None:
        try:
            self._error = _guarded(
                lambda: write_rank(self._temporary, self._rank, pieces, cancelled=self._cancelled.is_set)
            )
            self._written.set()
            if self._rank == 0 and self._error is None:
                error = _guarded(lambda: self._complete(header, world_size))
                # Then it waited for an index that a rank that failed will not write.
                self._error = CANCELLED if error is not None and self._cancelled.is_set() else error
        finally:
            self.seconds = time.monotonic() - self._started
            self._written.set()
            self._done.set()
        if self.is_complete and (problem := _guarded(on_complete)):
            self.warnings.append(problem)

    def _complete(self, header: Header, world_size: int) -> None:
        self.nbytes = complete_checkpoint(
            self._temporary,
            self.path,
            header,
            world_size,
            given_up=self._given_up,
            forbidden=self._forbidden,
            warn=self.warnings.append,
        )

    def _given_up(self) -> str | None:
        """Why not to wait any longer for other ranks' indexes."""
        if self._cancelled.is_set():
            return CANCELLED
        if self._deadline is not None and time.monotonic() > self._deadline:
            return (
                f"not seen within {INDEX_WAIT_SECONDS:.0f} s of being written; run.dir must be on a file system that "
                "all ranks share"
            )
        return None


def save_checkpoint(
    folder: Path, header: Header, pieces: Sequence[PieceToWrite], *, rank: int, world_size: int, agree: Agree
) -> Path:
    """Write ``folder/step-…`` and wait for it; collective over all ranks. See :class:`Save`.

    Raises:
        CheckpointError: on every rank, if any of them could not write.
    """
    save = Save(folder, header, pieces, rank=rank, world_size=world_size)
    save.finish(agree)
    return save.path


def _guarded(phase: Callable[[], object]) -> str | None:
    """A phase's error; also of a bug, which would otherwise die unseen with the thread."""
    try:
        return error_of(phase)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
