"""Where ranks write: each has ``logs/rank-N.log``; rank 0 writes to the terminal too."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TextIO

from megalm.errors import ConfigError
from megalm.launch.console import LastingStream
from megalm.launch.discovery import MPIRUN, RankInfo

LOGS_FOLDER = "logs"

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""ANSI control sequences: colours and cursor movements."""


def log_path(run_dir: Path, rank: int) -> Path:
    """The log of one rank."""
    return run_dir / LOGS_FOLDER / f"rank-{rank}.log"


class Console:
    """Where the user looks: this process's standard error when it began.

    Libraries written in C (torch's store, gloo, NCCL) write what they think of a lost peer, stack frames included, to
    standard error. From :meth:`hold_back_libraries` on that is kept in memory, and goes to the log once there is one.
    """

    def __init__(self) -> None:
        self._descriptor = os.dup(2)
        self._encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
        self._held: int | None = None

    def is_same(self, stream: TextIO) -> bool:
        """Whether what is written to a stream is seen here."""
        return os.path.sameopenfile(stream.fileno(), self._descriptor)

    def write(self, text: str) -> None:
        """Show a text; characters that the terminal has not are spelled. Nobody looks at a closed one."""
        rest = text.encode(self._encoding, errors="backslashreplace")
        with contextlib.suppress(OSError):
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]

    def hold_back_libraries(self, rank: RankInfo) -> None:
        """Keep from the console what is written to standard error, but by rank 0's Python."""
        sys.stderr.flush()
        if hasattr(os, "memfd_create"):
            self._held = os.memfd_create("held")
        else:
            with tempfile.TemporaryFile() as file:
                self._held = os.dup(file.fileno())
        os.dup2(self._held, 2)
        if rank.rank == 0:
            own = os.dup(self._descriptor)
            stream = os.fdopen(own, "w", buffering=1, encoding=self._encoding, errors="backslashreplace")
            sys.stderr = LastingStream(stream)

    def held_back(self) -> str:
        """What libraries have written since."""
        if self._held is None:
            return ""
        return os.pread(self._held, os.fstat(self._held).st_size, 0).decode(errors="replace")


def start_log(run_dir: Path, rank: RankInfo, console: Console | None = None) -> None:
    """Send this rank's output to its log, which earlier attempts of the run have begun.

    Ranks above 0 write nowhere else, libraries written in C included. Rank 0 keeps its terminal, so that a progress bar
    still finds one; its log gets a copy of what Python prints (all of it once the terminal is gone) and, given the
    console, what libraries write to standard error.

    Raises:
        ConfigError: the folder cannot be made, or the log not written.
    """
    path = log_path(run_dir, rank.rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("a", encoding="utf-8", errors="backslashreplace", buffering=1)
    except OSError as error:
        raise ConfigError(
            f"run.dir: rank {rank.rank} cannot write {path} ({error.strerror}); a folder that can be written"
        ) from None
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    log.write(f"--- {now} rank {rank.rank} of {rank.world_size} ({rank.launcher}), {rank.device}, pid {os.getpid()}\n")
    if console is not None:
        sys.stderr.flush()
        log.write(console.held_back())
        os.dup2(log.fileno(), 2)
    if rank.rank == 0:
        # mpirun gives ranks a terminal of its own making, and passes on what they draw to wherever it writes itself.
        is_terminal = rank.launcher != MPIRUN
        sys.stdout = Tee(sys.stdout, log, may_draw=is_terminal)
        sys.stderr = Tee(sys.stderr, log, may_draw=is_terminal)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = LastingStream(log)


class Tee(io.TextIOBase):
    """Text that goes to a terminal (or what stands in for it) and, as whole lines, to a log.

    A progress bar redraws its line after a carriage return; the log gets a line only when it is finished, as it last
    looked and without colours.
    """

    def __init__(self, terminal: TextIO, log: TextIO, *, may_draw: bool = True) -> None:
        self._terminal = terminal
        self._may_draw = may_draw
        self._log = log
        self._line = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The terminal's encoding, which decides whether rich draws in ASCII."""
        return self._terminal.encoding

    def write(self, text: str) -> int:
        """Write everywhere."""
        with self._noticing_loss():
            self._terminal.write(text)
        *finished, self._line = (self._line + text).split("\n")
        for line in finished:
            self.write_log(_as_last_drawn(line) + "\n")
        redrawn = self._line.rpartition("\r")[2]
        self._line = redrawn or self._line
        return len(text)

    @property
    def lost(self) -> str | None:
        """Why the terminal takes nothing any more; None while it does."""
        return getattr(self._terminal, "lost", None)

    def write_log(self, text: str) -> None:
        """Write to the log alone. What a full disk does not take is left out: the terminal has it."""
        with contextlib.suppress(OSError):
            self._log.write(text)

    def flush(self) -> None:
        """Flush both."""
        with self._noticing_loss():
            self._terminal.flush()
        with contextlib.suppress(OSError):
            self._log.flush()

    @contextlib.contextmanager
    def _noticing_loss(self) -> Iterator[None]:
        """Should the terminal end, say so in the log, which then gets what libraries written in C print, too."""
        had_terminal = self.lost is None
        yield
        if had_terminal and self.lost is not None:
            self.write_log(f"the console is gone ({self.lost}): what follows is in this log alone\n")
            with contextlib.suppress(OSError):
                os.dup2(self._log.fileno(), self._terminal.fileno())

    def isatty(self) -> bool:
        """Whether the terminal is one, and a person sees it."""
        return self._may_draw and self._terminal.isatty()

    def fileno(self) -> int:
        """The terminal's descriptor."""
        return self._terminal.fileno()

    def writable(self) -> bool:
        """Yes."""
        return True


def _as_last_drawn(line: str) -> str:
    return _ESCAPE.sub("", line).rstrip("\r").rpartition("\r")[2]
