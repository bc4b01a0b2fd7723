"""How preparing a dataset looks: a bar on a terminal, a line now and then elsewhere, and a summary."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from megalm.data.prepare.card import CARD_FILE, document_marks, smaller_tokenizer
from megalm.data.prepare.left_out import SHARE
from megalm.data.prepare.run import Done
from megalm.data.prepare.summary import Summary

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

    def update(self, phase: str, done: Done) -> None:
        """Called by :func:`megalm.data.prepare.run.prepare`."""
        now = time.perf_counter()
        if phase != self._phase:
            self._begin(phase, done, now)
        seconds = max(now - self._phase_started, 1e-9)
        worked = done.done - done.resumed
        speed = f"{worked / _MEGA / seconds:.1f} MB/s" if done.in_bytes else f"{done.done:,} of {done.total:,}"
        if done.tokens:
            speed += f" · {done.tokens / _MEGA / seconds:.2f} Mtok/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done.done, total=done.total, speed=speed)
        elif now - self._last_line > _LINE_EVERY_SECONDS:
            self._last_line = now
            left = seconds * (done.total - done.done) / max(worked, 1)
            share = done.done / max(done.total, 1)
            print(f"{phase}: {share:.0%} · {speed} · {left:.0f} s left", file=sys.stderr, flush=True)

    def _begin(self, phase: str, done: Done, now: float) -> None:
        self._phase, self._phase_started, self._last_line = phase, now, now
        if self._bar is not None:
            for task in self._bar.task_ids:
                self._bar.remove_task(task)
            self._bar.add_task(phase, total=done.total, speed="")
        if done.resumed:
            print(f"{phase}: goes on at {done.resumed / max(done.total, 1):.0%}", file=sys.stderr, flush=True)


def summary_lines(out: str, summary: Summary, seconds: float) -> list[str]:
    """What a user reads at the end."""
    validation = f"{summary.splits['val'].tokens:,}" if "val" in summary.splits else "no"
    lines = [
        f"{out}: {summary.documents:,} documents, {summary.bytes / _MEGA:.1f} MB ▶ "
        f"{summary.splits['train'].tokens:,} training and {validation} validation tokens, "
        f"vocabulary {summary.vocab_size:,}",
        f"{seconds:.1f} s, {summary.bytes / _MEGA / seconds:.1f} MB/s, {summary.tokens / _MEGA / seconds:.2f} Mtok/s",
        *_change_lines(summary, ""),
    ]
    if (smaller := smaller_tokenizer(summary)) is not None:
        lines.append(smaller)
    if summary.validation is not None:
        own = summary.validation
        lines.append(f"validation: {own.documents:,} documents of {own.source}, {own.bytes / _MEGA:.1f} MB")
        lines += _change_lines(own, "validation: ")
    if summary.document_start:
        lines.append(f"each document {document_marks(summary)}")
    if summary.left_out.kinds:
        lines.append(
            f"left out: {summary.left_out.words:,} words of tables, captions, references and templates, by name "
            f"in {out}/{CARD_FILE}; {summary.left_out.over:,} documents lost more than {SHARE:.0%} of their words"
        )
    for split, rows in summary.rows.items():
        found = [f"{rows.empty[n]:,} of {rows.rows[n]:,} at {n:,} tokens" for n in rows.lengths if rows.empty[n]]
        if found:
            lines.append(f"rows with nothing to learn, by sequence length: {split} {', '.join(found)}")
    return lines


def _change_lines(summary: Summary, prefix: str) -> list[str]:
    """What was not read of a corpus, removed from it, and changed in it."""
    lines = []
    if summary.files_left_out.total():
        lines.append(f"{prefix}files read: {summary.files:,}; left out: {summary.files_left_out.line()}")
    for title, counts in (("removed", summary.removed), ("changed", summary.notes)):
        if counts:
            lines.append(f"{prefix}{title}: " + ", ".join(f"{count:,} {rule}" for rule, count in counts.items()))
    return lines
