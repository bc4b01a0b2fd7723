"""When gradients are reduced, in which order, and what an overflow in fp16 costs."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from harness import run_ranks, run_ranks_on_each
from parity import Layout

OVERLAPPING = [
    Layout(dp=4),
    Layout(dp=4, zero_stage=0),
    Layout(dp=4, zero_stage=2),
    Layout(pp=2, dp=2),
    Layout(pp=2, dp=2, schedule="gpipe"),
    Layout(pp=2, v=2, dp=2, schedule="interleaved_1f1b"),
]
SPLIT = Layout(pp=2, dp=2, schedule="zb_h1")


def log_a_step(layout: Layout) -> list[tuple]:
    """Runs on every rank: the events of one step in the order of their time.

    ("begins" or "ends", stage, whether it is the stage's last work) and ("bucket", stage, flat buffer, first element).
    """
    from megalm.engine.deepspeed_engine import DeepSpeedEngine
    from megalm.engine.gradients import GradientBuckets
    from megalm.mesh.groups import ParallelContext
    from megalm.models.transformer import build_transformer
    from megalm.objectives.registry import make_objective
    from megalm.verify.parity import DTYPES, micro_batches_of_rank

    events: list[tuple] = []
    original = {name: getattr(GradientBuckets, name) for name in ("before", "after", "_issue")}

    def before(self, stage, *, last):
        events.append(("begins", stage, last))
        original["before"](self, stage, last=last)

    def after(self, stage, *, last):
        events.append(("ends", stage, last))  # backward has ended; what is issued from here on overlaps nothing of it
        original["after"](self, stage, last=last)

    def issue(self, bucket):
        events.append(("bucket", bucket.stage, self._buckets.index(bucket)))
        original["_issue"](self, bucket)

    config = layout.config()
    context = ParallelContext.create(layout.topology)
    objective = make_objective(config.objective)
    model = build_transformer(
        config, config.model.vocab_size, context=context, dtype=DTYPES[layout.dtype], objective=objective
    )
    engine = DeepSpeedEngine(model, context, config)
    GradientBuckets.before, GradientBuckets.after, GradientBuckets._issue = before, after, issue
    try:
        engine.train_step(micro_batches_of_rank(config, 0, context, model.context_parallel), 1e-4)
    finally:
        for name, function in original.items():
            setattr(GradientBuckets, name, function)
    return events


@cache
def logs() -> list[list[list[tuple]]]:
    """By layout, then by rank."""
    return run_ranks_on_each(4, log_a_step, [*OVERLAPPING, SPLIT])


@pytest.mark.parametrize("index", range(len(OVERLAPPING)), ids=map(str, OVERLAPPING))
def test_buckets_are_reduced_while_the_last_backward_goes_on(index: int) -> None:
    for events in logs()[index]:
        stages = {event[1] for event in events if event[0] == "begins"}
        for stage in stages:
            begin = events.index(("begins", stage, True))
            end = events.index(("ends", stage, True))
            during = [e for e in events[begin:end] if e[0] == "bucket"]
            assert len(during) >= 2, "several buckets were on their way before the backward had ended"
            every = {e for e in events if e[0] == "bucket" and e[1] == stage}
            assert len(set(during)) / len(every) > 0.5, "most of them"
            if OVERLAPPING[index].zero_stage == 2:
                first_end = events.index(("ends", stage, False))
                assert any(e[0] == "bucket" for e in events[:first_end]), "in every backward"
            else:
                assert not any(e[0] == "bucket" and e[1] == stage for e in events[:begin]), "each once, complete"


def test_split_backward_reduces_a_stage_after_its_last_weight_gradient() -> None:
    for events in logs()[-1]:
        buckets = [i for i, e in enumerate(events) if e[0] == "bucket"]
        (stage,) = {e[1] for e in events}
        assert buckets and min(buckets) > events.index(("ends", stage, True))


@pytest.mark.parametrize("index", range(len(OVERLAPPING) + 1), ids=map(str, [*OVERLAPPING, SPLIT]))
def test_all_replicas_issue_buckets_in_one_order(index: int) -> None:
    layout = [*OVERLAPPING, SPLIT][index]
    issued = [[e for e in events if e[0] == "bucket"] for events in logs()[index]]
    for rank, mine in enumerate(issued):
        assert mine == issued[rank // layout.dp * layout.dp]
        backwards = 16 // layout.dp // 2 if layout.zero_stage == 2 else 1  # of two samples each
        assert len(mine) == backwards * len(set(mine)), "each bucket once in each"


def overflow_on_ranks() -> list:
    """An fp16 step whose scale overflows, and those after it; returns what this rank saw."""
    from dataclasses import replace

    from megalm.engine.deepspeed_engine import DeepSpeedEngine
    from megalm.mesh.groups import ParallelContext
    from megalm.models.transformer import build_transformer
    from megalm.objectives.registry import make_objective
    from megalm.verify.parity import micro_batches_of_rank

    layout = Layout(tp=2, dp=2, dtype="fp16")
    config = layout.config()
    config = replace(config, engine=replace(config.engine, initial_loss_scale=2.0**24, loss_scale_window=3))
    context = ParallelContext.create(layout.topology)
    objective = make_objective(config.objective)
    model = build_transformer(
        config, config.model.vocab_size, context=context, dtype=torch.float16, objective=objective
    )
    engine = DeepSpeedEngine(model, context, config)
    seen = []
    for step in range(14):
        before = [p.detach().clone() for p in model.parameters()]
        result = engine.train_step(micro_batches_of_rank(config, step, context, model.context_parallel), 1e-3)
        engine.settle_weights()
        changed = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        finite = all(bool(p.isfinite().all()) for p in model.parameters())
        norm, updates = float(result.grad_norm), engine.scalar_state()["optimizer_steps"]
        seen.append((result.loss_scale, norm, changed, finite, updates))
    return seen


def test_an_overflow_is_skipped_alike_on_all_ranks() -> None:
    per_rank = run_ranks(4, overflow_on_ranks)
    steps = 0
    for number, ranks in enumerate(zip(*per_rank, strict=True)):
        scale, norm, changed, finite, taken = ranks[0]
        overflowed = math.isnan(norm)
        steps += not overflowed
        assert all((r[0], r[2], r[3], r[4]) == (scale, changed, finite, taken) for r in ranks)
        assert finite
        assert changed == (not overflowed), "an overflowed step leaves every weight as it was"
        assert taken == steps, "and is none of AdamW's"
        if number + 1 < len(per_rank[0]) and overflowed:
            assert per_rank[0][number + 1][0] == scale / 2
    assert per_rank[0][0][1] != per_rank[0][0][1], "the first scale is too large"
    assert steps >= 4
    scales = [seen[0] for seen in per_rank[0]]
    assert any(later == 2 * earlier for earlier, later in itertools.pairwise(scales)), "and doubles again"


def resume_in_memory() -> tuple:
    """Six fp16 steps at a stretch, and three with three more in a new engine that loads the first one's state."""
    from dataclasses import replace

    from megalm.engine.deepspeed_engine import DeepSpeedEngine
    from megalm.mesh.groups import ParallelContext
    from megalm.models.transformer import build_transformer
    from megalm.objectives.registry import make_objective
    from megalm.verify.parity import micro_batches_of_rank

    layout = Layout(dtype="fp16")
    config = layout.config()
    config = replace(config, engine=replace(config.engine, initial_loss_scale=2.0**20, loss_scale_window=3))
    context = ParallelContext.create(layout.topology)

    def engine() -> DeepSpeedEngine:
        objective = make_objective(config.objective)
        model = build_transformer(
            config, config.model.vocab_size, context=context, dtype=torch.float16, objective=objective
        )
        return DeepSpeedEngine(model, context, config)

    def run(trained: DeepSpeedEngine, steps: range) -> list[tuple]:
        results = [
            trained.train_step(micro_batches_of_rank(config, step, context, trained.model.context_parallel), 1e-3)
            for step in steps
        ]
        return [(float(r.terms["loss"]), float(r.grad_norm), r.loss_scale) for r in results]

    straight = run(engine(), range(12))
    first = engine()
    run(first, range(7))
    pieces = {(p.name, p.kind): p.values.clone() for p in first.state_pieces()}
    scalars = first.scalar_state()

    class Source:
        def read_local(self, name, kind, shard):
            return self.read_flat(name, kind, shard, 0, shard.local_numel).view(shard.local_shape)

        def read_flat(self, name, kind, shard, flat_start, length):
            saved = pieces[name, kind]
            padded = torch.cat((saved, saved.new_zeros(shard.local_numel - saved.numel())))
            return padded[flat_start : flat_start + length]

    second = engine()
    second.load_state(Source(), scalars=scalars)
    return straight[7:], run(second, range(7, 12)), scalars


def test_fp16_resumes_with_its_loss_scale_to_the_last_bit() -> None:
    ((straight, resumed, scalars),) = run_ranks(1, resume_in_memory)
    assert str(resumed) == str(straight)  # as text, since an overflowed step's norm is NaN
    assert 0 < scalars["optimizer_steps"] < 7, "some steps overflowed"
