"""Arguments of the tools. No torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from megalm.errors import ExitCode


class LineParser(argparse.ArgumentParser):
    """Reports mistakes as lines that say what would be right, without the usage of every option above them."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end."""
        self.exit(ExitCode.BAD_CONFIG, f"{message}\n")


def user_path(text: str) -> str:
    """A path, for ``type=``: ``~`` and ``~user`` are the home folder, also where the shell has left them.

    Raises:
        argparse.ArgumentTypeError: there is no such user.
    """
    try:
        return expand_home(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def expand_home(text: str) -> str:
    """A path with the home folder for ``~`` or ``~user`` at its beginning; any other text as it is.

    Raises:
        ValueError: there is no such user.
    """
    if not text.startswith("~"):
        return text
    head, slash, rest = text.partition("/")
    try:
        return f"{Path(head).expanduser()}{slash}{rest}"
    except RuntimeError:
        raise ValueError(f"there is no home folder of {head[1:] or 'this user'!r}; ./{text} is a folder here") from None
