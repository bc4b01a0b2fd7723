"""Tasks with their items, checked as far as they can be without a model. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megalm.config.search_path import SearchPath
from megalm.config.violation import Violation, spoken_list
from megalm.errors import ConfigError, DataError, MegalmError
from megalm.evaluate.tasks.data import Item, Source, data_hash, raise_all, read_items
from megalm.evaluate.tasks.few_shot import ExamplePool
from megalm.evaluate.tasks.prompts import Question, Templates, Unusable
from megalm.evaluate.tasks.task import Task
from megalm.evaluate.tasks.task_file import read_task


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What a command line changes of all of its tasks; None: as the task says.

    Attributes:
        examples: worked examples before each item.
        limit: only the first so many items are asked.
        seed: of examples, sampled texts and the bootstrap.
    """

    examples: int | None = None
    limit: int | None = None
    seed: int | None = None

    def of(self, task: Task) -> Task:
        """The task, changed."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return replace(task, **given)


@dataclass(frozen=True)
class LoadedTask:
    """A task and its questions.

    Attributes:
        task: with what the command line changed.
        questions: that are asked, in order; ``limit`` is applied.
        pool: questions that examples are drawn from.
        instruction: what comes before everything.
        data_hash: of all records.
        examples_hash: of those that examples are from; None: they are from the same.
    """

    task: Task
    questions: tuple[Question, ...]
    pool: ExamplePool
    instruction: str
    data_hash: str
    examples_hash: str | None


def load_tasks(
    names: Sequence[str],
    data: Sequence[str] = (),
    changes: Changes | None = None,
    *,
    asked_by: str = "--task",
    data_by: str = "--task-data",
    search_path: SearchPath | None = None,
) -> list[LoadedTask]:
    """Tasks by name or file, with their items read and put as questions.

    Args:
        names: of the tasks.
        data: a file for each of them, in order; none: those that the tasks name.
        changes: of the command line.
        asked_by: what named the tasks, for messages.
        data_by: what named the files.
        search_path: where names are looked for.

    Raises:
        ConfigError: everything wrong with names and task files.
        DataError: data that are missing, or records that a task cannot use.
    """
    if data and len(data) != len(names):
        wrong = f"{len(data)} for the {len(names)} of {asked_by}"
        raise ConfigError(str(Violation(data_by, list(data), wrong, "one for each, in their order, or none")))
    tasks, problems = [], []
    for number, name in enumerate(names):
        try:
            task = (changes or Changes()).of(read_task(name, asked_by=asked_by, search_path=search_path))
            tasks.append(replace(task, data=data[number]) if data else task)
        except ConfigError as error:
            problems += error.lines
    problems += [_without_data(task, data_by) for task in tasks if task.data is None]
    twice = {task.name for task in tasks if [each.name for each in tasks].count(task.name) > 1}
    problems += [f"{asked_by}={name}: there are two tasks of this name; rename one file" for name in sorted(twice)]
    if problems:
        raise ConfigError(problems)
    return _all_loaded(tasks)


def _without_data(task: Task, data_by: str) -> str:
    right = f"{data_by} FILE" if data_by.startswith("-") else f"{data_by}=[FILE]"
    return f"{task.place('data')}: data=null: the task {task.name} names no data; {right}, or data: FILE in a task file"


def _all_loaded(tasks: Sequence[Task]) -> list[LoadedTask]:
    """All tasks, or an error with the problems of all."""
    loaded: list[LoadedTask] = []
    errors: list[MegalmError] = []
    for task in tasks:
        try:
            loaded.append(_loaded(task))
        except MegalmError as error:
            errors.append(error)
    if not errors:
        return loaded
    lines = [line for error in errors for line in str(error).splitlines()]
    if any(isinstance(error, ConfigError) for error in errors):
        raise ConfigError(lines)
    raise DataError("\n".join(lines))


def _loaded(task: Task) -> LoadedTask:
    assert task.data is not None, "checked before"
    templates = Templates(task)
    try:
        instruction = templates.instruction()
    except Unusable as problem:
        raise ConfigError(f"{task.place('instruction')}: {problem}") from None
    items = read_items(Source(task.data, task.hf_config, task.hf_split))
    other = _examples_source(task)
    if other is None:
        questions = _questions(task, templates, items)
        pool, examples_hash = questions, None
    else:
        questions = _questions(task, templates, items[: task.limit])
        example_items = read_items(other)
        pool, examples_hash = _questions(task, templates, example_items), data_hash(example_items)
    loaded = LoadedTask(
        task,
        tuple(questions[: task.limit]),
        ExamplePool(pool, seed=task.seed, shared=task.examples_shared),
        instruction,
        data_hash(items),
        examples_hash,
    )
    _check_examples(loaded, other)
    return loaded


def _examples_source(task: Task) -> Source | None:
    """Where examples are from; None: no examples are asked for, or they are the other items."""
    if not task.examples:
        return None
    assert task.data is not None
    if task.examples_data is not None:
        return Source(task.examples_data, task.hf_config, task.hf_split)
    if task.examples_split is not None:
        return Source(task.data, task.hf_config, task.examples_split)
    return None


def _questions(task: Task, templates: Templates, items: Sequence[Item]) -> list[Question]:
    """All items as questions.

    Raises:
        DataError: with the place of each that the task cannot use.
    """
    questions: list[Question] = []
    problems: list[str] = []
    for item in items[: task.limit if not task.examples else None]:
        try:
            questions.append(templates.question(item))
        except Unusable as problem:
            problems.append(f"{item.place}: {problem} (task {task.name})")
    raise_all(problems)
    return questions


def _check_examples(loaded: LoadedTask, other: Source | None) -> None:
    """There are as many different examples as each item is to have."""
    task = loaded.task
    most = min(loaded.pool.available(question) for question in loaded.questions)
    if task.examples > most:
        where = f"{other.path}" if other is not None else f"{task.data}, the item itself left out,"
        wrong = f"{where} has {most} different ones"
        right = f"at most {most}" if most else spoken_list(["0", "examples_data: FILE of a training set"])
        raise ConfigError(f"{task.place('examples')}: {Violation('examples', task.examples, wrong, right)}")
