"""``-m``: several values of a setting become one run for each combination, each with a name of its own. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

from megalm.config.command_line import CONFIG, CONFIG_DIR, read_settings
from megalm.config.compose import FindSource, compose
from megalm.config.hydra_calls import sweep_values
from megalm.config.overrides import option_of, split_at_commas, value_of_text
from megalm.config.parse import field_paths, members_of
from megalm.config.schema import Config
from megalm.config.violation import Violation, spoken_list
from megalm.errors import ConfigError

_MOST_RUNS = 1000
_LONGEST_VALUE = 40
"""Characters of a value in a run's name; two that differ beyond them are refused as two runs of one name."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: its ``run.name``.
        arguments: as for ``compose``, the name included.
        swept: the overrides that differ from run to run: ``optim.lr=0.001``.
    """

    name: str
    arguments: tuple[str, ...]
    swept: tuple[str, ...]


def sweep_runs(
    arguments: Sequence[str],
    find_source: FindSource | None = None,
    *,
    check: Callable[[Config], object] = lambda _: None,
) -> list[SweepRun]:
    """The runs that arguments with several values ask for; the last of them changes fastest.

    Args:
        arguments: as for ``compose``, where ``FIELD=A,B``, ``choice(A,B)``, ``range(START,STOP,STEP)`` and for groups
            ``glob(PATTERN)`` stand for several values.
        find_source: as for ``compose``.
        check: raises what is wrong with a config.

    Raises:
        ConfigError: what is wrong with any of them, before the first has begun; or two would have one name.
    """
    combinations = _combinations(arguments)
    bases: dict[int, str] = {}
    wrong: dict[str, list[int]] = {}
    for number, (texts, _) in enumerate(combinations):
        try:
            config = compose(texts, find_source)
            bases[number] = config.run.name
            check(config)
        except ConfigError as error:
            for line in error.lines:
                wrong.setdefault(line, []).append(number)
    if wrong:
        raise ConfigError([_told_once(line, numbers, combinations) for line, numbers in wrong.items()])
    names = _names(list(bases.values()), [swept for _, swept in combinations])
    return [
        SweepRun(name, (*texts, f"run.name={_quoted(name)}"), tuple(f"{key}={value}" for key, value in swept.items()))
        for name, (texts, swept) in zip(names, combinations, strict=True)
    ]


def _combinations(arguments: Sequence[str]) -> list[tuple[list[str], dict[str, str]]]:
    """For each run its arguments, and the swept keys with the values that it has."""
    own = [argument for argument in arguments if argument.partition("=")[0] in (CONFIG, CONFIG_DIR)]
    options = read_settings(own).search_path.group_options()
    choices = [(argument, _alternatives(argument, options)) for argument in arguments]
    swept = [argument.partition("=")[0] for argument, values in choices if values is not None]
    lists = [[None] if values is None else values for _, values in choices]
    runs = 1
    for values in lists:
        runs *= len(values)
    if runs > _MOST_RUNS:
        raise ConfigError(f"-m: {runs} runs; at most {_MOST_RUNS}, in several commands")
    found = []
    for picked in product(*lists):
        texts = [
            argument if value is None else f"{argument.partition('=')[0]}={value}"
            for argument, value in zip(arguments, picked, strict=True)
        ]
        found.append((texts, dict(zip(swept, [value for value in picked if value is not None], strict=True))))
    return found


def _alternatives(argument: str, options: Mapping[str, Sequence[str]]) -> list[str] | None:
    """The values of an override that has several; None: it has one, or is no override."""
    key, separator, raw = argument.partition("=")
    if not separator or (key not in options and key not in field_paths()):
        return None
    if key in options and (pattern := re.fullmatch(r"glob\((.+)\)", raw)):
        names = [name for name in options[key] if fnmatchcase(name, pattern[1].strip("'\" "))]
        if not names:
            right = f"{key}={spoken_list(options[key])}"
            raise ConfigError(str(Violation(key, raw, "no option has such a name", right)))
        return names
    values = _texts(raw) if key in options or _takes_text(key) else _typed(raw)
    return values if len(values) > 1 else None


def _takes_text(field: str) -> bool:
    members = members_of(field_paths()[field])
    return str in members or tuple[str, ...] in members


def _texts(raw: str) -> list[str]:
    """Several texts, each as it stands; a [list] is one of them."""
    inner = re.fullmatch(r"choice\((.*)\)", raw, re.DOTALL)
    if inner is not None:
        return split_at_commas(inner[1])
    if re.fullmatch(r"range\([^()]*\)", raw):
        return _typed(raw)
    return split_at_commas(raw)


def _typed(raw: str) -> list[str]:
    try:
        return sweep_values(raw)
    except ValueError:
        return [raw]  # composing says what is wrong with it


def _told_once(line: str, numbers: Sequence[int], combinations: Sequence[tuple[list[str], dict[str, str]]]) -> str:
    """A line that all runs have as it is; one that some have with the first of them before it."""
    if len(numbers) == len(combinations):
        return line
    swept = combinations[numbers[0]][1]
    return f"{' '.join(f'{key}={value}' for key, value in swept.items())}: {line}"


def _names(bases: Sequence[str], swept: Sequence[Mapping[str, str]]) -> list[str]:
    """A name for each run: its own where all have another already, else with the swept values behind it.

    Raises:
        ConfigError: two have the same.
    """
    if len(set(bases)) == len(bases):
        return list(bases)
    names = [base + _suffix(values) for base, values in zip(bases, swept, strict=True)]
    right = "values that differ in letters or digits, or a run.name of each: run.name=A,B"
    problems, folded = [], [name.casefold() for name in names]  # some file systems do not tell A from a
    for number, name in enumerate(names):
        first = folded.index(name.casefold())
        if first < number:
            runs = [" ".join(f"{key}={value}" for key, value in swept[one].items()) for one in (first, number)]
            wrong = f"the name of two runs, {spoken_list(runs, 'and')}"
            problems.append(str(Violation("run.name", name, wrong, right)))
    if problems:
        raise ConfigError(problems)
    return names


def _suffix(values: Mapping[str, str]) -> str:
    """``-lr=0.001-tp=2``; dotted names where two fields have the same."""
    keys = [key for key in values if key != "run.name"]
    short = {key: key.rpartition(".")[2] for key in keys}
    is_unique = len(set(short.values())) == len(keys)
    return "".join(f"-{short[key] if is_unique else key}={_in_a_name(key, values[key])}" for key in keys)


def _in_a_name(key: str, text: str) -> str:
    """A value as a name can hold it: letters, digits, ``_``, ``.`` and ``+``; ``1e-3`` and ``0.001`` are the same."""
    value: Any = value_of_text(key, text) if key in field_paths() else option_of(text)
    items = value if isinstance(value, list) else [value]
    words = "+".join(
        "none" if item is None else str(item).lower() if isinstance(item, bool) else str(item) for item in items
    )
    return re.sub(r"[^\w.+-]+", "-", words).strip("-.")[:_LONGEST_VALUE] or "empty"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
