"""How preparing a dataset looks: a bar on a terminal, a line now and then elsewhere, and a summary."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megalm.data.dataset import DatasetInfo
from megalm.data.prepare import Counts

_LINE_EVERY_SECONDS = 15.0
_MEGA = 1e6


class PrepareProgress:
    """Shows MB/s, tokens/s and the time left; a context manager."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)
        self._phase = ""
        self._phase_started = self._last_line = time.perf_counter()

    def __enter__(self) -> PrepareProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, phase: str, done: int, total: int, counts: Counts) -> None:
        """Called by :func:`megalm.data.prepare.prepare`."""
        now = time.perf_counter()
        if phase != self._phase:
            self._phase, self._phase_started, self._last_line = phase, now, now
            if self._bar is not None:
                for task in self._bar.task_ids:
                    self._bar.remove_task(task)
                self._bar.add_task(phase, total=total, speed="")
        seconds = max(now - self._phase_started, 1e-9)
        speed = f"{done / _MEGA / seconds:.1f} MB/s"
        if counts.tokens:
            speed += f" · {counts.tokens / _MEGA / seconds:.2f} Mtok/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, speed=speed)
        elif now - self._last_line > _LINE_EVERY_SECONDS:
            self._last_line = now
            left = seconds * (total - done) / max(done, 1)
            print(f"{phase}: {done / max(total, 1):.0%} · {speed} · {left:.0f} s left", file=sys.stderr, flush=True)


def summary(info: DatasetInfo, counts: Counts | None) -> str:
    """What a user reads at the end; ``counts`` is None where the dataset was there already."""
    sizes = f"{info.train_tokens:,} training and {info.val_tokens:,} validation tokens, vocabulary {info.vocab_size:,}"
    if counts is None:
        return f"{info.path}: up to date ({sizes})"
    lines = [
        f"{info.path}: {counts.documents:,} documents, {counts.bytes / _MEGA:.1f} MB ▶ {sizes}",
        f"{counts.seconds:.1f} s, {counts.bytes / _MEGA / counts.seconds:.1f} MB/s",
    ]
    if counts.empty or counts.undecodable:
        lines.append(
            f"{counts.empty} empty documents left out, "
            f"{counts.undecodable} with bytes that are no UTF-8 (replaced by U+FFFD)"
        )
    return "\n".join(lines)
