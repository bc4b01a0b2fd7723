"""The errors a user can cause, each with the exit code that scripts rely on.

A :class:`MegalmError` is printed as plain lines, without a traceback: its text says what is wrong, with the value,
and what would be right. Anything else that escapes is a bug (exit code 70) and keeps its traceback.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of ``megalm train``, by which a job script decides whether to requeue; and of the other commands.

    Not proven is what ``megalm verify`` may find. A broken pipe ends commands that only print,
    never one that works.
    """

    DONE = 0
    PEER_FAILED = 1
    """Of a rank that lost the others and cannot ask why: the smallest, since srun reports the largest of all ranks."""
    BAD_CONFIG = 2
    BAD_DATA = 3
    DIVERGED = 4
    NOT_PROVEN = 5
    BUG = 70
    REQUEUE = 85
    INTERRUPTED = 130
    BROKEN_PIPE = 141


class MegalmError(Exception):
    """A problem that the user can solve; ``str(error)`` is one or more whole lines for the terminal."""

    exit_code = ExitCode.BUG


class ConfigError(MegalmError):
    """The configuration, the layout or the command line is wrong. Carries every violation found, one per line."""

    exit_code = ExitCode.BAD_CONFIG

    def __init__(self, lines: str | list[str]) -> None:
        self.lines = [lines] if isinstance(lines, str) else list(lines)
        super().__init__("\n".join(self.lines))


class DataError(MegalmError):
    """A dataset is missing, unfinished, corrupt, or not the one that the run was started with."""

    exit_code = ExitCode.BAD_DATA


class CheckpointError(MegalmError):
    """A checkpoint that was named, or found, cannot be loaded; nothing is ever trained from scratch instead."""

    exit_code = ExitCode.BAD_DATA


class DivergedError(MegalmError):
    """Loss or gradient norm is not finite and the policy gave up."""

    exit_code = ExitCode.DIVERGED
