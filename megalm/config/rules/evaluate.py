"""Rules about the tasks that a run is evaluated on while it trains; their files are read by ``evaluate.tasks``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megalm.config.arguments import expand_home
from megalm.config.job import Job, Rule, needs
from megalm.config.search_path import SearchPath
from megalm.config.violation import Fix, Violation, close_matches, spoken_list

_OF_TRAINED_RUNS = ("memorisation",)
"""Shipped tasks that only ``megalm evaluate`` asks; files that are based on one are refused when they are read."""


def tasks_are_known(job: Job) -> Iterator[Violation]:
    """Each task is one of megalm's, one of ``./conf/task``, or a file that is there; none is given twice."""
    names = job.config.evaluate.tasks or ()
    known = [task for task in SearchPath.of().tasks() if task not in _OF_TRAINED_RUNS] if names else []
    for name in names:
        if name.endswith((".yaml", ".yml")):
            if not Path(expand_home(name)).is_file():
                yield Violation("evaluate.tasks", name, "there is no such file", "a task file, or a task's name")
        elif name not in (*known, *_OF_TRAINED_RUNS):
            close = close_matches(name, known)
            right = f"did you mean {spoken_list(close)}?" if close else f"{spoken_list(known)}, or a file NAME.yaml"
            yield Violation("evaluate.tasks", name, "there is no such task", right)
        elif name in _OF_TRAINED_RUNS:
            wrong = "asks a trained model for what the run has read until then"
            yield Violation("evaluate.tasks", name, wrong, f"megalm evaluate RUN --task {name}, after training")
    if len(set(names)) < len(names):
        yield Violation("evaluate.tasks", list(names), "a task is there twice", "each task once")


def one_file_per_task(job: Job) -> Iterator[Violation]:
    """Data files are given for every task, or for none."""
    names, data = job.config.evaluate.tasks or (), job.config.evaluate.data
    if data is not None and len(data) != len(names):
        wrong = f"{len(data)} for the {len(names)} of evaluate.tasks"
        yield Violation("evaluate.data", list(data), wrong, "one for each, in their order, or evaluate.data=null")


def tasks_are_for_decoders(job: Job) -> Iterator[Violation]:
    """Tasks ask for texts and their likelihoods, which an encoder does not give."""
    if job.config.evaluate.tasks is not None and not job.config.model.causal:
        yield Violation(
            "evaluate.tasks",
            list(job.config.evaluate.tasks),
            "model.causal=false continues no text",
            fixes=(Fix("evaluate.tasks", (None,)),),
        )


@needs("engine.zero_stage")
def tasks_need_whole_parameters(job: Job) -> Iterator[Violation]:
    """ZeRO stage 3 splits each parameter over the replicas, and a question needs it whole."""
    if job.config.evaluate.tasks is not None and job.config.engine.zero_stage == 3:
        yield Violation(
            "evaluate.tasks",
            list(job.config.evaluate.tasks),
            "engine.zero_stage=3 holds no parameter whole between steps; megalm evaluate asks a checkpoint of the run",
            fixes=(Fix("evaluate.tasks", (None,)), Fix("engine.zero_stage", (2, 1))),
        )


RULES: tuple[Rule, ...] = (
    tasks_are_known,
    one_file_per_task,
    tasks_are_for_decoders,
    tasks_need_whole_parameters,
)
