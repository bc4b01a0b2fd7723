"""Where ranks write: each has ``logs/rank-N.log``; rank 0 writes to the terminal too."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import TextIO

from megalm.console import LastingStream
from megalm.launch.discovery import MPIRUN, RankInfo

_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""ANSI control sequences: colours and cursor movements."""


def log_path(run_dir: Path, rank: int) -> Path:
    """The log of one rank."""
    return run_dir / "logs" / f"rank-{rank}.log"


def start_log(run_dir: Path, rank: RankInfo) -> None:
    """Send this rank's output to its log, which earlier attempts of the run have begun.

    Ranks above 0 write nowhere else, libraries written in C included. Rank 0 keeps its terminal, so that a progress bar
    still finds one; its log gets a copy of what Python prints, and all of it once the terminal is gone.
    """
    path = log_path(run_dir, rank.rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("a", encoding="utf-8", buffering=1)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    log.write(f"--- {now} rank {rank.rank} of {rank.world_size} ({rank.launcher}), {rank.device}, pid {os.getpid()}\n")
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
