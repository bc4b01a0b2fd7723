"""Command line ▶ :class:`Config`, by way of the YAML groups that megalm ships and those of the user.

From weak to strong: the schema's defaults, megalm's ``config.yaml``, the options of groups, the experiment; options
that a ``--config`` file names, and its fields; options that were typed, and fields that were typed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megalm.config.chosen_files import check_files
from megalm.config.command_line import Settings, read_settings
from megalm.config.hydra_calls import follow_defaults
from megalm.config.layers import (
    FieldPath,
    Layer,
    Merged,
    Value,
    family,
    layer_of_defaults,
    layer_of_file,
    layer_of_settings,
)
from megalm.config.overrides import Reader, Setting
from megalm.config.parse import MISSING_VALUE, config_from_dict, config_to_dict, default_dict
from megalm.config.references import resolve_references
from megalm.config.refused import check_places
from megalm.config.schema import Config
from megalm.config.search_path import CONFIG_FILE, SearchPath, conf_dir
from megalm.config.violation import Violation, format_value, spoken_list
from megalm.config.yaml_file import read_yaml
from megalm.errors import ConfigError

__all__ = [
    "CONFIG_FILE",
    "Composition",
    "Source",
    "compose",
    "conf_dir",
    "group_options",
    "load_run_config",
    "save_config",
]

_SCHEMA = "schema"
"""Name under which ``conf/config.yaml`` finds the schema's defaults."""


@dataclass(frozen=True)
class Source:
    """The model of the run whose weights a new run begins with.

    Attributes:
        name: how messages name the run.
        model: the section ``model`` of its config.
    """

    name: str
    model: Mapping[str, Any]


FindSource = Callable[[Mapping[str, Any]], Source | None]
"""Mapping of a config ▶ the run that it begins with; None: it begins with none."""


@dataclass(frozen=True)
class Composition:
    """A config, and how it came to be.

    Attributes:
        config: the config.
        places: dotted name of each field ▶ where its value is from.
        notes: what the user should know of it, one line each.
    """

    config: Config
    places: Mapping[str, str]
    notes: tuple[str, ...]


def compose(arguments: Sequence[str] = (), find_source: FindSource | None = None) -> Config:
    """The config that arguments make: see :func:`composition`."""
    return composition(arguments, find_source).config


def composition(arguments: Sequence[str] = (), find_source: FindSource | None = None) -> Composition:
    """The config that the shipped configs, the user's and the arguments make.

    Args:
        arguments: as on the command line: ``experiment=quickstart``, ``parallel.tp=2``, ``--config-dir=DIR``.
        find_source: of a run that begins with another's weights, the model of that one, so that it need not be named.

    Raises:
        ConfigError: everything that is wrong with arguments and files, one line each: what is malformed, unknown, or
            by itself out of range; or every field that is missing or of the wrong type.
    """
    settings = read_settings(arguments)
    layers = _layers_of_files(settings)
    notes = list(settings.search_path.notes())
    merged = _merge(layers, settings)
    source = None if find_source is None or _is_chosen(settings, "model") else find_source(_resolved_so_far(merged))
    if source is not None:
        layers, told = _with_model_of(source, layers)
        notes += told
        merged = _merge(layers, settings)
    check_places(merged.mapping(), merged.places())
    mapping = resolve_references(merged.mapping(), merged.places())
    if source is None and all(mapping["model"].get(name) == MISSING_VALUE for name in _ESSENTIAL):
        raise ConfigError(str(_nothing_chosen(settings.search_path, mapping["checkpoint"])))
    files = {path: place for path, place in merged.places().items() if ":" in place}
    return Composition(config_from_dict(mapping, files), merged.places(), tuple(notes))


def _resolved_so_far(merged: Merged) -> Mapping[str, Any]:
    """The mapping with references followed, where all of them lead to something without the other run's model."""
    try:
        return resolve_references(merged.mapping(), {})
    except ConfigError:
        return merged.mapping()


_ESSENTIAL = ("num_layers", "hidden_size", "num_heads")
"""What every model says of itself."""


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
        right = "the folder of a run, such as runs/quickstart"
        if path.with_name("config.json").is_file():
            command = f"megalm convert --from hf --to megalm {run_dir} runs/NAME"
            right = f"a model of Hugging Face's; {command} makes a run of it"
        raise ConfigError(f"run={run_dir}: {wrong}; {right}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"run={run_dir}: cannot read {CONFIG_FILE} ({_one_line(error)}); a run's own file") from None
    mapping = config_to_dict(config_from_dict(saved))
    reader = Reader({})
    for override in overrides:
        reader.read(override)
    if problems := [*reader.problems, *(reader.problems_of_values() if reader.problems else [])]:
        raise ConfigError(problems)
    for setting in reader.settings:
        section, _, name = setting.key.partition(".")
        mapping[section][name] = setting.value
    return config_from_dict(resolve_references(mapping, {}))


def save_config(config: Config, path: str | Path) -> None:
    """Write a config as plain YAML that :func:`load_run_config` reads back."""
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def group_options() -> dict[str, list[str]]:
    """The groups of the shipped ``conf/`` and of ``./conf``, and the names that each can be set to."""
    return SearchPath.of().group_options()


def _layers_of_files(settings: Settings) -> list[Layer]:
    """The schema's defaults and every file that the chosen options come to, in the order of merging.

    Raises:
        ConfigError: what is wrong with the files, all of it that can be read.
    """
    search_path, options = settings.search_path, settings.options
    check_files(search_path, options)
    primary = read_yaml(search_path.primary)
    chosen = follow_defaults(
        primary.values,
        default_dict(),
        [folder.path for folder in search_path.folders],
        {group: name for group, name in options.items() if name is not None},
        [group for group, name in options.items() if name is None],
    )
    layers, problems = [], []
    for item in chosen:
        try:
            if item.config_path == _SCHEMA:
                layers.append(layer_of_defaults(default_dict()))
                continue
            path = search_path.find(item.config_path) if item.config_path else search_path.primary
            if path is not None:  # a folder may hold other things than files
                file = read_yaml(path)
                layers.append(layer_of_file(file, item.package, option=item.config_path, parent=item.parent))
        except ConfigError as error:
            problems += error.lines
    if problems:
        raise ConfigError(problems)
    return layers


def _merge(layers: Sequence[Layer], settings: Settings) -> Merged:
    """All layers, weak to strong.

    Hydra merges an experiment after all groups, so that a value in its file beats an option of the command line. Here a
    field's own override wins, then a group's option that was asked for, then the experiment.

    Raises:
        ConfigError: of two that set a field otherwise, the one that does not win was typed last; both were asked for.
    """
    merged = Merged()
    merged.add(layers)
    merged.add(_asked_for(layers, settings.of_files))
    merged.add([layer_of_settings(settings.of_files)])
    if problems := _contradictions(layers, merged, settings.typed):
        raise ConfigError([str(problem) for problem in problems])
    merged.add(_asked_for(layers, settings.typed))
    merged.add([layer_of_settings(settings.typed)])
    return merged


def _asked_for(layers: Sequence[Layer], settings: Sequence[Setting]) -> list[Layer]:
    """The layers of options that were chosen by name, which an experiment does not change."""
    return [
        layer
        for item in settings
        if item.is_group and item.value is not None and item.key != "experiment"
        for layer in family(layers, f"{item.key}/{item.value}")
    ]


def _contradictions(layers: Sequence[Layer], below: Merged, typed: Sequence[Setting]) -> list[Violation]:
    """What was typed first and would win over what was typed after it."""
    number_of = {item.key: number for number, item in enumerate(typed)}
    experiment = number_of.get("experiment", -1)
    problems = []
    for number, item in enumerate(typed):
        for layer in _asked_for(layers, [item]):
            for path, value in layer.values.items():
                name = ".".join(path)
                if name in number_of:
                    field = typed[number_of[name]]
                    if number_of[name] < number and field.value != value.value:
                        later = f"{item.key}={item.value}"
                        problems.append(_both_asked_for(name, field.value, later, name, value.value))
                elif number < experiment and below.values[path].value != value.value:
                    later = f"experiment={typed[experiment].value}"
                    problems.append(_both_asked_for(item.key, item.value, later, name, below.values[path].value))
    return problems


def _both_asked_for(key: str, value: Any, later: str, path: str, other: Any) -> Violation:
    """``key=value`` would win over what was typed after it."""
    wrong = f"{later}, typed after it, sets {path}={format_value(other)}"
    first = f"{key}={format_value(value)}"
    right = f"type {first} after {later}, where it wins, or leave it out"
    return Violation(key, value, wrong, right)


def _is_chosen(settings: Settings, group: str) -> bool:
    """Whether a --config file or the command line names an option of a group; an experiment's choice does not count."""
    return settings.options.get(group) is not None


def _with_model_of(source: Source, layers: Sequence[Layer]) -> tuple[list[Layer], list[str]]:
    """The layers with another run's model in the place of the option that an experiment chooses.

    What an experiment's own file or the user sets of the model stays on top, and is compared with the weights later.
    """
    replaced = [layer for layer in layers if layer.option.startswith("model/")]
    kept = [layer for layer in layers if layer not in replaced]
    known = default_dict()["model"]
    values: dict[FieldPath, Value] = {
        ("model", name): Value(value, source.name) for name, value in source.model.items() if name in known
    }
    first = next((at for at, layer in enumerate(kept) if layer.option), len(kept))
    different = [
        f"{path[1]} {format_value(value.value)} → {format_value(values[path].value)}"
        for layer in replaced
        for path, value in layer.values.items()
        if path in values and values[path].value != value.value
    ]
    note = f"model          taken from {source.name}"
    if different:
        note += f", not the experiment's model={replaced[-1].option.partition('/')[2]}: {', '.join(different)}"
    told = [note] if different or not replaced else []
    return [*kept[:first], Layer(values), *kept[first:]], told


def _nothing_chosen(search_path: SearchPath, checkpoint: Mapping[str, Any]) -> Violation:
    options = search_path.group_options()
    right = f"experiment={spoken_list(options['experiment'])}, or model={spoken_list(options['model'])}"
    for name in ("init_from", "finetune_from"):
        if checkpoint.get(name) is not None:
            wrong = "not a complete checkpoint of this machine, so that the model is not known"
            return Violation(f"checkpoint.{name}", checkpoint[name], wrong, f"the path of one; or {right}")
    return Violation("model", None, "no model is chosen", right)


def _one_line(error: Exception) -> str:
    """The first line of a message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
