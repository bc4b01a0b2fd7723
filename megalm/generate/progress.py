"""How far a command is that answers many prompts: a bar on a terminal, a line now and then in a log. No torch."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 30.0


class AskingProgress:
    """Shows on standard error how many of some requests are done, and how many tokens per second that gives.

    Args:
        title: what is done.
        total: requests.
        unit: what requests are called.
        done: requests that were done before.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        self._title, self._total, self._unit, self._done = title, total, unit, done
        self._tokens, self._started, self._told = 0, time.monotonic(), time.monotonic()
        self._bar: Progress | None = None
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(title, total=total, completed=done, rate="")

    def __enter__(self) -> AskingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, requests: int, tokens: int = 0) -> None:
        """More are done."""
        self._done += requests
        self._tokens += tokens
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=self.rate)
        elif time.monotonic() - self._told > _LINE_SECONDS:
            self._told = time.monotonic()
            print(f"{self._title}: {self._done:,} of {self._total:,} {self._unit}  {self.rate}", file=sys.stderr)

    @property
    def rate(self) -> str:
        """Tokens per second, since it began."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{self._tokens / seconds:,.0f} tokens/s" if self._tokens else ""

    def summary(self) -> str:
        """One line when all is done."""
        seconds = time.monotonic() - self._started
        return f"{self._done:,} {self._unit} in {seconds:.1f} s" + (f", {self.rate}" if self._tokens else "")
