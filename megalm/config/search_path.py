"""Folders in which configs are found: the user's own, then those that megalm ships. No torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megalm.config.arguments import expand_home
from megalm.config.violation import Violation
from megalm.config.yaml_file import shown_path
from megalm.errors import ConfigError

CONFIG_FILE = "config.yaml"

OWN_FOLDER = Path("conf")
"""The user's own configs, in the working folder."""

TASK_FOLDER = "task"
"""The folder of task files, which are no options of a run's config."""


@dataclass(frozen=True)
class Folder:
    """One folder of groups.

    Attributes:
        path: the folder.
        reason: why it is searched: an option, a setting, or where it lies.
    """

    path: Path
    reason: str


class SearchPath:
    """Where a group's option is looked for, in order: the first folder that has it gives it.

    Args:
        folders: in order; the last is megalm's own, which alone holds the primary config.
    """

    def __init__(self, folders: Sequence[Folder]) -> None:
        self.folders = tuple(folders)

    @classmethod
    def of(cls, config_dirs: Iterable[str] = (), searchpath: Iterable[str] = ()) -> SearchPath:
        """The search path of a command.

        Args:
            config_dirs: values of ``--config-dir``.
            searchpath: entries of ``hydra.searchpath``: a folder, ``file://FOLDER`` or ``pkg://PACKAGE``.

        Raises:
            ConfigError: every folder that does not exist.
        """
        problems: list[str] = []
        folders = [_given("--config-dir", text, problems) for text in config_dirs]
        if OWN_FOLDER.is_dir():
            folders.append(Folder(OWN_FOLDER.resolve(), "./conf"))
        folders += [_given("hydra.searchpath", text, problems) for text in searchpath]
        if problems:
            raise ConfigError(problems)
        shipped = conf_dir()
        own = [folder for folder in folders if folder.path != shipped]
        return cls([*dict.fromkeys(own), Folder(shipped, "megalm")])

    def group_options(self) -> dict[str, list[str]]:
        """The groups that megalm has, and the names that each can be set to."""
        groups = sorted(folder.name for folder in self.folders[-1].path.iterdir() if folder.is_dir())
        return {group: self._options(group) for group in groups if group != TASK_FOLDER}

    def tasks(self) -> list[str]:
        """The evaluation tasks, by the names of their files."""
        return self._options(TASK_FOLDER)

    def _options(self, group: str) -> list[str]:
        found = set()
        for folder in self.folders:
            root = folder.path / group
            for file in root.rglob("*.yaml"):
                name = file.relative_to(root).with_suffix("").as_posix()
                if not any(part.startswith(".") for part in name.split("/")):
                    found.add(name)
        return sorted(found)

    def find(self, config_path: str) -> Path | None:
        """The file of an option such as ``model/gpt3_125m``; None: there is none."""
        files = (folder.path / f"{config_path}.yaml" for folder in self.folders)
        return next((file for file in files if file.is_file()), None)

    @property
    def primary(self) -> Path:
        """The config that every run begins with."""
        return self.folders[-1].path / CONFIG_FILE

    def lines(self) -> list[str]:
        """The folders in words, first to last."""
        return [f"{folder.reason:18}{shown_path(folder.path)}" for folder in self.folders]

    def notes(self) -> list[str]:
        """What lies in the user's folders and is not used."""
        return [
            f"{shown_path(file)}: not used; every run begins with megalm's own {CONFIG_FILE}, so settings belong in a "
            f"file in {shown_path(folder.path)}/experiment or in one given with --config"
            for folder in self.folders[:-1]
            if (file := folder.path / CONFIG_FILE).is_file() and file.read_bytes() != self.primary.read_bytes()
        ]


def conf_dir() -> Path:
    """The folder of YAML groups: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise ConfigError(f"conf={package / 'conf'}: this installation has no conf folder; install megalm again")


def _given(source: str, text: str, problems: list[str]) -> Folder:
    path = Path()
    try:
        path = _folder_of(text)
    except (ValueError, ImportError) as error:
        problems.append(str(Violation(source, text, str(error), "a folder, file://FOLDER or pkg://PACKAGE")))
    else:
        if not path.is_dir():
            wrong = "not a folder" if path.exists() else "no such folder"
            problems.append(str(Violation(source, text, wrong, "a folder with groups in it, such as DIR/experiment/")))
    return Folder(path, source)


def _folder_of(text: str) -> Path:
    if text.startswith("pkg://"):
        spec = importlib.util.find_spec(text.removeprefix("pkg://").replace("/", "."))
        if spec is None or not spec.submodule_search_locations:
            raise ValueError("no such package")
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(expand_home(text.removeprefix("file://"))).resolve()
