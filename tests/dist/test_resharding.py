"""Any layout to any other: the next six steps are those of a run that was never interrupted.

Each checkpoint is written while its run trains on, so what was saved is the state of its moment, whatever came after.
The reference is one plain process (``train_plainly``). Moments and step count are in the curve: without them Adam's
next steps would be others by far (the last test shows how far).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

import pytest
from harness import run_ranks_on_each
from parity import CLIP, MODEL, Layout
from resharding import SAVED_AT, STEPS, Curve, Task, config_of, run_task

from megalm.runs.start import StartMode
from megalm.verify.parity import Trace, train_plainly
from tests.families import bert_of

EIGHT = replace(MODEL, num_layers=8)
"""Layers for eight stages."""
GQA = replace(
    EIGHT, num_layers=5, position="rotary", norm="rmsnorm", activation="swiglu", bias=False, num_kv_heads=2,
    tie_embeddings=False, ffn_hidden_size=48, qk_norm=True,
)  # fmt: skip
"""At tp4 two ranks share a key/value head."""
BERT = bert_of(replace(MODEL, num_layers=2))


def layout(**fields) -> Layout:
    return Layout(**{"model": EIGHT, **fields})


SINGLE = layout()
TP2_PP2_DP2 = layout(tp=2, pp=2, dp=2)
TP4_DP2 = layout(tp=4, dp=2, zero_stage=2)
PP4_V2 = layout(pp=4, v=2, schedule="interleaved_1f1b")
SOURCES: dict[str, Layout] = {
    "single": SINGLE,
    "pp4v2": PP4_V2,
    "zero3": layout(dp=4, zero_stage=3),
    "cp2": layout(dp=2, cp=2, cp_attention="ring", zero_stage=0),
    "gqa-tp4": Layout(tp=4, model=GQA),
    "bert": Layout(tp=2, pp=2, model=BERT),
    "fp16": layout(dp=4, dtype="fp16", zero_stage=2),
    "bf16": layout(tp=2, dp=2, dtype="bf16", zero_stage=2),
    "tp2pp2dp2": TP2_PP2_DP2,
}
PAIRS: list[tuple[str, Layout]] = [
    ("tp2pp2dp2", TP2_PP2_DP2),
    ("tp2pp2dp2", PP4_V2),
    ("tp2pp2dp2", SINGLE),
    ("tp2pp2dp2", TP4_DP2),
    ("tp2pp2dp2", layout(dp=2, cp=2)),
    ("tp2pp2dp2", layout(pp=4, schedule="zb_h1", stage_layers=(1, 3, 3, 1))),
    ("tp2pp2dp2", layout(tp=2, dp=2, dtype="bf16", offload=True)),
    ("pp4v2", layout(tp=2, dp=2, zero_stage=0)),
    ("zero3", layout(tp=2, pp=2)),
    ("cp2", layout(tp=2, sp=True, pp=2)),
    ("single", layout(tp=2, sp=True, pp=2, v=2, schedule="interleaved_1f1b")),
    ("gqa-tp4", Layout(model=GQA)),
    ("gqa-tp4", Layout(pp=2, dp=2, model=GQA)),
    ("bert", Layout(dp=4, model=BERT)),
    ("fp16", layout(tp=2, pp=2, dtype="fp16")),
    ("bf16", SINGLE),
]
FRESH = [("tp2pp2dp2", SINGLE), ("tp2pp2dp2", layout(tp=2, pp=2)), ("single", SINGLE)]
"""New runs with a checkpoint's weights alone."""

GROWN = replace(EIGHT, vocab_size=67)
"""Six words more than the sources know."""
EXTENDED = [
    ("tp2pp2dp2", layout(model=GROWN)),
    ("tp2pp2dp2", layout(tp=2, pp=2, model=GROWN)),
    ("tp2pp2dp2", layout(dp=4, zero_stage=3, model=GROWN)),
    ("bert", Layout(model=replace(BERT, vocab_size=67))),
    ("bert", Layout(tp=4, model=replace(BERT, vocab_size=67))),
]
"""New runs with a checkpoint's weights and more words; the first of each source in one process."""


@dataclass(frozen=True)
class Results:
    """Curves of every source while it was saved, of every pair, and of new runs with its weights or more words."""

    sources: dict[str, Curve]
    pairs: dict[tuple[str, Layout], Curve]
    fresh: dict[tuple[str, Layout], Curve]
    extended: dict[tuple[str, Layout], Curve]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Four spawns, each for all that one world can do by then."""
    folder = tmp_path_factory.mktemp("resharding")
    # A source goes on far enough to be saved beside a step; those whose own continuation is compared, to the end.
    to_the_end = {"tp2pp2dp2"}
    tasks = [
        (
            ("source", name, where),
            Task(
                where,
                save_as=name,
                steps=STEPS if name in to_the_end else SAVED_AT + 1,
                learning_rate=where.learning_rate,
            ),
        )
        for name, where in SOURCES.items()
    ]
    tasks += [
        (("pair", name, where), Task(where, source=name, learning_rate=SOURCES[name].learning_rate))
        for name, where in PAIRS
    ]
    tasks += [
        (
            ("fresh", name, where),
            Task(where, source=name, first=SAVED_AT, steps=SAVED_AT + 2, mode=StartMode.INIT_FROM),
        )
        for name, where in FRESH
    ]
    tasks += [
        (
            ("extended", name, where),
            Task(where, source=name, first=0, steps=3, mode=StartMode.INIT_FROM, extends_vocab=True),
        )
        for name, where in EXTENDED
    ]
    done: dict[tuple[str, str, Layout], Curve] = {}
    for world in (8, 1, 4, 1):
        written = {name for kind, name, _ in done if kind == "source"}
        ready = [
            (key, task)
            for key, task in tasks
            if key not in done
            and task.layout.topology.world_size == world
            and (task.source is None or task.source in written or SOURCES[task.source].topology.world_size == world)
        ]
        items = [(folder, task) for _, task in ready]
        curves = run_ranks_on_each(world, run_task, items, timeout_seconds=240)
        done |= {key: ranks[0] for (key, _), ranks in zip(ready, curves, strict=True)}
    assert len(done) == len(tasks)
    sources, *others = (
        {key[1:]: curve for key, curve in done.items() if key[0] == kind}
        for kind in ("source", "pair", "fresh", "extended")
    )
    return Results({name: curve for (name, _), curve in sources.items()}, *others)


@cache
def uninterrupted(reference: Layout) -> Trace:
    return train_plainly(config_of(reference, reference.learning_rate))


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=[f"{name}▶{target}" for name, target in PAIRS])
def test_the_next_steps_are_those_of_a_run_that_never_stopped(source: str, target: Layout, results: Results) -> None:
    curve = results.pairs[source, target]
    want = uninterrupted(SOURCES[source].reference)
    exact = {SOURCES[source].dtype, target.dtype} == {"fp32"}
    tolerance = 1e-5 if exact else 5e-3
    assert min(want.grad_norms) > CLIP, "clipping is active in every step"
    assert curve.losses == pytest.approx(want.losses[SAVED_AT:], abs=tolerance)
    assert curve.grad_norms == pytest.approx(want.grad_norms[SAVED_AT:], rel=1e-4 if exact else 5e-2)


def test_on_the_same_layout_not_a_bit_differs(results: Results) -> None:
    resumed, straight = results.pairs["tp2pp2dp2", TP2_PP2_DP2], results.sources["tp2pp2dp2"]
    assert resumed.losses == straight.losses[SAVED_AT:]
    assert resumed.grad_norms == straight.grad_norms[SAVED_AT:]


def test_every_layout_finds_the_same_parameters(results: Results) -> None:
    """The line that says what was loaded names the step and a hash, which is the checkpoint's wherever it is loaded."""
    hashes: dict[str, set[str]] = {}
    for (source, _), curve in [*results.pairs.items(), *results.fresh.items()]:
        mode = re.fullmatch(r"(resume|init_from), step 3: .*; hash ([0-9a-f]{16}); .*/step-00000003", curve.words)
        assert mode, curve.words
        hashes.setdefault(source, set()).add(mode.group(2))
    assert all(len(found) == 1 for found in hashes.values()), hashes
    assert len({next(iter(found)) for found in hashes.values()}) > 4, "different runs have different parameters"


@pytest.mark.parametrize(("source", "target"), FRESH, ids=[f"{name}▶{target}" for name, target in FRESH])
def test_weights_alone_give_the_loss_that_the_source_has_on_that_batch(source, target, results: Results) -> None:
    """On any layout. The step after it shows what the comparisons above would see, had the moments been lost."""
    first, second = results.fresh[source, target].losses
    want = uninterrupted(SOURCES[source].reference).losses
    assert first == pytest.approx(want[SAVED_AT], abs=1e-5)
    assert second != pytest.approx(want[SAVED_AT + 1], abs=1e-4)


@pytest.mark.parametrize(("source", "target"), EXTENDED, ids=[f"{name}▶{target}" for name, target in EXTENDED])
def test_a_vocabulary_grows_alike_on_every_layout(source: str, target: Layout, results: Results) -> None:
    curve = results.extended[source, target]
    want = next(curve for (name, _), curve in results.extended.items() if name == source)
    assert "rows added to the vocabulary; hash " in curve.words
    assert curve.words == want.words, "the same hash of the same parameters"
    assert curve.losses == pytest.approx(want.losses, abs=1e-5)
    assert curve.grad_norms == pytest.approx(want.grad_norms, rel=1e-4)
