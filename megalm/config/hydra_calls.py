"""What megalm has Hydra do: parse values, expand sweeps, follow defaults lists. The only file that imports hydra.

Nothing else of Hydra is used: no working directory, no logging, no launcher. Merging is megalm's own, in
``layers.py``, which knows the line that each value is from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from megalm.config.yaml_file import describe_fault
from megalm.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.default_element import ResultDefault
    from hydra.core.override_parser.types import Override

_PRIMARY = "megalm_primary"
"""Name of the primary config in Hydra's store: a ``config.yaml`` of the user's must not be taken for it."""


@dataclass(frozen=True)
class Chosen:
    """One file of a composition, in the order of merging.

    Attributes:
        config_path: such as ``model/gpt3_125m``; empty for the primary config.
        package: dotted place of its content; empty for the whole config.
        parent: ``config_path`` of the file whose defaults list names it.
    """

    config_path: str
    package: str
    parent: str


def parse_value(text: str) -> Any:
    """A typed value: number, true, null, list, mapping, quoted text.

    Raises:
        ValueError: not a value in Hydra's grammar, or several (a sweep).
    """
    override = _parsed(text)
    if override.is_sweep_override():
        raise ValueError("several values")
    return override.value()


def is_sweep(text: str) -> bool:
    """Whether a value is several: ``1,2``, ``choice(1,2)``, ``range(1,5)``.

    Raises:
        ValueError: not in Hydra's grammar.
    """
    return _parsed(text).is_sweep_override()


def unquoted(text: str) -> str | None:
    """The text inside the quotes that enclose a value; None: no quotes enclose all of it."""
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        return None
    try:
        override = _parsed(text)
    except ValueError:
        return None
    return None if override.is_sweep_override() else str(override.value())


def sweep_values(text: str) -> list[str]:
    """The values of a sweep, each as it would be typed.

    Raises:
        ValueError: not in Hydra's grammar, or without a finite list of values (``interval``).
    """
    from hydra.errors import HydraException

    override = _parsed(text)
    if not override.is_sweep_override():
        return [text]
    if not override.is_discrete_sweep():
        raise ValueError("no list of values")
    try:
        return [_typed(value) for value in override.sweep_string_iterator()]
    except HydraException as error:
        raise ValueError(str(error)) from None


def know_resolvers() -> None:
    """Let OmegaConf know what Hydra adds to it, such as ``${now:%Y}``."""
    from hydra.core.utils import setup_globals

    setup_globals()


def follow_defaults(
    primary: Mapping[str, Any],
    defaults_of: Mapping[str, Any],
    folders: Sequence[Path],
    options: Mapping[str, str],
    removed: Sequence[str],
) -> list[Chosen]:
    """The files that a choice of options comes to, with the defaults lists inside them.

    Args:
        primary: content of the primary config.
        defaults_of: the schema's defaults, which the primary config names ``schema``.
        folders: where options are looked for, in order.
        options: group ▶ its option.
        removed: groups that are left out.

    Raises:
        ConfigError: the files do not go together, or one is not YAML.
    """
    first, *others = folders
    node = {**primary, "hydra": {"searchpath": [f"file://{folder}" for folder in others]}}
    lines = [*(f"{group}={_quoted(name)}" for group, name in options.items()), *(f"~{group}" for group in removed)]
    found = _defaults_list({_PRIMARY: node, "schema": defaults_of}, first, lines)
    return [
        Chosen("" if item.primary else str(item.config_path), item.package or "", _parent(item.parent))
        for item in found
        if item.config_path is not None and not f"{item.config_path}/".startswith("hydra/")
    ]


def _defaults_list(store: Mapping[str, Mapping[str, Any]], folder: Path, overrides: list[str]) -> list[ResultDefault]:
    """Hydra's own list of the files that it would merge.

    Raises:
        ConfigError: one is not YAML, or they do not go together.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf.errors import OmegaConfBaseException

    try:
        with _clean_hydra(store), hydra.initialize_config_dir(str(folder), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            return list(loader.compute_defaults_list(_PRIMARY, overrides, RunMode.RUN).defaults)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(describe_fault(error, Path(mark.name if mark else folder))) from None
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        wrong = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"conf={folder}: {wrong}; defaults lists that name options which exist") from None


def _typed(text: str) -> str:
    """As it would be typed: Hydra spells true and false as Python does."""
    return text.lower() if text in ("True", "False") else text


def _parent(name: str | None) -> str:
    return "" if name in (None, _PRIMARY) else str(name)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _parsed(text: str) -> Override:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(f"value={text}")
    except HydraException as error:
        raise ValueError(str(error)) from None


@contextmanager
def _clean_hydra(nodes: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Hydra with some configs in its store; its process-wide state is as before afterwards."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.singleton import Singleton

    before = Singleton.get_state()
    try:
        GlobalHydra.instance().clear()
        for name, node in nodes.items():
            ConfigStore.instance().store(name=name, node=dict(node))
        yield
    finally:
        Singleton.set_state(before)
