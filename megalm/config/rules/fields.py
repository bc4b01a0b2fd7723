"""Rules about every field by itself, whatever its group: ranges, choices, and text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from megalm.config.job import Job, Rule, all_in_bounds, value_of
from megalm.config.support import BOUNDS, CHOICES
from megalm.config.violation import Violation, spoken_list


def numbers_are_in_range(job: Job) -> Iterator[Violation]:
    """Each number lies in its range (``support.BOUNDS``)."""
    for path in BOUNDS:
        if (problem := range_problem(path, value_of(job.config, path))) is not None:
            yield problem
    if job.world_size < 1 and job.config.cluster.gpus >= 0:  # else it is what was refused above
        yield Violation("world_size", job.world_size, "no ranks to run on", "at least 1")


def choices_are_known(job: Job) -> Iterator[Violation]:
    """Each named alternative exists (``support.CHOICES``)."""
    for path in CHOICES:
        if (problem := choice_problem(path, value_of(job.config, path))) is not None:
            yield problem


def range_problem(path: str, value: Any) -> Violation | None:
    """A number, or one of several, that is out of its field's range; None: it is in range, or the field has none."""
    if path not in BOUNDS or all_in_bounds(path, value):
        return None
    return Violation(path, value, "out of range", str(BOUNDS[path]))


def choice_problem(path: str, value: Any) -> Violation | None:
    """A name that is not one of a field's choices; None: it is, or the field has none."""
    if path not in CHOICES or value in CHOICES[path]:
        return None
    return Violation(path, value, "there is no such choice", f"{path}={spoken_list(CHOICES[path])}")


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
        "logging.wandb_entity": "a user or team, or logging.wandb_entity=null",
        "logging.wandb_group": "a name, or logging.wandb_group=null",
        "logging.wandb_tags": "words of which none is empty, or logging.wandb_tags=null",
        "evaluate.tasks": "tasks of which none is empty, or evaluate.tasks=null",
        "evaluate.data": "files of which none is empty, or evaluate.data=null",
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


RULES: tuple[Rule, ...] = (
    numbers_are_in_range,
    choices_are_known,
    texts_are_not_empty,
    texts_are_text,
)
