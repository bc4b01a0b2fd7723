"""The files that a choice of options comes to, read before Hydra is asked, so that faults name file and line."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from megalm.config.parse import section_names
from megalm.config.search_path import SearchPath
from megalm.config.violation import close_matches, spoken_list
from megalm.config.yaml_file import YamlFile, read_yaml
from megalm.errors import ConfigError

_PACKAGE = re.compile(r"^#\s*@package\s+(\S+)")


def check_files(search_path: SearchPath, options: Mapping[str, str | None]) -> None:
    """Read every file that is chosen, and every file that the defaults lists inside them name.

    Files that are not there are left to Hydra, as are names that refer to other choices.

    Raises:
        ConfigError: every fault of every file.
    """
    primary = read_yaml(search_path.primary)
    listed = dict(_named(primary, ""))
    groups = {group: name for group, name in {**listed, **options}.items() if group and name is not None}
    todo = [f"{group}/{name}" for group, name in groups.items()]
    seen, problems = set(todo), []
    while todo:
        option = todo.pop(0)
        path = search_path.find(option)
        if path is None:
            continue
        try:
            file = read_yaml(path)
        except ConfigError as error:
            problems += error.lines
            continue
        folder = option.rpartition("/")[0]
        problems += [*_package_problem(file, folder), *_override_problems(file, folder, set(listed))]
        problems += _missing(file, folder, search_path, set(options))
        named = [f"{group}/{name}" if group else name for group, name in _named(file, folder) if name is not None]
        todo += [one for one in named if one not in seen]
        seen |= set(named)
    if problems:
        raise ConfigError(problems)


def _named(file: YamlFile, folder: str) -> Iterator[tuple[str, str | None]]:
    """(group, option) of each entry of a file's defaults list; of a file beside it the group is its folder."""
    for group, name, _ in _entries(file, folder):
        for one in name if isinstance(name, list) else [name]:
            if one is None or (isinstance(one, str) and "${" not in one):
                yield group, one


def _entries(file: YamlFile, folder: str) -> Iterator[tuple[str, Any, str]]:
    """(group, option, key as it is written) of each entry; a file that is named without a group has no key."""
    defaults = file.values.get("defaults")
    for entry in defaults if isinstance(defaults, list) else []:
        if isinstance(entry, str) and entry != "_self_":
            yield ("", entry[1:], "") if entry.startswith("/") else (folder, entry, "")
        elif isinstance(entry, dict):
            for key, name in entry.items():
                group = re.sub(r"^(override|optional)\s+", "", str(key)).partition("@")[0]
                absolute = group.startswith("/") or not folder
                yield group.lstrip("/") if absolute else f"{folder}/{group}", name, str(key)


def _missing(file: YamlFile, folder: str, search_path: SearchPath, chosen: set[str]) -> Iterator[str]:
    """Entries that name no file; what the user has chosen otherwise is not looked for."""
    known = search_path.group_options()
    for group, name, key in _entries(file, folder):
        is_looked_for = isinstance(name, str) and "${" not in name and not key.startswith("optional ")
        if not is_looked_for or (key and group in chosen) or search_path.find(f"{group}/{name}" if group else name):
            continue
        close = close_matches(name, known.get(group, []))
        right = (
            f"did you mean {spoken_list(close)}?" if close else spoken_list(known.get(group, ["a file that exists"]))
        )
        yield f"{file.place('defaults')}: there is no {group}/{name}; {right}"


def _package_problem(file: YamlFile, folder: str) -> list[str]:
    """A file of a group that is no section, and does not say that it sets fields of all of them."""
    group = folder.partition("/")[0]
    if group in section_names() or _has_package(file):
        return []
    return [
        f'{file.place()}: the line "# @package _global_" is missing, so that its settings would go into a section '
        f'"{group}", which does not exist; make it the first line'
    ]


def _has_package(file: YamlFile) -> bool:
    """Whether one of the comments at the top says where the content belongs."""
    for line in file.path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            return False
        if _PACKAGE.match(line):
            return True
    return False


def _override_problems(file: YamlFile, folder: str, listed: set[str]) -> list[str]:
    """Entries that choose an option of a group for which config.yaml has chosen one."""
    return [
        f'{file.place("defaults")}: "{key}: {name}" chooses an option of a group for which config.yaml has chosen one; '
        f'"override /{group}: {name}"'
        for group, name, key in _entries(file, folder)
        if group in listed and key and not key.startswith("override ") and "@" not in key
    ]
