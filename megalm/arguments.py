"""Arguments of the tools. No torch."""

from __future__ import annotations

import argparse
from typing import NoReturn

from megalm.errors import ExitCode


class LineParser(argparse.ArgumentParser):
    """Reports mistakes as lines that say what would be right, without the usage of every option above them."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end."""
        self.exit(ExitCode.BAD_CONFIG, f"{message}\n")
