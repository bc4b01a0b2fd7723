"""Tasks of a run that trains: what callbacks are told, and what becomes of one that fails or of a request to stop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.config.schema import Config, Evaluate
from megalm.data.tokenization.training import train_byte_level_bpe
from megalm.launch.signals import StopRequest
from megalm.mesh.groups import ParallelContext
from megalm.models.transformer import build_transformer, without_training
from megalm.objectives.registry import make_objective
from megalm.training.callbacks.base import CallbackList, TaskMetrics
from megalm.training.callbacks.metrics_jsonl import MetricsJsonl
from megalm.training.callbacks.tensorboard import TensorBoardLog
from megalm.training.callbacks.words import task_lines
from megalm.training.progress import Progress
from megalm.training.tasks import TrainingTasks

TASK = 'kind: cloze\ndata: {data}\nprompt: "{{{{ before }}}}"\ntarget: " {{{{ word }}}}"\nmetrics: [perplexity]\n'
CONTEXT = ParallelContext.single()
TOKENIZER = train_byte_level_bpe(["the cat sat on the mat"], 300)


class StopsAfter(StopRequest):
    """A request to stop that comes once a number of tasks have been asked."""

    def __init__(self, asked: int) -> None:
        super().__init__()
        self._left = asked

    def pending(self) -> str | None:
        self._left -= 1
        return "TERM" if self._left < 0 else None


class Heard(MetricsJsonl):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[TaskMetrics] = []

    def on_tasks(self, metrics: TaskMetrics) -> None:
        super().on_tasks(metrics)
        self.told.append(metrics)


@pytest.fixture
def asking(config: Config, make_context: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[Any, ...]]:
    """Makes the tasks ``first`` and ``second`` of a model: (tasks, model, what a callback heard)."""
    (tmp_path / "items.jsonl").write_text(json.dumps({"before": "the cat", "word": "sat"}) + "\n")
    for name in ("first", "second"):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(data=tmp_path / "items.jsonl"))
    names = tuple(str(tmp_path / f"{name}.yaml") for name in ("first", "second"))
    config = replace(config, evaluate=Evaluate(tasks=names))

    def make(stop: StopRequest) -> tuple[Any, ...]:
        objective = make_objective(config.objective)
        model = build_transformer(config, 300, context=CONTEXT, dtype=torch.float32, objective=objective)
        heard = Heard()
        callbacks = CallbackList([heard, TensorBoardLog()])
        callbacks.on_start(make_context())
        tasks = TrainingTasks(
            config,
            context=CONTEXT,
            model=model,
            objective=objective,
            tokenizer=TOKENIZER,
            run_dir=tmp_path,
            callbacks=callbacks,
            stop=stop,
        )
        return tasks, model, heard

    return make


def test_a_step_changes_the_answers(asking: Callable[..., tuple[Any, ...]], tmp_path: Path) -> None:
    tasks, model, heard = asking(StopRequest())
    tasks.ask(Progress(1, 8, 512))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    tasks.ask(Progress(2, 16, 1024))
    first, second = heard.told
    assert first.headlines == (("first", "perplexity"), ("second", "perplexity"))
    assert abs(first.scores["first/perplexity"] - second.scores["first/perplexity"]) > 1
    assert [path.name.rsplit("-", 1)[0] for path in sorted((tmp_path / "results").glob("*.json"))] == [
        "first-step-00000001",
        "first-step-00000002",
        "second-step-00000001",
        "second-step-00000002",
    ]
    row = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert row["step"] == 1
    assert row["first/perplexity"] == first.scores["first/perplexity"]
    assert row["first/perplexity_low"] <= row["first/perplexity"] <= row["first/perplexity_high"]


def test_no_parameter_is_copied_or_moved(asking: Callable[..., tuple[Any, ...]]) -> None:
    tasks, model, _ = asking(StopRequest())
    before = {name: (parameter.data_ptr(), parameter.stride()) for name, parameter in model.named_parameters()}
    tasks.ask(Progress(1, 8, 512))
    assert {name: (each.data_ptr(), each.stride()) for name, each in model.named_parameters()} == before
    view = tasks._model.model
    assert all(own is shared for own, shared in zip(model.parameters(), view.parameters(), strict=True))
    assert model.training
    assert not view.training


def test_a_stop_lets_no_further_task_begin(asking: Callable[..., tuple[Any, ...]]) -> None:
    tasks, _, heard = asking(StopsAfter(1))
    tasks.ask(Progress(3, 24, 1536))
    (told,) = heard.told
    assert told.headlines == (("first", "perplexity"),)
    assert told.error == "not asked, since the run was told to stop: second"
    assert told.row()["tasks_error"] == told.error
    assert task_lines(told, 100)[-1] == f"step   3/100  tasks: {told.error}; training goes on"


def test_a_model_that_gives_no_numbers_stops_no_training(asking: Callable[..., tuple[Any, ...]]) -> None:
    tasks, model, heard = asking(StopRequest())
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    tasks.ask(Progress(4, 32, 2048))
    (told,) = heard.told
    assert told.scores == {}
    assert told.error is not None
    assert "the model's likelihood is not finite" in told.error


def test_a_view_has_the_windows_and_the_rotary_tables_of_its_model(config: Config) -> None:
    model = replace(config.model, position="rotary", attention_windows=(0, 8), num_kv_heads=1)
    config = replace(config, model=model)
    objective = make_objective(config.objective)
    trained = build_transformer(config, 300, context=CONTEXT, dtype=torch.float32, objective=objective)
    view = without_training(trained, config, 300, context=CONTEXT, objective=objective)
    tokens = torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(view(tokens), trained.eval()(tokens))
