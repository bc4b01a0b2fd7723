"""Command line ▶ :class:`Config`, by way of the YAML groups in ``conf/``. The only file that imports hydra.

Hydra merges files and parses overrides; nothing else of it is used: no working directory, no logging, no sweeps.
Overrides are checked against the schema first, so that a misspelling gets a suggestion instead of a Hydra stack.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from megalm.config.parse import (
    MISSING_VALUE,
    PATHS,
    config_from_dict,
    config_to_dict,
    default_dict,
    field_paths,
    section_names,
    unknown_key,
)
from megalm.config.schema import Config
from megalm.config.violation import Violation, close_matches, format_value, spoken_list
from megalm.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

CONFIG_FILE = "config.yaml"

_SCHEMA = "schema"
"""Name under which ``conf/config.yaml`` finds the schema's defaults."""


def compose(overrides: Sequence[str] = ()) -> Config:
    """The config that ``conf/config.yaml`` and the overrides make.

    Args:
        overrides: as on the command line: ``experiment=quickstart``, ``model=gpt3_125m``, ``parallel.tp=2``.

    Raises:
        ConfigError: every override that is malformed or names something unknown; or every field that is missing or
            of the wrong type.
    """
    checked = _checked_overrides(overrides, groups=True)
    mapping = _hydra_compose(checked)
    if all(mapping["model"][name] == MISSING_VALUE for name in ("num_layers", "hidden_size", "num_heads")):
        raise ConfigError(str(_nothing_chosen()))
    return config_from_dict(mapping)


def load_run_config(run_dir: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config that a run was started with, with ``field=value`` overrides applied.

    Raises:
        ConfigError: the folder holds no config, or an override is wrong; a group cannot be chosen again.
    """
    path = Path(run_dir) / CONFIG_FILE
    try:
        saved = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        wrong = f"holds no {CONFIG_FILE}" if path.parent.is_dir() else "no such folder"
        raise ConfigError(f"run={run_dir}: {wrong}; the folder of a run, such as runs/quickstart") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"run={run_dir}: cannot read {CONFIG_FILE} ({_one_line(error)}); a run's own file") from None
    mapping = config_to_dict(config_from_dict(saved))
    for override in _checked_overrides(overrides, groups=False):
        section, _, name = override.key_or_group.partition(".")
        mapping[section][name] = override.value()
    return config_from_dict(mapping)


def save_config(config: Config, path: str | Path) -> None:
    """Write a config as plain YAML that :func:`load_run_config` reads back."""
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def conf_dir() -> Path:
    """The folder of YAML groups: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise ConfigError(f"conf={package / 'conf'}: this installation has no conf folder; install megalm again")


def group_options() -> dict[str, list[str]]:
    """The groups of ``conf/`` and the names that each can be set to."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(conf_dir().iterdir())
        if folder.is_dir()
    }


def _checked_overrides(overrides: Sequence[str], *, groups: bool) -> list[Override]:
    """The parsed overrides, or a ConfigError with a line for each that is wrong."""
    options = group_options() if groups else {}
    problems: list[Violation] = []
    checked = []
    for text in overrides:
        override = _parse_override(text, problems)
        if override is None:
            continue
        problem = _problem_with(override, options)
        if problem is None:
            checked.append(override)
        else:
            problems.append(problem)
    if problems:
        raise ConfigError([str(problem) for problem in problems])
    return checked


def _parse_override(text: str, problems: list[Violation]) -> Override | None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    key, separator, value = text.partition("=")
    if (meant := _as_meant(key, separator, value)) is not None:
        sign = {"+": "leave out the plus: ", "-": "leave out the dashes: "}.get(key[:1], "write ")
        right = f"{sign}{meant}"
        problems.append(Violation("override", text, "not how a setting is written", right))
        return None
    if not key.strip() or not (separator or key.startswith("~")):
        problems.append(Violation("override", text, "not an override", "field=value, such as train.steps=200"))
        return None
    if key in PATHS and value.startswith("~") and not set(value) & set("'\"\\"):
        text = f"{key}='{value}'"  # Hydra's grammar has another use for it
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        quoted = "'" + key + '="' + value.replace("\\", "\\\\").replace('"', '\\"') + "\"'"
        right = f"quote text with special characters, for the shell and for Hydra: {quoted}"
        problems.append(Violation(key, value, "not a value in Hydra's grammar", right))
        return None
    if _wants_text(override.key_or_group) and _is_number(override.value()):
        # `run.name=007` means the text 007, not the number 7.
        return OverridesParser.create().parse_override(f"{key}='{value}'")
    return override


_SIGNS = re.compile(r"^(\+\+|\+|--?)?\s*([\w.]+)\s*$")


def _as_meant(key: str, separator: str, value: str) -> str | None:
    """The setting that habits from other tools mean: ``+train.steps=3``, ``--train.steps=3``, ``train.steps 3``."""
    if not separator:
        key, _, value = key.strip().partition(" ")
    match, value = _SIGNS.match(key), value.strip()
    if match is None or (separator and match[0] == match[2]):
        return None
    name = match[2]
    if name not in field_paths() and name not in group_options():
        return None
    quoted = f"'{value}'" if " " in value and value[0] not in "'\"[{" else value
    return f"{name}={quoted or 'VALUE'}"


def _problem_with(override: Override, options: dict[str, list[str]]) -> Violation | None:
    """What is wrong with an override that the grammar accepts; None: nothing."""
    key, value = override.key_or_group, override.value()
    if override.is_delete():
        return Violation(f"~{key}", value, "nothing can be deleted", f"set it instead, such as {key}=null")
    if override.is_sweep_override():
        text = (override.input_line or "").partition("=")[2]
        right = f"one value; or text in quotes: '{key}=\"{text}\"'"
        return Violation(key, text, "several values, and a run has one", right)
    if override.package is not None:
        return Violation(f"{key}@{override.package}", value, "groups have fixed places", f"{key}=NAME")
    if key in options:
        return _problem_with_option(key, value, options[key])
    return None if key in field_paths() else _problem_with_name(key, value, options)


def _problem_with_name(key: str, value: Any, options: dict[str, list[str]]) -> Violation:
    """What to write instead of a name that is neither a group's nor a field's."""
    if key in section_names():
        fields = [path for path in field_paths() if path.startswith(f"{key}.")]
        return Violation(key, value, "a whole section", f"set its fields: {spoken_list(fields, 'and')}")
    close = close_matches(key, [*options, *section_names()]) if "." not in key else []
    if close:
        return Violation(key, value, "there is no such group or section", f"did you mean {spoken_list(close)}?")
    return unknown_key(key, value)


def _problem_with_option(group: str, value: Any, options: list[str]) -> Violation | None:
    if value in options or (value is None and group in ("model", "experiment")):
        return None
    close = close_matches(value, options) if isinstance(value, str) else []
    right = f"did you mean {group}={spoken_list(close)}?" if close else f"{group}={spoken_list(options)}"
    return Violation(group, value, "there is no such option", right)


def _wants_text(path: str) -> bool:
    kind = field_paths().get(path)
    return kind is str or str in get_args(kind)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _hydra_compose(overrides: Sequence[Override]) -> dict[str, Any]:
    """Nested plain dictionaries of the composed config, interpolations resolved.

    Raises:
        ConfigError: the files do not go together, or what was typed does not.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folder = conf_dir()
    try:
        with _clean_hydra(), hydra.initialize_config_dir(str(folder), version_base="1.3"):
            lines = [override.input_line or "" for override in overrides]
            composed = hydra.compose(config_name="config", overrides=lines)
            _let_typed_options_win(composed, overrides)
        container = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        line = f"conf={folder}: {_one_line(error)}; the files in {folder} and the overrides must name what exists"
        raise ConfigError(line) from None
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _let_typed_options_win(composed: Any, overrides: Sequence[Override]) -> None:
    """Give the fields of each option that was typed the values that its file has, whatever an experiment sets.

    Hydra merges an experiment after all groups, so that a value in its file beats an option of the command line. Here a
    field's own override wins, then a group's option, then the experiment.

    Raises:
        ConfigError: of two that set a field otherwise, the one that does not win was typed last; both were asked for.
    """
    import hydra
    from omegaconf import OmegaConf

    groups = group_options()
    typed = {override.key_or_group: number for number, override in enumerate(overrides)}
    experiment = overrides[typed["experiment"]].value() if "experiment" in typed else None
    problems = []
    for group, number in typed.items():
        option = overrides[number].value()
        if group not in groups or group == "experiment" or option is None:
            continue
        has_rival = experiment is not None or any(path.startswith(f"{group}.") for path in typed)
        if not has_rival:
            continue
        alone = OmegaConf.to_container(hydra.compose(config_name=f"{group}/{option}"), resolve=False)
        for path, value in _leaves(alone):
            now = OmegaConf.select(composed, path)
            if now == value:
                continue
            if path in typed:
                if typed[path] < number:
                    problems.append(_both_asked_for(path, now, f"{group}={option}", path, value))
                continue
            if experiment is not None and number < typed["experiment"]:
                problems.append(_both_asked_for(group, option, f"experiment={experiment}", path, now))
            OmegaConf.update(composed, path, value)
    if problems:
        raise ConfigError([str(problem) for problem in problems])


def _leaves(mapping: Any) -> list[tuple[str, Any]]:
    """(dotted name of a field, value) of everything that an option sets."""
    return [
        (f"{section}.{name}", value)
        for section, fields in mapping.items()
        if isinstance(fields, dict)
        for name, value in fields.items()
    ]


def _both_asked_for(key: str, value: Any, later: str, path: str, other: Any) -> Violation:
    """``key=value`` would win over what was typed after it."""
    wrong = f"{later}, typed after it, sets {path}={format_value(other)}"
    first = f"{key}={format_value(value)}"
    right = f"type {first} after {later}, where it wins, or leave it out"
    return Violation(key, value, wrong, right)


@contextmanager
def _clean_hydra() -> Iterator[None]:
    """Hydra with the schema's defaults registered; its process-wide state is as before afterwards."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton

    before = Singleton.get_state()
    try:
        GlobalHydra.instance().clear()
        ConfigStore.instance().store(name=_SCHEMA, node=default_dict())
        yield
    finally:
        Singleton.set_state(before)


def _nothing_chosen() -> Violation:
    options = group_options()
    right = f"experiment={spoken_list(options['experiment'])}, or model={spoken_list(options['model'])}"
    return Violation("model", None, "no model is chosen", right)


def _one_line(error: Exception) -> str:
    """The first line of a message; the rest is Hydra's advice to Hydra's developers."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
