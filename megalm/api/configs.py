"""``megalm.compose``: a checked config from what one would type on the command line."""

from __future__ import annotations

from collections.abc import Sequence

from megalm.config.compose import composition
from megalm.config.job import planned_world_size_of
from megalm.config.schema import Config
from megalm.plan.preflight import check_config
from megalm.runs.source_model import source_model


def compose(arguments: Sequence[str] = ()) -> Config:
    """The config that arguments make.

    Args:
        arguments: as for ``megalm train``: ``"experiment=quickstart"``, ``"parallel.tp=2"``, ``"--config=mine.yaml"``.

    Raises:
        ConfigError: everything that is wrong with them, one line each.
    """
    config = composition(list(arguments), source_model).config
    check_config(config, planned_world_size_of(config))
    return config
