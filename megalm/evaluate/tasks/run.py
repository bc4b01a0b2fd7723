"""Asks a language model tasks, and scores what it answers. No torch: the model may be on any ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import isfinite
from typing import Any

from megalm.errors import DataError
from megalm.evaluate.tasks.bootstrap import Interval, interval
from megalm.evaluate.tasks.filters import filtered
from megalm.evaluate.tasks.metrics.base import Array, ChoiceScore, Chosen, Completed, Generated, Metric
from megalm.evaluate.tasks.metrics.registry import make_metrics
from megalm.evaluate.tasks.metrics.words import OverReferences
from megalm.evaluate.tasks.requests import Asked, PreparedTask
from megalm.evaluate.tasks.task import CLOZE, GENERATION, Task
from megalm.generate.requests import Completion, GenerateRequest, LanguageModel, Progress, Score, ScoreRequest

Answer = Generated | Chosen | Completed


@dataclass(frozen=True)
class MetricResult:
    """One metric of one task.

    Attributes:
        metric: the metric; its signature is whole.
        value: over all items.
        interval: 95 %, by bootstrap over items.
        statistics: [N, K], of each item; a comparison resamples them.
    """

    metric: Metric[Any]
    value: float
    interval: Interval
    statistics: Array

    @property
    def name(self) -> str:
        """The metric's."""
        return self.metric.name

    def of_items(self) -> list[float]:
        """The metric of each item by itself."""
        return [float(value) for value in self.metric.values(self.statistics)]


@dataclass(frozen=True)
class TaskResult:
    """What a model reached in a task.

    Attributes:
        prepared: the task and what was asked.
        checkpoint: the folder that the model's weights are from.
        run: name of its run.
        metrics: the first is the headline.
        answers: to each of ``prepared.asked``.
        raw: what the model wrote for each, before filters; empty where it wrote nothing.
    """

    prepared: PreparedTask
    checkpoint: str
    run: str
    metrics: tuple[MetricResult, ...]
    answers: tuple[Answer, ...]
    raw: tuple[Completion, ...]

    @property
    def task(self) -> Task:
        """The task."""
        return self.prepared.task

    @property
    def unfinished(self) -> int:
        """How many texts ended at ``max_new_tokens`` and nowhere else."""
        return sum(completion.finish == "length" for completion in self.raw)

    def notes(self) -> list[str]:
        """What one should know of the values, in words."""
        lines = self.prepared.notes()
        if self.unfinished:
            most = f"max_new_tokens={self.task.max_new_tokens}"
            lines.append(f"{self.task.name}: {self.unfinished} of {len(self.raw)} texts ended at {most}")
        for metric in (found.metric for found in self.metrics):
            if isinstance(metric, OverReferences) and (emptied := metric.emptied(self.answers)):  # type: ignore[arg-type]
                lines.append(
                    f"{self.task.name}/{metric.name}: of {emptied} right answers nothing is left by normalise:squad, "
                    "as of a, an and the, so that writing nothing is right; exact_match with normalise: none keeps them"
                )
        return lines

    def metric(self, name: str) -> MetricResult:
        """One metric by its name, which the task must have."""
        return next(found for found in self.metrics if found.name == name)


def evaluate_tasks(
    model: LanguageModel, tasks: Sequence[PreparedTask], *, progress: Progress | None = None
) -> list[TaskResult]:
    """Ask a model all tasks, one after the other.

    Args:
        model: that is asked.
        tasks: prepared with its tokenizer and the length of its sequences.
        progress: told how many more of all ``PreparedTask.requests`` are done.

    Raises:
        ConfigError, DataError: see :class:`~megalm.generate.requests.LanguageModel`.
        DataError: the model's log-likelihoods are not numbers.
    """
    return [_evaluated(model, task, progress) for task in tasks]


def _evaluated(model: LanguageModel, prepared: PreparedTask, progress: Progress | None) -> TaskResult:
    task = prepared.task
    raw: list[Completion] = []
    answers: list[Answer] = []
    if task.kind == GENERATION:
        raw = _written(model, [each.generate for each in prepared.asked if each.generate is not None], progress)
        for asked, completion in zip(prepared.asked, raw, strict=True):
            answers.append(Generated(filtered(completion.text, task.filters), asked.question.references))
    else:
        answers += _likelihoods(model, prepared, progress)
    results = [_measured(metric, answers, task) for metric in make_metrics(task.metrics, task.kind)]
    return TaskResult(prepared, model.checkpoint, model.config.run.name, tuple(results), tuple(answers), tuple(raw))


def _measured(metric: Metric[Any], answers: Sequence[Answer], task: Task) -> MetricResult:
    statistics = metric.statistics(answers)
    return MetricResult(metric, metric.value(statistics), interval(metric, statistics, seed=task.seed), statistics)


def _written(model: LanguageModel, requests: Sequence[GenerateRequest], progress: Progress | None) -> list[Completion]:
    found = model.generate(requests, on_done=None if progress is None else lambda _number, _completions: progress(1))
    return [completions[0] for completions in found]


def _likelihoods(model: LanguageModel, prepared: PreparedTask, progress: Progress | None) -> list[Answer]:
    """Scores of all targets or choices, each different request asked once."""
    wanted = [request for each in prepared.asked for request in chain(each.score, each.unconditional)]
    different = list(dict.fromkeys(wanted))
    scores = dict(zip(different, model.score(different, progress=progress), strict=True))
    if progress is not None and len(wanted) > len(different):
        progress(len(wanted) - len(different))
    return [_answer(prepared.task, asked, scores) for asked in prepared.asked]


def _answer(task: Task, asked: Asked, scores: dict[ScoreRequest, Score]) -> Answer:
    found = [scores[request] for request in asked.score]
    if not all(isfinite(score.total) for score in found):
        wrong = "the model's likelihood is not finite; another checkpoint"
        raise DataError(f"{asked.question.item.place}: {wrong} (task {task.name})")
    if task.kind == CLOZE:
        return Completed(found[0].total, len(found[0].log_probabilities), asked.question.target, found[0].is_greedy)
    alone: list[float | None] = [scores[request].total for request in asked.unconditional]
    choices = zip(found, asked.question.choices, alone or [None] * len(found), strict=True)
    each = (ChoiceScore(score.total, len(score.log_probabilities), text, prior) for score, text, prior in choices)
    return Chosen(tuple(each), asked.question.answer)
