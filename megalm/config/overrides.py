"""What a command line or a ``--config`` file sets: text ▶ :class:`Setting`, or what is wrong with it. No torch.

``FIELD=VALUE`` is split at the first ``=``. The field's type decides how the value is read: text is taken as it stands,
whatever characters it has; numbers, true, false, null and lists are read by Hydra's grammar. ``${...}`` refers to
another field everywhere, and quotes around a whole value are Hydra's: they are taken off.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megalm.config.hydra_calls import is_sweep, parse_value, unquoted
from megalm.config.parse import default_dict, field_paths, members_of, parse_problems, section_names, unknown_key
from megalm.config.refused import refused_setting
from megalm.config.rules.fields import choice_problem, range_problem
from megalm.config.violation import Violation, close_matches, spoken_list

COMMAND_LINE = "command line"

_NULL = re.compile(r"null", re.IGNORECASE)


@dataclass(frozen=True)
class Setting:
    """One thing that a user sets.

    Attributes:
        key: name of a group, or dotted name of a field.
        value: of a group the option's name, or None for none; of a field its value.
        place: ``command line``, or file and line.
        is_group: whether a group's option is chosen.
    """

    key: str
    value: Any
    place: str
    is_group: bool


class Reader:
    """Reads settings and collects what is wrong with them, so that a user sees everything at once.

    Args:
        options: groups and the names that each can be set to.
    """

    def __init__(self, options: Mapping[str, Sequence[str]]) -> None:
        self._options = options
        self.settings: list[Setting] = []
        self.problems: list[str] = []

    def read(self, text: str) -> None:
        """An override as it was typed: ``GROUP=OPTION``, ``FIELD=VALUE``, ``~GROUP`` or ``~FIELD``."""
        key, separator, raw = text.partition("=")
        if key.startswith("~"):
            self._delete(text, key[1:].strip(), raw if separator else None)
            return
        if (meant := _as_meant(key, separator, raw, self._options)) is not None:
            sign = {"+": "leave out the plus: ", "-": "leave out the dashes: "}.get(key[:1], "write ")
            self._wrong(Violation("override", text, "not how a setting is written", f"{sign}{meant}"))
        elif not key.strip() or not separator:
            self._wrong(Violation("override", text, "not an override", "field=value, such as train.steps=200"))
        elif key in self._options:
            self._choose(key, option_of(raw), COMMAND_LINE)
        elif key in field_paths():
            self._set(key, raw)
        else:
            self._wrong(self._unknown(key.lstrip("+").strip(), raw))

    def take(self, key: str, value: Any, place: str) -> None:
        """A setting of a file, whose value YAML has read."""
        if key in self._options and not isinstance(value, Mapping):
            self._choose(key, value, place)
        elif key in field_paths():
            self.settings.append(Setting(key, value, place, is_group=False))
        else:
            self._wrong(self._unknown(key, value), place)

    def _choose(self, group: str, option: Any, place: str) -> None:
        options = self._options[group]
        if option is None or option in options:
            self.settings.append(Setting(group, option, place, is_group=True))
            return
        close = close_matches(option, options) if isinstance(option, str) else []
        right = f"did you mean {group}={spoken_list(close)}?" if close else f"{group}={spoken_list(options)}"
        self._wrong(Violation(group, option, "there is no such option", right), place)

    def _set(self, field: str, raw: str) -> None:
        try:
            value = value_of_text(field, raw)
        except ValueError:
            right = f"one value; megalm train -m {field}={raw} trains a run with each"
            self._wrong(Violation(field, raw, "several values, and a run has one", right))
            return
        self.settings.append(Setting(field, value, COMMAND_LINE, is_group=False))

    def _delete(self, text: str, key: str, raw: str | None) -> None:
        """``~group`` is no option of it, and ``~field`` the default of the schema: as if no file set it."""
        if raw is not None:
            self._wrong(Violation("override", text, "a deletion has no value", f"~{key}"))
        elif key in self._options:
            self.settings.append(Setting(key, None, COMMAND_LINE, is_group=True))
        elif key in field_paths():
            section, _, name = key.partition(".")
            self.settings.append(Setting(key, default_dict()[section][name], COMMAND_LINE, is_group=False))
        else:
            problem = self._unknown(key, None)
            self._wrong(Violation("override", text, problem.wrong, problem.right))

    def _unknown(self, key: str, value: Any) -> Violation:
        """What to write instead of a name that is neither a group's nor a field's."""
        if (refused := refused_setting(key, value)) is not None:
            return refused
        bare, at, _ = key.partition("@")
        if at and bare in self._options:
            return Violation(key, value, "groups have fixed places", f"{bare}=NAME")
        if key in section_names():
            fields = [path for path in field_paths() if path.startswith(f"{key}.")]
            return Violation(key, value, "a whole section", f"set its fields: {spoken_list(fields, 'and')}")
        close = close_matches(key, [*self._options, *section_names()]) if "." not in key else []
        if close:
            return Violation(key, value, "there is no such group or section", f"did you mean {spoken_list(close)}?")
        return unknown_key(key, value)

    def _wrong(self, violation: Violation, place: str = COMMAND_LINE) -> None:
        self.problems.append(str(violation) if place == COMMAND_LINE else f"{place}: {violation}")

    def is_group(self, name: str) -> bool:
        """Whether options can be chosen of it."""
        return name in self._options

    def problems_of_values(self) -> list[str]:
        """What is wrong with fields by themselves: their type, their range, a choice that does not exist."""
        lines = []
        for setting in self.settings:
            if setting.is_group or "${" in str(setting.value):
                continue
            value, found = parse_problems(setting.key, setting.value)
            if not found:
                checked = (range_problem(setting.key, value), choice_problem(setting.key, value))
                found = [problem for problem in checked if problem is not None]
            where = "" if setting.place == COMMAND_LINE else f"{setting.place}: "
            lines += [f"{where}{problem}" for problem in found]
        return lines


def option_of(raw: str) -> str | None:
    """The option that was typed: a name, in quotes or not; null: none."""
    inner = unquoted(raw)
    return (None if _NULL.fullmatch(raw.strip()) else raw.strip()) if inner is None else inner


def value_of_text(field: str, raw: str) -> Any:
    """The value that was typed for a field.

    Raises:
        ValueError: several values.
    """
    members = members_of(field_paths()[field])
    if str in members or tuple[str, ...] in members:
        return _text_of(raw, takes_list=tuple[str, ...] in members)
    try:
        several = is_sweep(raw)
    except ValueError:
        return raw  # text, where a number is wanted: its type is told with those of all others
    if several:
        raise ValueError("several values")
    return parse_value(raw)


def value_of_list(raw: str) -> list[str]:
    """The texts that ``[a,b]`` lists; one text is a list of one."""
    value = _text_of(raw, takes_list=True)
    return [str(item) for item in value] if isinstance(value, list) else [str(value)]


def _text_of(raw: str, *, takes_list: bool) -> Any:
    if _NULL.fullmatch(raw):
        return None
    if takes_list and raw.startswith("[") and raw.endswith("]"):
        return [_text_of(item, takes_list=False) for item in split_at_commas(raw[1:-1])] if raw[1:-1].strip() else []
    inner = unquoted(raw)
    return raw if inner is None else inner


def split_at_commas(text: str) -> list[str]:
    """The items between commas, without spaces around them; commas in quotes or in a [list] of their own are text."""
    items, rest = [], text
    while True:
        match = _ITEM.match(rest)
        assert match is not None, "the last form takes anything up to a comma"
        items.append(match[1].strip())
        if match.end() == len(rest):
            return items
        rest = rest[match.end() + 1 :]


_ITEM = re.compile(
    r"""\s*(
        '(?:[^'\\]|\\.)*'\s*(?=,|\Z)
      | "(?:[^"\\]|\\.)*"\s*(?=,|\Z)
      | \[[^\[\]]*\]\s*(?=,|\Z)
      | (?:\$\{[^{}]*\}|[^,])*
    )""",
    re.VERBOSE | re.DOTALL,
)

_SIGNS = re.compile(r"^(\+\+|\+|--?)?\s*([\w.]+)\s*$")


def _as_meant(key: str, separator: str, value: str, options: Mapping[str, Sequence[str]]) -> str | None:
    """The setting that habits from other tools mean: ``+train.steps=3``, ``--train.steps=3``, ``train.steps 3``."""
    if not separator:
        key, _, value = key.strip().partition(" ")
    match, value = _SIGNS.match(key), value.strip()
    if match is None or (separator and match[0] == match[2]):
        return None
    name = match[2]
    if name not in field_paths() and name not in options:
        return None
    quoted = f"'{value}'" if " " in value and value[0] not in "'\"[{" else value
    return f"{name}={quoted or 'VALUE'}"
