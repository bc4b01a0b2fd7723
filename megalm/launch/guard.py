"""What a command raises, as a line and an exit code: a traceback is for bugs of megalm alone. No torch.

Errors of the user's world reach a command in many places: a folder that cannot be made, a disk that is full, memory
that is short. Where more is known, a :class:`MegalmError` says more; what is left is said here.
"""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable, Sequence

from megalm.config.violation import format_value
from megalm.errors import ConfigError, DataError, ExitCode, MegalmError
from megalm.launch.console import OutputLostError

_OF_THE_WORLD = frozenset(
    {
        errno.EACCES,
        errno.EAGAIN,
        errno.EBUSY,
        errno.EDQUOT,
        errno.EEXIST,
        errno.EFBIG,
        errno.EHOSTUNREACH,
        errno.EIO,
        errno.EISDIR,
        errno.ELOOP,
        errno.EMFILE,
        errno.ENAMETOOLONG,
        errno.ENFILE,
        errno.ENODEV,
        errno.ENOENT,
        errno.ENOMEM,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.ENOTEMPTY,
        errno.ENXIO,
        errno.EPERM,
        errno.EROFS,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EXDEV,
    }
)
"""What a machine, its disks and its limits refuse; any other code is something that megalm did wrong."""

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "std::bad_alloc")
_SMALLER = "a smaller train.micro_batch_size, engine.recompute=full, more ranks, or a machine with more"


def guarded(command: Callable[[], int], *, interrupted: str = "interrupted") -> int:
    """Run a command; what it raises becomes a line and an exit code.

    Args:
        command: returns its exit code.
        interrupted: what to say after Ctrl-C.
    """
    try:
        return command()
    except OutputLostError:
        raise
    except MegalmError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except SystemExit as end:  # argparse has printed help, or what is wrong with an option
        return end.code if isinstance(end.code, int) else ExitCode.DONE
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return ExitCode.INTERRUPTED
    except Exception as error:
        known = explained(error)
        if known is None:
            traceback.print_exc()
            return ExitCode.BUG
        print(known, file=sys.stderr)
        return known.exit_code


def explained(error: BaseException) -> MegalmError | None:
    """What an error of the user's world says, as one line; None: it is none, but a bug."""
    if isinstance(error, MegalmError):
        return error
    if isinstance(error, OSError) and error.errno in _OF_THE_WORLD:
        where = f"{format_value(_as_text(error.filename))}: " if error.filename is not None else ""
        reason = (error.strerror or str(error)).splitlines()[0]
        return DataError(f"{where}{reason}")
    if isinstance(error, MemoryError) or _is_out_of_memory(error):
        first = (str(error).splitlines() or [""])[0]
        return ConfigError(f"out of memory{f' ({first})' if first else ''}: {_SMALLER}")
    return None


def check_text(arguments: Sequence[str]) -> None:
    """Refuse arguments that are no text: bytes that are not UTF-8 reach Python as half characters, and NUL ends names.

    Raises:
        ConfigError: with a line for each.
    """
    problems = []
    for argument in arguments:
        if "\0" in argument:
            problems.append(f"{format_value(argument)}: holds a NUL character; text without one")
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            shown = argument.encode("utf-8", "backslashreplace").decode()
            problems.append(
                f"{format_value(shown)}: not UTF-8 at character {error.start + 1}; text in UTF-8 (the terminal's "
                "encoding, or `iconv -f latin1 -t utf-8`)"
            )
    if problems:
        raise ConfigError(problems)


def _is_out_of_memory(error: BaseException) -> bool:
    """Of torch's allocators, whose errors are RuntimeErrors."""
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)


def _as_text(filename: object) -> str:
    return filename.decode(errors="backslashreplace") if isinstance(filename, bytes) else str(filename)
