"""Objectives by the name that ``objective.name`` takes: the one place where an objective is chosen."""

from __future__ import annotations

from megalm.config.schema import Objective as Settings
from megalm.objectives.base import Objective
from megalm.objectives.clm import CausalLM
from megalm.objectives.mlm import MaskedLM
from megalm.objectives.sft import SupervisedFineTuning

OBJECTIVES: dict[str, type[Objective]] = {"clm": CausalLM, "mlm": MaskedLM, "sft": SupervisedFineTuning}
"""``objective.name`` ▶ class."""


def make_objective(settings: Settings) -> Objective:
    """The objective that a config names."""
    return OBJECTIVES[settings.name](settings)
