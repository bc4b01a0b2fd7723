"""An objective that megalm has never heard of trains on any layout as in one process, with clipping active throughout.

One has a loss from inside the blocks, one a loss per sequence with a head of its own, one a loss per pair of sequences;
see ``other_objectives.py``. They are plugged in from outside: model, runner, engine and data stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from harness import run_ranks_on_each
from other_objectives import TASKS
from parity import CLIP, MODEL, Layout

from megalm.config.schema import Config
from megalm.engine.deepspeed_engine import DeepSpeedEngine
from megalm.engine.micro_batches import evaluation_micro_batch
from megalm.mesh.groups import ParallelContext
from megalm.models.transformer import build_transformer
from megalm.verify.differences import differences
from megalm.verify.parity import Task, Trace, batch_of_replica, synthetic_batch, train_on_layout, train_plainly
from tests.families import bert_of

UNTIED = replace(MODEL, tie_embeddings=False)
LAYOUTS: dict[str, list[Layout]] = {
    "calm": [
        Layout(tp=2, pp=2),
        Layout(tp=2, sp=True, pp=2, recompute="full"),
        Layout(pp=4, schedule="zb_h1"),
        Layout(pp=2, v=2, dp=2, schedule="interleaved_1f1b"),
        Layout(cp=2, pp=2, cp_attention="ring"),
        Layout(tp=2, dp=2, zero_stage=2),
        Layout(dp=4, zero_stage=3),
    ],
    "score": [
        Layout(tp=2, pp=2),
        Layout(tp=2, sp=True, pp=2, schedule="zb_h1"),
        Layout(cp=2, dp=2),
        Layout(cp=2, pp=2, cp_attention="ring"),
        Layout(pp=2, dp=2, model=UNTIED, name="untied"),
        Layout(dp=4, zero_stage=2),
        Layout(dp=4, zero_stage=3),
    ],
    "preference": [
        Layout(tp=2, pp=2),
        Layout(tp=2, sp=True, pp=2, schedule="gpipe"),
        Layout(tp=4, sp=True, model=UNTIED, name="untied"),
        Layout(cp=2, dp=2, cp_attention="ring"),
        Layout(tp=2, dp=2, model=bert_of(MODEL), name="bert"),
        Layout(dp=4, zero_stage=2),
        Layout(dp=4, zero_stage=3),
    ],
}
CASES = [(name, layout) for name, layouts in LAYOUTS.items() for layout in layouts]


def config_of(name: str, layout: Layout) -> Config:
    """At least four pairs: the loss of two, whose margins are large, may be next to nothing."""
    config = layout.config()
    batch = max(8, layout.global_batch)
    return replace(
        config, objective=TASKS[name]().objective.settings, train=replace(config.train, global_batch_size=batch)
    )


def train_case(case: tuple[str, Layout]) -> Trace:
    name, layout = case
    return train_on_layout(config_of(name, layout), layout.topology, TASKS[name]())


@cache
def traces() -> list[list[Trace]]:
    return run_ranks_on_each(4, train_case, CASES, timeout_seconds=280)


@cache
def reference(name: str, layout: Layout) -> Trace:
    return train_plainly(config_of(name, layout), task=TASKS[name]())


@pytest.mark.parametrize("index", range(len(CASES)), ids=[f"{name}-{layout}" for name, layout in CASES])
def test_any_layout_gives_the_numbers_of_one_process(index: int) -> None:
    name, layout = CASES[index]
    want, ranks = reference(name, layout.reference), traces()[index]
    assert min(want.grad_norms) > CLIP, "clipping is active in every step"
    found = differences(want, ranks)
    assert found.initial_weights == 0.0
    assert found.missing == 0
    assert found.untrained == ()
    assert max(found.loss, found.grad_norm) < 1e-5
    assert found.weights < 1e-5
    assert found.copies == 0.0
    for theirs, ours in zip(want.terms, ranks[0].terms, strict=True):
        for term in TASKS[name]().objective.terms[1:]:
            assert ours[term] == pytest.approx(theirs[term], abs=1e-5, rel=1e-5), f"the term {term} under its name"


BATCH = 16
"""Of every layout: they are to report the same numbers."""

EVALUATED = [
    (name, layout)
    for name in TASKS
    for layout in (
        Layout(tp=2, sp=True, pp=2, batch=BATCH),
        Layout(cp=2, dp=2, cp_attention="ring", batch=BATCH),
        Layout(dp=4, zero_stage=3, batch=BATCH),
    )
]


def evaluate_case(case: tuple[str, Layout]) -> dict[str, float]:
    name, layout = case
    return _evaluate(config_of(name, layout), layout, TASKS[name]())


def _evaluate(config: Config, layout: Layout, task: Task) -> dict[str, float]:
    """What validation reports of a synthetic batch before the first step."""
    context = ParallelContext.create(layout.topology)
    model = build_transformer(
        config, config.model.vocab_size, context=context, dtype=torch.float32, objective=task.objective
    )
    engine = DeepSpeedEngine(model, context, config)
    batch = batch_of_replica(config, 0, context, task)
    rows = config.train.micro_batch_size
    parts = [
        evaluation_micro_batch(batch.take(slice(start, start + rows)), context.device, model.context_parallel)
        for start in range(0, len(batch.tokens), rows)
    ]
    sums = engine.evaluate(parts)
    totals = context.world_group.all_reduce(torch.tensor(list(sums.values()), dtype=torch.float64))
    counts = task.objective.counts(synthetic_batch(config, 0, task.make_batch), config.model.vocab_size)
    return task.objective.scores(dict(zip(sums, totals.tolist(), strict=True)), counts)


@cache
def scores() -> list[list[dict[str, float]]]:
    return run_ranks_on_each(4, evaluate_case, EVALUATED, timeout_seconds=200)


@pytest.mark.parametrize("index", range(len(EVALUATED)), ids=[f"{name}-{layout}" for name, layout in EVALUATED])
def test_validation_reports_what_one_process_finds(index: int) -> None:
    name, layout = EVALUATED[index]
    first = reference(name, layout.reference).losses[0]
    unit = TASKS[name]().objective.unit
    for found in scores()[index]:
        assert found["val_loss"] == pytest.approx(first, abs=1e-5), "the loss before the first step"
        assert found[f"val_{unit}s"] > 0
        assert len(found) > 2, "and what else the objective measures"
        assert found == scores()[index][0], "alike on every rank"
    alike = [scores()[i][0] for i, (other, _) in enumerate(EVALUATED) if other == name]
    assert all(each == pytest.approx(alike[0], abs=1e-5) for each in alike), "alike on every layout"
