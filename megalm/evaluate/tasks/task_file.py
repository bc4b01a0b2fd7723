"""Task files, read strictly: everything that is wrong with one is said at once, with file, line and field. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megalm.config.arguments import expand_home
from megalm.config.search_path import TASK_FOLDER, SearchPath
from megalm.config.violation import Violation, close_matches, spoken_list
from megalm.config.yaml_file import YamlFile, read_yaml, shown_path
from megalm.errors import ConfigError
from megalm.evaluate.tasks.metrics.registry import EXTRA, METRICS, metric_kind, missing_library, names_of
from megalm.evaluate.tasks.task import CLOZE, GENERATION, KINDS, MEMORISATION, MULTIPLE_CHOICE, MetricChoice, Task
from megalm.evaluate.tasks.task_values import CHECKS, Wrong

BASE = "base"
"""The field by which a file takes over what another task says."""

_SUFFIXES = (".yaml", ".yml")


def task_names(search_path: SearchPath | None = None) -> list[str]:
    """The tasks that can be named: those that megalm ships, and those of ``./conf/task``."""
    return (search_path or SearchPath.of()).tasks()


@dataclass(frozen=True)
class TaskFields:
    """A task file as it is read, with those of its base; values are not checked.

    Attributes:
        name: of the task.
        values: field ▶ value.
        places: field ▶ file and line where it is set; empty text ▶ the file.
    """

    name: str
    values: Mapping[Any, Any]
    places: Mapping[str, str]

    @property
    def is_memorisation(self) -> bool:
        """Whether its items are the run's own training text, so that it is no :class:`Task`."""
        return bool(self.values.get("kind") == MEMORISATION)


def read_fields(name: str, *, asked_by: str = "--task", search_path: SearchPath | None = None) -> TaskFields:
    """A task's fields by its name or its file.

    Args:
        name: of ``conf/task/NAME.yaml``, or the path of a file that ends with ``.yaml``.
        asked_by: what named it, for messages.
        search_path: where names are looked for; None: ``./conf``, then megalm's own.

    Raises:
        ConfigError: there is no such task, or its file cannot be read.
    """
    found = search_path or SearchPath.of()
    file = _file_of(name, asked_by, found)
    values, places = _with_base(read_yaml(file), found, (file.resolve(),))
    return TaskFields(file.stem, values, {**places, "": shown_path(file)})


def read_task(name: str, *, asked_by: str = "--task", search_path: SearchPath | None = None) -> Task:
    """A task that has data, by its name or its file; arguments as of :func:`read_fields`.

    Raises:
        ConfigError: there is no such task, or its file is wrong: everything that is, one per line; or its items are
            the run's own training text.
    """
    found = read_fields(name, asked_by=asked_by, search_path=search_path)
    if found.is_memorisation:
        wrong = "asks a trained model for what the run has read until then"
        right = f"megalm evaluate RUN --task {name}, after training"
        raise ConfigError(str(Violation(asked_by, name, wrong, right)))
    return _Reader(found.values, found.places).task(found.name)


def _file_of(name: str, asked_by: str, search_path: SearchPath) -> Path:
    if name.endswith(_SUFFIXES):
        try:
            path = Path(expand_home(name))
        except ValueError as error:
            raise ConfigError(str(Violation(asked_by, name, str(error), "a task file, or a task's name"))) from None
        if path.is_file():
            return path
        raise ConfigError(str(Violation(asked_by, name, "there is no such file", "a task file, or a task's name")))
    found = search_path.find(f"{TASK_FOLDER}/{name}")
    if found is not None:
        return found
    known = search_path.tasks()
    close = close_matches(name, known)
    right = f"did you mean {spoken_list(close)}?" if close else f"{spoken_list(known)}, or a file NAME.yaml"
    raise ConfigError(str(Violation(asked_by, name, "there is no such task", right)))


def _with_base(
    file: YamlFile, search_path: SearchPath, seen: tuple[Path, ...]
) -> tuple[dict[Any, Any], dict[str, str]]:
    """A file's fields over those of its base, and where each is set; ``settings`` are merged by name."""
    values = {key: value for key, value in file.values.items() if key != BASE}
    places = {str(key): file.place(str(key)) for key in values}
    if BASE not in file.values:
        return values, places
    base = file.values[BASE]
    place = f"{file.place(BASE)}: {BASE}"
    if not isinstance(base, str):
        raise ConfigError(str(Violation(place, base, "not text", "the name of a task, or a file NAME.yaml")))
    near = file.path.parent / base
    path = near if base.endswith(_SUFFIXES) and near.is_file() else _file_of(base, place, search_path)
    if path.resolve() in seen:
        raise ConfigError(str(Violation(place, base, "is based on this file itself", "another task, or no base")))
    below, places_below = _with_base(read_yaml(path), search_path, (*seen, path.resolve()))
    if isinstance(below.get("settings"), dict) and isinstance(values.get("settings"), dict):
        values["settings"] = {**below["settings"], **values["settings"]}
    return {**below, **values}, {**places_below, **places}


FIELDS = (*CHECKS, "metrics")
_NULLABLE = frozenset(field.name for field in fields(Task) if field.default is None)
_OF_KIND = {
    **dict.fromkeys(("references", "max_new_tokens", "stop", "temperature", "filters"), (GENERATION,)),
    **dict.fromkeys(("choices", "answer", "answer_is", "unconditional_prompt"), (MULTIPLE_CHOICE,)),
    "target": (GENERATION, CLOZE),
}
"""Fields ▶ the kinds of task that have them."""
_REQUIRED = {
    GENERATION: ("prompt", "target", "metrics"),
    CLOZE: ("prompt", "target", "metrics"),
    MULTIPLE_CHOICE: ("prompt", "choices", "answer", "metrics"),
}


class _Reader:
    """One file's fields, checked one by one; ``task`` raises all problems together."""

    def __init__(self, values: Mapping[Any, Any], places: Mapping[str, str]) -> None:
        self._values, self._places = values, places
        self._problems: list[tuple[tuple[str, int], str]] = []

    def task(self, name: str) -> Task:
        """The task.

        Raises:
            ConfigError: everything that is wrong.
        """
        self._unknown()
        parsed = {field: self._parsed(field, check) for field, check in CHECKS.items() if field in self._values}
        kind = parsed.get("kind")
        if "kind" not in self._values:
            self._note("kind", None, "missing", spoken_list((*KINDS, MEMORISATION)))
        elif kind is not None:
            self._fields_of(kind)
            parsed["metrics"] = tuple(self._metrics(kind))
            self._consistent(parsed)
        if self._problems:
            raise ConfigError([line for _, line in sorted(self._problems, key=lambda problem: problem[0])])
        given = {field: value for field, value in parsed.items() if value is not None or field in _NULLABLE}
        return Task(name=name, places=dict(self._places), **given)

    def _note(self, field: str, value: Any, wrong: str, right: str) -> None:
        place = self._places.get(field.partition(".")[0], self._places[""])
        file, _, line = place.rpartition(":")
        order = (file, int(line)) if line.isdigit() else (place, 0)
        self._problems.append((order, f"{place}: {Violation(field, value, wrong, right)}"))

    def _unknown(self) -> None:
        for key in self._values:
            if key not in FIELDS:
                close = close_matches(str(key), (*FIELDS, BASE))
                right = f"did you mean {spoken_list(close)}?" if close else spoken_list((*FIELDS, BASE), "and")
                self._note(str(key), self._values[key], "there is no such field", right)

    def _parsed(self, field: str, check: Callable[[Any], Any]) -> Any:
        value = self._values[field]
        if value is None and field in _NULLABLE:
            return None
        try:
            return check(value)
        except Wrong as problem:
            self._note(field, value, problem.wrong, problem.right)
            return None

    def _fields_of(self, kind: str) -> None:
        for field in _REQUIRED[kind]:
            if self._values.get(field) is None:
                self._note(field, None, f"a task of kind {kind} needs it", "see docs/evaluation.md")
        for field, kinds in _OF_KIND.items():
            if field in self._values and kind not in kinds:
                self._note(field, self._values[field], f"a task of kind {kind} has none", "leave it out")

    def _metrics(self, kind: str) -> Iterator[MetricChoice]:
        value = self._values.get("metrics")
        entries = [value] if isinstance(value, str | dict) else value
        if value is None:
            return
        if not isinstance(entries, list) or not entries:
            self._note("metrics", value, "not a list of metrics", spoken_list(names_of(kind)))
            return
        seen: set[Any] = set()
        for entry in entries:
            name, options = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, {})
            if isinstance(name, str) and name in seen:
                self._note("metrics", name, "is there twice", "each once")
            elif self._metric_problems(kind, name, options):
                continue
            else:
                seen.add(name)
                yield MetricChoice(name, dict(options or {}))

    def _metric_problems(self, kind: str, name: Any, options: Any) -> bool:
        before = len(self._problems)
        found = metric_kind(name, kind) if isinstance(name, str) else None
        if found is None:
            close = close_matches(str(name), names_of(kind))
            right = f"did you mean {spoken_list(close)}?" if close else spoken_list(names_of(kind))
            known = isinstance(name, str) and name in METRICS
            wrong = f"does not score a task of kind {kind}" if known else "there is no such metric"
            self._note("metrics", name, wrong, right)
            return True
        if options is not None and not isinstance(options, dict):
            self._note("metrics", {name: options}, "not options", f"{name}, or {name}: {{OPTION: VALUE}}")
            return True
        for option, value in (options or {}).items():
            if option not in found.options:
                right = spoken_list(found.options) if found.options else f"{name} alone"
                self._note(f"metrics.{name}.{option}", value, "there is no such option", right)
            elif (legal := found.options[option](value)) is not None:
                self._note(f"metrics.{name}.{option}", value, "not a value of it", legal)
        if (library := missing_library(found)) is not None:
            self._note("metrics", name, f"needs {library}, which is not installed", EXTRA)
        return len(self._problems) > before

    def _consistent(self, parsed: Mapping[str, Any]) -> None:
        """Fields that say something of each other."""
        metrics: Sequence[MetricChoice] = parsed["metrics"]
        unconditional = any(choice.name == "accuracy_unconditional" for choice in metrics)
        if unconditional and parsed.get("unconditional_prompt") is None:
            right = 'unconditional_prompt: "Answer:", as Brown et al. 2020'
            self._note("metrics", "accuracy_unconditional", "there is no unconditional_prompt", right)
        if parsed.get("examples_split") is not None and parsed.get("examples_data") is not None:
            right = "examples_split alone for another split of data, or examples_data alone"
            self._note("examples_split", parsed["examples_split"], "examples_data is given too", right)
