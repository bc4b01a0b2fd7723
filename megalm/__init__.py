"""megalm: pretraining of language models in 3-D parallel, from a laptop to 1,024 GPUs.

What is named in ``__all__`` is for use in Python, and keeps its name and meaning; all other modules are internal.
Importing this package imports nothing else: each name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megalm.version import __version__

if TYPE_CHECKING:
    from megalm.api.comparison import compare
    from megalm.api.configs import compose
    from megalm.api.loaded import LoadedModel, load
    from megalm.api.training import Trained, TrainingError, train
    from megalm.config.schema import Config
    from megalm.errors import CheckpointError, ConfigError, DataError, MegalmError
    from megalm.generate.prompts import Settings
    from megalm.generate.requests import Completion, Sampling, Score
    from megalm.runs.compare import Comparison

_HOMES = {
    "CheckpointError": "megalm.errors",
    "Comparison": "megalm.runs.compare",
    "Completion": "megalm.generate.requests",
    "Config": "megalm.config.schema",
    "ConfigError": "megalm.errors",
    "DataError": "megalm.errors",
    "LoadedModel": "megalm.api.loaded",
    "MegalmError": "megalm.errors",
    "Sampling": "megalm.generate.requests",
    "Score": "megalm.generate.requests",
    "Settings": "megalm.generate.prompts",
    "Trained": "megalm.api.training",
    "TrainingError": "megalm.api.training",
    "compare": "megalm.api.comparison",
    "compose": "megalm.api.configs",
    "load": "megalm.api.loaded",
    "train": "megalm.api.training",
}
"""Where each public name is defined."""

__all__ = [
    "CheckpointError",
    "Comparison",
    "Completion",
    "Config",
    "ConfigError",
    "DataError",
    "LoadedModel",
    "MegalmError",
    "Sampling",
    "Score",
    "Settings",
    "Trained",
    "TrainingError",
    "__version__",
    "compare",
    "compose",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'megalm' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
