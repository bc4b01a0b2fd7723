"""Rules about one field at a time: ranges, choices, names, and what this version does not do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import gcd
from typing import Any, Protocol

from megalm.config.schema import Config
from megalm.config.support import BOUNDS, CHOICES
from megalm.config.violation import Fix, Violation, spoken_list

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Dataset(Protocol):
    """What the rules need to know of a prepared dataset.

    Attributes:
        location: where it is, as messages name it.
        vocab_size: words of its tokenizer.
        chunk_tokens: tokens per chunk, of which a sequence takes a whole fraction.
        packed_length: the only sequence length of a dataset that was packed; 0: it was not.
    """

    @property
    def location(self) -> str: ...  # noqa: D102

    @property
    def vocab_size(self) -> int: ...  # noqa: D102

    @property
    def chunk_tokens(self) -> int: ...  # noqa: D102

    @property
    def packed_length(self) -> int: ...  # noqa: D102


@dataclass(frozen=True)
class Job:
    """What is checked: a config, the number of ranks it is to run on, and its datasets where they can be read."""

    config: Config
    world_size: int
    datasets: tuple[Dataset, ...] = ()

    @property
    def data_lengths(self) -> tuple[int, ...]:
        """Sequence lengths that all of its datasets take, ascending; none where there are no datasets, or no such."""
        if not self.datasets:
            return ()
        lengths = divisors(gcd(*(dataset.chunk_tokens for dataset in self.datasets)))
        packed = {dataset.packed_length for dataset in self.datasets} - {0}
        return tuple(length for length in lengths if packed <= {length})


def divisors(number: int) -> tuple[int, ...]:
    """All divisors of a positive integer, ascending."""
    small = [candidate for candidate in range(1, int(number**0.5) + 1) if number % candidate == 0]
    return tuple(sorted({*small, *(number // candidate for candidate in small)}))


def value_of(config: Config, path: str) -> Any:
    """The value at a dotted path such as ``parallel.tp``."""
    section, name = path.split(".")
    return getattr(getattr(config, section), name)


def with_value(config: Config, path: str, value: Any) -> Config:
    """A copy of ``config`` with one field changed."""
    section, name = path.split(".")
    changed: Any = {section: replace(getattr(config, section), **{name: value})}
    return replace(config, **changed)


def is_in_bounds(config: Config, path: str) -> bool:
    """Whether a number is within its range, so that other rules can calculate with it."""
    value = value_of(config, path)
    numbers = value if isinstance(value, tuple) else () if value is None else (value,)
    return all(BOUNDS[path].contain(number) for number in numbers)


def numbers_are_in_range(job: Job) -> Iterator[Violation]:
    """Each number lies in its range (``support.BOUNDS``)."""
    for path, bounds in BOUNDS.items():
        if not is_in_bounds(job.config, path):
            yield Violation(path, value_of(job.config, path), "out of range", str(bounds))
    if job.world_size < 1:
        yield Violation("world_size", job.world_size, "no ranks to run on", "at least 1")


def choices_are_known(job: Job) -> Iterator[Violation]:
    """Each named alternative exists (``support.CHOICES``)."""
    for path, choices in CHOICES.items():
        value = value_of(job.config, path)
        if value in choices:
            continue
        yield Violation(path, value, "there is no such choice", f"{path}={spoken_list(choices)}")


def run_has_a_folder_name(job: Job) -> Iterator[Violation]:
    """``run.name`` is one plain folder name, the same on every file system."""
    name = job.config.run.name
    if _FOLDER_NAME.fullmatch(name) and len(name) <= 200:
        return
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:200] or "run1"
    wrong = "a run needs a name" if not name else "not a plain folder name (letters, digits, '.', '_', '-')"
    yield Violation("run.name", name, wrong, fixes=(Fix("run.name", (plain,)),))


def texts_are_not_empty(job: Job) -> Iterator[Violation]:
    """Folders, paths and project names that are given are not empty."""
    remedies = {
        "run.dir": "a folder, such as run.dir=runs",
        "data.cache_dir": "a folder, or data.cache_dir=null",
        "data.path": "the folder of a prepared dataset, such as data.path=data/quickstart",
        "checkpoint.resume": "checkpoint.resume=auto, never or the path of a checkpoint",
        "checkpoint.init_from": "the path of a checkpoint, or checkpoint.init_from=null",
        "checkpoint.finetune_from": "the path of a checkpoint, or checkpoint.finetune_from=null",
        "logging.wandb_project": "a project name, such as logging.wandb_project=megalm",
        "cluster.name": "a name, such as cluster.name=local",
        "cluster.gpu": "a key of hardware.yaml such as cluster.gpu=a100_80gb, or cluster.gpu=null",
    }
    for path, right in remedies.items():
        value = value_of(job.config, path)
        texts = value if isinstance(value, tuple) else () if value is None else (value,)
        if not all(text.strip() for text in texts):
            yield Violation(path, value, "empty", right)


def texts_are_text(job: Job) -> Iterator[Violation]:
    """Texts can be written into files and be names of files: no NUL, no halves of characters."""
    for section in fields(job.config):
        part = getattr(job.config, section.name)
        for item in fields(part):
            value = getattr(part, item.name)
            texts = value if isinstance(value, tuple) else (value,)
            if any(isinstance(text, str) and not _is_text(text) for text in texts):
                yield Violation(f"{section.name}.{item.name}", value, "holds NUL or is not UTF-8", "plain text")


def _is_text(text: str) -> bool:
    return "\0" not in text and text.encode(errors="replace").decode() == text
