"""Standard output and error that may end at any moment: a reader like ``head`` goes, a dropped ssh takes its terminal.

What a command does must not depend on who watches. A command that *works* (trains, prepares, converts, verifies) goes
on in silence, and its exit code tells of the work alone. One that only *prints* ends when nobody can read on, with the
code of a process that a broken pipe ended, never with 0. No torch.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TextIO

from megalm.errors import ExitCode

_DESCRIPTORS = (0, 1, 2)


class OutputLostError(Exception):
    """Standard output of a command that only prints took no more; ``str(error)`` is empty where its reader left.

    No :class:`megalm.errors.MegalmError`: nothing is to be said of it where it is not caught by :func:`run_on_console`.
    """

    def __init__(self, error: Exception) -> None:
        has_reader_left = isinstance(error, OSError) and error.errno == errno.EPIPE
        self.exit_code = ExitCode.BROKEN_PIPE if has_reader_left else ExitCode.BAD_DATA
        super().__init__("" if has_reader_left else f"standard output: {_reason(error)}")


class LastingStream(io.TextIOBase):
    """A text stream that never raises because of what stands behind it.

    What cannot be written is left out. A full disk may have room again; any other error is for good, and the descriptor
    is turned to the null device, so that libraries written in C and processes started later do not meet the same end.

    Args:
        stream: what is written to.
        required: whether a loss raises :class:`OutputLostError` instead: nothing else is the use of the command.
    """

    def __init__(self, stream: TextIO, *, required: bool = False) -> None:
        self._stream = stream
        self._required = required
        self._lost: str | None = None

    @property
    def lost(self) -> str | None:
        """Why the stream takes nothing any more; None while it does."""
        return self._lost

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream."""
        return self._stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """Of the stream."""
        return self._stream.errors

    def write(self, text: str) -> int:
        """Write; the length of ``text``, whatever became of it. Characters that the encoding lacks are escaped."""
        if self._lost is None:
            with self._guarded():
                try:
                    self._stream.write(text)
                except UnicodeEncodeError:
                    encoding = self._stream.encoding
                    self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Flush."""
        if self._lost is None:
            with self._guarded():
                self._stream.flush()

    def isatty(self) -> bool:
        """Whether a terminal is there, still."""
        if self._lost is not None:
            return False
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """Of the stream."""
        return self._stream.fileno()

    def writable(self) -> bool:
        """Yes."""
        return True

    def settle(self) -> None:
        """Flush for the last time: what a full disk still does not take is given up, so that Python's end is quiet."""
        if self._lost is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not getattr(self._stream, "closed", False):
                raise
            if self._required:
                self._give_up(error)
                raise OutputLostError(error) from None
            if not (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)):
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._lost = _reason(error)
        with contextlib.suppress(OSError, ValueError):
            _turn_to_null(self._stream.fileno())
            self._stream.flush()  # what Python held back goes there, too


def run_on_console(command: Callable[[], int], *, works: bool) -> int:
    """Run a command on standard streams that may end at any moment, and return its exit code.

    Args:
        command: writes to ``sys.stdout`` and ``sys.stderr`` as they are meanwhile.
        works: whether its work is worth more than its words: then no loss of its console ends it, a hang-up neither.
            Else it ends with 141, as a process that SIGPIPE ended, when the reader of its output has left, and with 3
            when its output cannot be written. Standard error never ends a command, so that errors keep their codes.
    """
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    out = LastingStream(_opened(sys.stdout, 1), required=not works)
    err = LastingStream(_opened(sys.stderr, 2))
    sys.stdout, sys.stderr = out, err
    try:
        with _ignored_hang_up() if works else contextlib.nullcontext():
            return _to_its_end(command, out)
    except OutputLostError as error:
        if str(error):
            print(error, file=err)
        return error.exit_code
    finally:
        out.settle()
        err.settle()
        if (sys.stdout, sys.stderr) == (out, err):
            sys.stdout, sys.stderr = before


def _to_its_end(command: Callable[[], int], out: LastingStream) -> int:
    """Run, and flush while a loss can still change the exit code."""
    try:
        code = command()
    except SystemExit as end:  # argparse, which has printed help or what is wrong
        if not end.code:
            out.flush()
        raise
    if code == ExitCode.DONE:
        out.flush()
    return code


def _opened(stream: TextIO | None, descriptor: int) -> TextIO:
    """Python has no stream for a descriptor that was closed when it started (``>&-``)."""
    if stream is not None:
        return stream
    return open(descriptor, "w", encoding="utf-8", closefd=False)


def _open_closed_descriptors() -> None:
    """Open the null device in place of a closed standard stream: the next file that is opened would take its number.

    What a library prints would then go into that file, such as a checkpoint's.
    """
    for descriptor in _DESCRIPTORS:
        try:
            os.fstat(descriptor)
        except OSError:
            _turn_to_null(descriptor)


def _turn_to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null == descriptor:
        os.set_inheritable(null, True)
        return
    os.dup2(null, descriptor)
    os.close(null)


@contextlib.contextmanager
def _ignored_hang_up() -> Iterator[None]:
    """SIGHUP says that the terminal has gone, which is no reason to stop; in the main thread, where handlers live."""
    try:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    except ValueError:  # another thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL if before is None else before)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
