"""What Hydra has and megalm refuses, each with its reason. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from megalm.config.violation import Violation
from megalm.errors import ConfigError

_REFUSED = (
    (
        r"hydra\.(run|sweep)\..*|hydra\.(run|sweep)",
        "a run's folder is run.dir/run.name and stays the same, so that a resumed run finds its checkpoints",
        "run.dir=FOLDER run.name=NAME",
    ),
    (
        r"hydra[/.]launcher.*",
        "ranks are started by megalm itself (launch.ranks), torchrun, srun or mpirun, and -m runs one after another",
        "leave it out",
    ),
    (r"hydra[/.]sweeper.*", "-m runs every combination in order, and nothing else", "leave it out"),
    (
        r"hydra[/.](job_logging|hydra_logging).*|hydra\.verbose",
        "megalm writes its own logs, RUN/logs/rank-N.log",
        "leave it out",
    ),
    (r"hydra\.job\.chdir", "a run stays in the working folder, so that paths mean the same everywhere", "leave it out"),
    (r"hydra\.output_subdir", "the resolved config is RUN/config.yaml", "leave it out"),
    (r"hydra\b.*", "of Hydra's own settings megalm takes hydra.searchpath alone", "leave it out"),
)

_OPTIONS = {
    "--config-name": "every run begins with megalm's own config.yaml; --config FILE.yaml sets what you like on top",
    "--config-path": "every run begins with megalm's own config.yaml; --config-dir DIR adds groups of your own",
    "--package": "--cfg job prints the whole config",
    "--resolve": "--cfg job prints resolved values already",
    "--run": "a run is what megalm train does without it",
    "--hydra-help": "megalm train --help",
    "--shell-completion": "not in this version",
    "--experimental-rerun": "the same command with the same run.name resumes a run; RUN/config.yaml is its config",
}
"""Options of a Hydra application ▶ what megalm has instead."""

_UNSTABLE = re.compile(r"\$\{\s*(now|hydra)\s*:")
_PLACES = ("run.name", "run.dir")


def refused_setting(key: str, value: Any) -> Violation | None:
    """A setting of Hydra's own; None: it is none."""
    for pattern, wrong, right in _REFUSED:
        if re.fullmatch(pattern, key):
            return Violation(key, value, wrong, right)
    return None


def refused_option(argument: str) -> str | None:
    """A line about an option of Hydra's command line that megalm has not; None: it is none."""
    name = argument.partition("=")[0]
    name = {"-cn": "--config-name", "-cp": "--config-path", "-p": "--package", "-r": "--run"}.get(name, name)
    if name not in _OPTIONS:
        return None
    return f"{name}: an option of Hydra that megalm does not have; {_OPTIONS[name]}"


def check_places(mapping: Mapping[str, Any], places: Mapping[str, str]) -> None:
    """Refuse names and folders of runs that would be others at each start, whichever file they are from.

    Raises:
        ConfigError: naming field and file.
    """
    problems = []
    for field in _PLACES:
        section, _, name = field.partition(".")
        found = unstable_place(field, mapping[section].get(name)) if isinstance(mapping[section], dict) else None
        if found is not None:
            problems.append(f"{places[field]}: {found}" if ":" in places[field] else str(found))
    if problems:
        raise ConfigError(problems)


def unstable_place(field: str, value: Any) -> Violation | None:
    """A run's folder that would be another at each start; None: it would not."""
    match = _UNSTABLE.search(value) if field in _PLACES and isinstance(value, str) else None
    if match is None:
        return None
    if match[1] == "hydra":
        return Violation(field, value, "Hydra runs no job here, so ${hydra:...} has no value", f"{field}=NAME")
    wrong = "the folder would be a different one at each start, and a resumed or requeued run must find its own"
    return Violation(field, value, wrong, f"{field}=NAME without ${{now:...}}; RUN/metrics.jsonl has the times")
