"""Completions as objects of JSON Lines, in the order of the prompts, in a file that an interruption leaves resumable.

While it is written the file is called ``NAME.part``, and ``NAME.part.json`` beside it says what made it. When all is
done it gets its name. A command that finds a part made by the same settings, weights and prompts goes on behind its
last whole line; any other is refused. No torch.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from megalm.errors import ConfigError
from megalm.generate.requests import Completion

WRITTEN = frozenset({"text", "tokens", "finish", "sample", "score", "logprobs", "top_logprobs"})
"""Fields that completions may have; a prompt's own fields have other names."""


def as_objects(fields: Mapping[str, Any], completions: Sequence[Completion]) -> list[dict[str, Any]]:
    """One object per text: the prompt's own fields, then ``text``, ``tokens``, ``finish`` and what was asked for."""
    objects = []
    for number, completion in enumerate(completions):
        made: dict[str, Any] = {**fields, "text": completion.text, "tokens": list(completion.tokens)}
        made["finish"] = completion.finish
        if len(completions) > 1:
            made["sample"] = number
        if completion.score is not None:
            made["score"] = completion.score
        if completion.probabilities is not None:
            made["logprobs"] = [each.log_probability for each in completion.probabilities]
            if any(each.alternatives for each in completion.probabilities):
                made["top_logprobs"] = [
                    [[token, value] for token, value in each.alternatives] for each in completion.probabilities
                ]
        objects.append(made)
    return objects


class OutputFile:
    """A file that is being written; use :func:`output_file`.

    Attributes:
        done: prompts whose objects are in it already.
    """

    def __init__(self, file: TextIO, samples: int, done: int) -> None:
        self._file, self._samples, self.done = file, samples, done
        self._waiting: dict[int, list[dict[str, Any]]] = {}

    def add(self, number: int, objects: list[dict[str, Any]]) -> None:
        """Write the objects of a prompt, as soon as those of all prompts before it are there."""
        self._waiting[number] = objects
        while self.done in self._waiting:
            for each in self._waiting.pop(self.done):
                self._file.write(json.dumps(each, ensure_ascii=False) + "\n")
            self.done += 1
        self._file.flush()


@contextmanager
def output_file(path: Path, made_by: Mapping[str, Any], *, prompts: int, samples: int) -> Iterator[OutputFile]:
    """Open a file to be written, or go on with one that was interrupted.

    Args:
        path: of the complete file.
        made_by: what its contents are a function of, in JSON's types.
        prompts: how many there are in all.
        samples: objects of each.

    Raises:
        ConfigError: the file is there and complete, another process writes it, or a part was made otherwise.
    """
    part, note = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
    if path.exists():
        raise ConfigError(f"--output={path}: exists; another name, or delete it")
    with part.open("a+", encoding="utf-8", errors="backslashreplace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"--output={path}: another process writes it; another name") from None
        if path.exists():  # that other process has just ended
            raise ConfigError(f"--output={path}: exists; another name, or delete it")
        written = _whole_lines(part) // samples
        if written and note.exists():
            _compare(path, part, made_by, json.loads(note.read_text(encoding="utf-8")))
        else:
            written = 0
            note.write_text(json.dumps(made_by, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _cut(file, written * samples)
        opened = OutputFile(file, samples, written)
        yield opened
        if opened.done == prompts:
            file.flush()
            os.fsync(file.fileno())
            part.rename(path)
            note.unlink()


def _compare(path: Path, part: Path, now: Mapping[str, Any], then: Mapping[str, Any]) -> None:
    different = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if different:
        changes = ", ".join(f"{name} {then.get(name)!r} → {now.get(name)!r}" for name in different)
        raise ConfigError(
            f"--output={path}: {part.name} was interrupted and made with other settings ({changes}); those again, "
            "another name, or delete it"
        )


def _whole_lines(part: Path) -> int:
    with part.open("rb") as file:
        return sum(line.endswith(b"\n") for line in file)


def _cut(file: TextIO, lines: int) -> None:
    """Drop what stands behind some whole lines: a line that was interrupted, or some samples of a prompt."""
    with Path(file.name).open("rb") as whole:
        kept = sum(len(next(whole)) for _ in range(lines))
    file.flush()
    os.truncate(file.name, kept)
