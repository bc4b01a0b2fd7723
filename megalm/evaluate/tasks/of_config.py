"""The tasks that a run's config names. No torch."""

from __future__ import annotations

from pathlib import Path

from megalm.config.arguments import expand_home
from megalm.config.schema import Config
from megalm.data.shards.dataset import open_datasets, tokenizer_of
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.evaluate.tasks.data import HF
from megalm.evaluate.tasks.load import Changes, LoadedTask, load_tasks
from megalm.evaluate.tasks.requests import PreparedTask, prepare_tasks
from megalm.evaluate.tasks.task_file import read_task


def tasks_of_config(config: Config) -> list[LoadedTask]:
    """The tasks of ``evaluate.tasks`` with their data, checked as far as they can be without a tokenizer.

    Raises:
        ConfigError: a task is unknown or its file is wrong, or no data are named.
        DataError: data are missing, or hold records that a task cannot use.
    """
    section = config.evaluate
    changes = Changes(examples=section.examples, limit=section.limit)
    names, data = section.tasks or (), section.data or ()
    return load_tasks(names, data, changes, asked_by="evaluate.tasks", data_by="evaluate.data")


def prepared_of_config(config: Config, tokenizer: Tokenizer | None = None) -> list[PreparedTask]:
    """The same, as requests for the model of the config; none: it names no tasks.

    Args:
        config: of a run.
        tokenizer: of its data; None: read from there.

    Raises:
        ConfigError, DataError: as :func:`tasks_of_config`; and items that do not fit the model's sequences.
    """
    loaded = tasks_of_config(config)
    if not loaded:
        return []
    tokenizer = tokenizer or tokenizer_of(open_datasets(config.data))
    return prepare_tasks(loaded, tokenizer, config.model.sequence_length)


def check_tasks(config: Config) -> str | None:
    """Check a config's tasks on a machine that may not have their data.

    Returns:
        A line that says what was looked at; None: there are no tasks.

    Raises:
        ConfigError, DataError: as :func:`tasks_of_config`.
    """
    names = config.evaluate.tasks or ()
    if not names:
        return None
    data = config.evaluate.data or [read_task(name, asked_by="evaluate.tasks").data for name in names]
    elsewhere = [path for path in data if path is not None and not _is_here(path)]
    if elsewhere:
        return f"{'tasks':15}not checked: {', '.join(elsewhere)} is not on this machine"
    counts = [f"{loaded.task.name} ({len(loaded.questions):,} items)" for loaded in tasks_of_config(config)]
    return f"{'tasks':15}{', '.join(counts)}"


def _is_here(path: str) -> bool:
    """Whether data can be read without the network."""
    return Path(expand_home(path.removeprefix(HF))).exists()
