"""What a checkpoint says a run has done, and how its schedule, its batch and its data go on from there."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from megalm.checkpoint.manifest import Manifest, read_manifest
from megalm.config.parse import config_to_dict
from megalm.config.schema import Config, Data, Model, Optim, Run, Train
from megalm.data.shards.dataset import DatasetInfo
from megalm.data.stream.phases import DataState, Phase
from megalm.plan.preflight import _epoch_violations
from megalm.runs.changes import changes_since
from megalm.runs.history import (
    SCHEDULE,
    extension_hint,
    history_of,
    length_notes,
    samples_at_end,
    schedule_for,
    schedule_lines,
    schedule_to_dict,
    schedule_violations,
    spent_fields,
)

GOLDEN = Path(__file__).parents[2] / "golden"
CONFIG = Config(
    run=Run(name="try1"),
    model=Model(num_layers=2, hidden_size=64, num_heads=4, sequence_length=32),
    data=Data(path=("books", "wiki"), weights=(1.0, 3.0)),
    optim=Optim(lr=1e-3),
    train=Train(steps=10, micro_batch_size=1, global_batch_size=8),
)
TOKENS = 8 * 32


def manifest(config: Config, step: int, *, course: bool = True, state: DataState | None = None) -> Manifest:
    """What a run that followed a config from its beginning saves."""
    samples = step * config.train.global_batch_size
    training = {
        "progress": {"step": step, "samples": samples, "tokens": samples * config.model.sequence_length},
        **({SCHEDULE: schedule_to_dict(schedule_for(config, None))} if course else {}),
    }
    data = {} if state is None else state.to_dict()
    return Manifest("0", step, config_to_dict(config), {"tp": 1, "dp": 2}, data, training, {})


def with_(config: Config, **changes: dict) -> Config:
    return replace(config, **{name: replace(getattr(config, name), **fields) for name, fields in changes.items()})


@pytest.mark.parametrize("version", [2, 3])
def test_a_checkpoint_without_a_course_follows_what_its_own_config_says(version: int) -> None:
    saved = read_manifest(GOLDEN / f"checkpoint_v{version}" / "step-00000003")
    assert SCHEDULE not in saved.training
    history = history_of(saved)
    assert (history.step, history.samples, history.tokens, history.planned_steps) == (3, 12, 384, 3)
    assert history.was_complete and history.schedule.total_tokens == 384
    assert DataState.from_dict(saved.data).consumed_tokens == 384


@pytest.mark.parametrize("course", [True, False])
def test_the_horizon_is_what_is_done_and_what_is_left_at_todays_batch(course: bool) -> None:
    history = history_of(manifest(CONFIG, 5, course=course))
    half = with_(CONFIG, train={"global_batch_size": 4})
    assert schedule_for(half, history).total_tokens == 5 * TOKENS + 5 * TOKENS // 2
    assert samples_at_end(half, history) == 5 * 8 + 5 * 4
    assert schedule_for(half, history).at(5 * TOKENS, TOKENS // 2) == history.schedule.at(5 * TOKENS, TOKENS)
    long = with_(CONFIG, model={"sequence_length": 64})
    assert schedule_for(long, history).total_tokens == 5 * TOKENS + 5 * 2 * TOKENS


def test_a_ramp_is_where_the_tokens_have_brought_it() -> None:
    ramp = with_(CONFIG, train={"batch_ramp_start": 2, "batch_ramp_tokens": 10 * TOKENS, "global_batch_size": 8})
    long = with_(ramp, model={"sequence_length": 64})
    history = history_of(manifest(CONFIG, 5))
    # Half of the ramp's tokens are seen: 2, 2 and then 4 of three increments, for as long as 10/3 of them take.
    assert [samples_at_end(with_(c, train={"steps": 6}), history) - 40 for c in (ramp, long)] == [4, 4]
    assert samples_at_end(with_(long, train={"steps": 9}), history) - 40 == 4 + 4 + 6 + 6


def test_every_field_that_matters_is_told_before_and_after() -> None:
    now = with_(
        CONFIG,
        optim={"lr": 5e-4, "decay_tokens": 99},
        engine={"dtype": "fp32"},
        train={"steps": 20, "global_batch_size": 4},
        model={"dropout": 0.1},
        run={"seed": 5, "name": "moved"},
        logging={"every": 9},
        parallel={"tp": 2},
    )
    assert [str(change) for change in changes_since(manifest(CONFIG, 5), now, 2)] == [
        "run.seed: 1234 → 5",
        "model.dropout: 0.0 → 0.1",
        "optim.lr: 0.001 → 0.0005",
        "optim.decay_tokens: null → 99",
        "train.steps: 10 → 20",
        "train.global_batch_size: 8 → 4",
        "parallel.tp: 1 → 2",
        "engine.dtype: bf16 → fp32",
        "dp: 2 → 1",
    ]
    assert changes_since(manifest(CONFIG, 5), CONFIG, 2) == []
    old = manifest(CONFIG, 5)
    del old.config["optim"]["rewarm_tokens"]
    assert changes_since(old, CONFIG, 2) == [], "what a version did not know had its default"


def test_the_lines_say_what_becomes_of_the_rate() -> None:
    midway, finished = history_of(manifest(CONFIG, 5)), history_of(manifest(CONFIG, 10))
    longer = with_(CONFIG, train={"steps": 20})
    assert schedule_lines(CONFIG, midway) == []
    (line,) = schedule_lines(longer, midway)
    assert line == (
        "learning rate: goes on from 0.00055 at step 6, what is left of its decay reaches 0.0001 at 5,120 tokens"
    )
    (line,) = schedule_lines(longer, finished)
    assert "the decay ended at 2,560 tokens, so it stays at its floor, 0.0001" in line
    assert "optim.rewarm_tokens=25 rises to optim.lr=0.001 again" in line
    (line,) = schedule_lines(with_(longer, optim={"decay_tokens": 5120}), finished)
    assert line.startswith("learning rate: 0.0001 → 0.00055 at step 11, on the new schedule of optim.decay_tokens=5120")
    (line,) = schedule_lines(with_(longer, optim={"rewarm_tokens": 512}), finished)
    assert line.startswith("learning rate: rises from 0.0001 to 0.001 over 512 tokens (optim.rewarm_tokens)")
    (line,) = schedule_lines(with_(CONFIG, optim={"lr": 5e-4}), midway)
    assert line.startswith("learning rate: 0.00055 → 0.000275 at step 6")


def test_a_finished_run_whose_rate_is_0_is_not_extended_without_a_word() -> None:
    to_zero = with_(CONFIG, optim={"min_lr_ratio": 0.0})
    finished = history_of(manifest(to_zero, 10))
    longer = with_(to_zero, train={"steps": 20})
    (problem,) = schedule_violations(longer, finished)
    assert (
        problem.startswith("train.steps=20: the learning rate has fallen to 0") and "optim.rewarm_tokens=25" in problem
    )
    assert schedule_violations(with_(longer, optim={"rewarm_tokens": 100}), finished) == []
    assert schedule_violations(with_(longer, optim={"decay_tokens": 5120}), finished) == []
    assert schedule_violations(longer, history_of(manifest(to_zero, 9))) == []
    assert "optim.rewarm_tokens=N" in extension_hint(to_zero)


def test_a_rewarm_ends_before_the_decay() -> None:
    asked = with_(CONFIG, optim={"rewarm_tokens": 512, "decay_tokens": 3000}, train={"steps": 20})
    (problem,) = schedule_violations(asked, history_of(manifest(CONFIG, 10)))
    assert problem == (
        "optim.rewarm_tokens=512: from the 2,560 tokens done it ends at 3,072, not below optim.decay_tokens=3000, "
        "where the decay ends; optim.decay_tokens=null"
    )


def test_a_run_too_short_for_its_schedule_says_so() -> None:
    assert length_notes(CONFIG, None) == []
    (note,) = length_notes(with_(CONFIG, optim={"warmup_tokens": 5120}), None)
    assert note == (
        "optim.warmup_tokens=5120 is longer than the run, 2560 tokens: the learning rate ends at 0.0005 and never "
        "reaches optim.lr=0.001"
    )
    (note,) = length_notes(with_(CONFIG, optim={"decay_tokens": 5120}), None)
    assert note.endswith("the learning rate ends at 0.00055, not at its floor, 0.0001")
    (note,) = length_notes(with_(CONFIG, optim={"decay_tokens": 2000, "min_lr_ratio": 0.0}), None)
    assert note == "the learning rate is 0 from 2,000 tokens on: the last 560 learn nothing"
    (note,) = length_notes(with_(CONFIG, train={"batch_ramp_start": 4, "batch_ramp_tokens": 9999}), None)
    assert note.startswith("train.batch_ramp_tokens=9,999 is longer than the run's")


def test_changes_of_what_is_over_are_said_to_have_no_effect() -> None:
    warm = with_(CONFIG, optim={"warmup_tokens": 3 * TOKENS, "schedule": "wsd"})
    ramp = with_(warm, train={"batch_ramp_start": 4, "batch_ramp_tokens": 4 * TOKENS})
    assert list(spent_fields(ramp, history_of(manifest(warm, 2)))) == []
    assert list(spent_fields(ramp, history_of(manifest(warm, 3)))) == ["optim.warmup_tokens"]
    over = ["train.batch_ramp_start", "train.batch_ramp_increment", "train.batch_ramp_tokens"]
    assert list(spent_fields(ramp, history_of(manifest(warm, 4)))) == ["optim.warmup_tokens", *over]
    assert list(spent_fields(ramp, history_of(manifest(warm, 10))))[:2] == [
        "optim.warmup_tokens",
        "optim.cooldown_tokens",
    ]


def phase(number: int, start: int, length: int, contents: tuple[str, ...], quotas: list[int]) -> Phase:
    fingerprint = {f"data.path[{n}]": name for n, name in enumerate(contents)}
    return Phase(
        number, start, {**fingerprint, "data.weights": quotas, "model.sequence_length": length, "data.lanes": 2}
    )


def test_what_was_read_counts_by_corpus_over_phases_lengths_and_blends() -> None:
    state = DataState(
        1500,
        (
            phase(0, 0, 32, ("A", "B"), [16384, 49152]),
            phase(1, 1000, 64, ("B",), [65536]),
        ),
    )
    assert state.consumed_tokens == 1000 * 32 + 500 * 64
    assert state.epochs_of("A", lambda length: 10_000 // length) == Fraction(250, 312)
    assert state.epochs_of("B", lambda length: 10_000 // length) == Fraction(750, 312) + Fraction(500, 156)
    assert state.epochs_of("C", lambda length: 10_000 // length) == 0
    assert DataState.from_dict(state.to_dict()) == state


def dataset(name: str, tokens: int) -> DatasetInfo:
    return DatasetInfo(name, 100, 64, 0, tokens, 100, "t", "no marks", train_fingerprint=name)


def test_a_limit_of_epochs_counts_what_the_run_has_read_with_any_batch() -> None:
    """At batch 16 eight steps read 128 of 160 sequences; the batch of 8 that goes on has 32 left: four steps."""
    big = with_(CONFIG, train={"global_batch_size": 16}, data={"path": ("A",), "weights": ()})
    now = with_(big, train={"global_batch_size": 8, "steps": 12}, data={"max_epochs": (1.0,)})
    datasets = [dataset("A", 160 * 32 + 1)]
    saved = manifest(big, 8, state=DataState(128, (phase(0, 0, 32, ("A",), [65536]),)))
    history = history_of(saved)
    assert _epoch_violations(now, datasets, saved, history) == []
    (problem,) = _epoch_violations(with_(now, train={"steps": 13}), datasets, saved, history)
    assert problem.startswith("data.max_epochs: the run reads A 1.05 times, the limit is 1")
    assert problem.endswith("; train for fewer steps or raise the limit"), "one corpus has no weight to change"
    next_phase = with_(now, data={"phase": 1}, model={"sequence_length": 64}, train={"steps": 10})
    assert _epoch_violations(next_phase, datasets, saved, history) == []
    (problem,) = _epoch_violations(with_(next_phase, train={"steps": 11}), datasets, saved, history)
    assert problem.startswith("data.max_epochs: the run reads A 1.10 times (0.80 of them in earlier phases), the limit")
