"""Options of ``megalm evaluate --task``, and the tasks that they name, checked before a model is loaded. No torch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from megalm.config.arguments import expand_home
from megalm.config.support import LARGEST_INT, LARGEST_INT64
from megalm.config.violation import Violation
from megalm.errors import ConfigError
from megalm.evaluate.memorisation.settings import Memorisation, read_memorisation
from megalm.evaluate.tasks.load import Changes, LoadedTask, load_tasks
from megalm.evaluate.tasks.task_file import TaskFields, read_fields

_RANGES = {
    "examples": (0, LARGEST_INT),
    "limit": (1, LARGEST_INT),
    "seed": (0, LARGEST_INT64),
    "batch_size": (1, LARGEST_INT),
}


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """The options; without ``--task`` the command evaluates on validation data."""
    group = parser.add_argument_group("tasks")
    add = group.add_argument
    add(
        "--task",
        action="append",
        default=[],
        metavar="TASK",
        help="name of a task (conf/task/) or a task file NAME.yaml; may be given several times",
    )
    add(
        "--task-data",
        action="append",
        default=[],
        metavar="FILE",
        help="its data: JSON Lines, or hf:NAME; once for each --task, in their order. Default: what the task names",
    )
    add("--examples", type=int, metavar="K", help="worked examples before each item; default: as the task says")
    add(
        "--limit",
        type=int,
        metavar="N",
        help="only the first N items of each task; of memorisation, N passages of each group",
    )
    add("--seed", type=int, metavar="S", help="of examples, sampled texts and intervals; default: as the task says")
    add("--batch-size", type=int, metavar="N", help="prompts at a time; default: by the model's longest sequence")
    add("--json", action="store_true", help="one JSON object instead of tables")


def tasks_of_options(options: argparse.Namespace) -> tuple[list[LoadedTask], Memorisation | None]:
    """The tasks with their data, or the one task that asks for what the run has read; neither without ``--task``.

    Raises:
        ConfigError: everything wrong with options and task files.
        DataError: data are missing, or hold records that a task cannot use.
    """
    problems = _out_of_range(options)
    if not options.task:
        problems += [str(violation) for violation in _without_task(options)]
    try:
        data = [_at_home(path) for path in options.task_data]
    except ValueError as error:
        problems.append(f"--task-data={' '.join(options.task_data)}: {error}; a path")
        data = []
    memorisation = next((each for each in map(_memorisation, options.task) if each is not None), None)
    if memorisation is not None:
        problems += [str(violation) for violation in _not_of_memorisation(options, memorisation)]
    if problems:
        raise ConfigError(problems)
    if memorisation is not None:
        return [], read_memorisation(memorisation).changed(limit=options.limit, seed=options.seed)
    changes = Changes(examples=options.examples, limit=options.limit, seed=options.seed)
    return (load_tasks(options.task, data, changes) if options.task else []), None


def _memorisation(name: str) -> TaskFields | None:
    """The fields of a task that asks for what the run has read; None: it is another, or none, which is told later."""
    try:
        found = read_fields(name)
    except ConfigError:
        return None
    return found if found.is_memorisation else None


def _not_of_memorisation(options: argparse.Namespace, memorisation: TaskFields) -> Iterator[Violation]:
    """Options that are for tasks with data of their own."""
    name = memorisation.name
    if len(options.task) > 1:
        wrong = f"{name} asks for what the run has read, and no other task goes with it"
        yield Violation(
            "--task", options.task, wrong, f"--task {name} alone, and a command of their own for the others"
        )
    if options.task_data:
        yield Violation("--task-data", options.task_data, f"{name} asks for what the run has read", "leave it out")
    if options.examples is not None:
        yield Violation("--examples", options.examples, f"{name} has prompts without examples", "leave it out")


def _out_of_range(options: argparse.Namespace) -> list[str]:
    problems = []
    for name, (low, high) in _RANGES.items():
        value = getattr(options, name)
        if value is not None and not low <= value <= high:
            problems.append(str(Violation(_spelled(name), value, "out of range", f"{low} to {high}")))
    return problems


def _without_task(options: argparse.Namespace) -> Sequence[Violation]:
    """Options that say something of tasks, where there are none."""
    given = {name: getattr(options, name) for name in ("task_data", "examples", "limit", "seed")}
    wrong, right = "there is no --task that it is for", "--task NAME, or leave it out"
    return [
        Violation(_spelled(name), value, wrong, right)
        for name, value in given.items()
        if value is not None and value != []
    ]


def _at_home(path: str) -> str:
    """A path with the home folder for ``~``; ``hf:`` in front stays."""
    prefix, rest = ("hf:", path.removeprefix("hf:")) if path.startswith("hf:") else ("", path)
    return f"{prefix}{expand_home(rest)}"


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"
