"""Steps in which no token, or none of a replica's, carries loss: the loss is 0, and later steps equal one process's."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from cli_runs import run
from harness import run_ranks_on_each
from parity import MODEL, Layout, train_on_ranks

from megalm.data.shards.write import ShardWriter
from megalm.data.stream.batch import Batch
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.runs.record import read_metrics, step_rows, validation_rows
from megalm.verify import parity
from megalm.verify.differences import differences
from megalm.verify.parity import Trace, synthetic_batch, train_plainly
from tests.families import bert_of

LAYOUTS = [
    replace(layout, batch=16)
    for layout in (
        Layout(dp=2, zero_stage=0),
        Layout(dp=2, zero_stage=2),
        Layout(dp=2, zero_stage=3),
        Layout(dp=2, dtype="fp16"),
        Layout(tp=2, sp=True, z_loss=1e-2),
        Layout(pp=2, schedule="zb_h1"),
        Layout(cp=2, dtype="bf16"),
        Layout(tp=2, model=bert_of(MODEL), name="bert"),
    )
]
WITHOUT = {1, 4}
"""Steps without any loss token; in step 2 only every other row has some, and so only one of two replicas."""


def sparse_batch(config, step: int, make_batch) -> Batch:
    batch = synthetic_batch(config, step, make_batch)
    mask = batch.loss_mask.copy()
    if step in WITHOUT:
        mask[:] = 0.0
    elif step == 2:
        mask[::2] = 0.0
    elif step == 3:
        mask[:6] = 0.0  # whole micro-batches
    return replace(batch, loss_mask=mask)


def train_sparsely(layout: Layout) -> Trace:
    parity.synthetic_batch = sparse_batch
    return train_on_ranks(layout)


@cache
def traces() -> list[list[Trace]]:
    return run_ranks_on_each(2, train_sparsely, LAYOUTS, timeout_seconds=200)


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=map(str, LAYOUTS))
def test_a_step_without_a_loss_token_is_one_of_loss_0(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = LAYOUTS[index]
    monkeypatch.setattr(parity, "synthetic_batch", sparse_batch)
    want = train_plainly(layout.reference.config())
    found = differences(want, traces()[index])
    tolerance = 1e-5 if layout.dtype == "fp32" else 5e-3
    for trace in traces()[index]:
        assert [trace.losses[step] for step in sorted(WITHOUT)] == [0.0, 0.0]
        assert [trace.grad_norms[step] for step in sorted(WITHOUT)] == [0.0, 0.0]
    assert max(found.loss, found.grad_norm) < tolerance
    assert found.copies == 0.0
    if layout.dtype == "fp32":
        assert found.weights < 1e-5, "moments decay in such a step, and weights move on them, as in one process"


def write_split(folder: Path, tokenizer: Tokenizer, rows: int, learnt: set[int]) -> None:
    """Rows of 32 tokens, of which only those in ``learnt`` carry loss."""
    writer = ShardWriter(
        folder,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        chunk_tokens=32,
        chunks_per_shard=8,
        masked=True,
    )
    tokens = np.random.default_rng(0).integers(0, tokenizer.vocab_size, rows * 32 + 1)
    mask = np.zeros(tokens.size, dtype=np.uint8)
    for row in learnt:
        mask[row * 32 + 5 : row * 32 + 20] = 1
    writer.add(tokens, [tokens.size], ["it"], mask)
    writer.close()


@pytest.mark.slow
def test_a_run_over_rows_with_nothing_to_learn_ends_well_and_resumes(tiny_dataset, tmp_path) -> None:
    tokenizer = Tokenizer.load(tiny_dataset / "tokenizer.json")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokenizer.json").write_bytes((tiny_dataset / "tokenizer.json").read_bytes())
    write_split(tmp_path / "data" / "train", tokenizer, 12, {1, 4, 7})
    write_split(tmp_path / "data" / "val", tokenizer, 4, set())
    overrides = [
        "parallel=single", "launch.ranks=1", "engine.zero_stage=3", f"data.path={tmp_path}/data", f"run.dir={tmp_path}",
        "run.name=r", "train.global_batch_size=1", "train.micro_batch_size=1", "train.validate_every=2",
        "checkpoint.every=3", "report.plot=true",
    ]  # fmt: skip
    for steps in (6, 12):
        code, output = run([*overrides, f"train.steps={steps}"])
        assert code == 0, output
    rows = step_rows(read_metrics(tmp_path / "r" / "metrics.jsonl"))
    assert sorted(row["loss_tokens"] for row in rows) == [0] * 9 + [15] * 3
    assert all((row["loss"] == 0.0) == (row["loss_tokens"] == 0) for row in rows)
    validations = validation_rows(read_metrics(tmp_path / "r" / "metrics.jsonl"))
    assert validations
    for row in validations:
        assert (row["val_loss"], row["val_perplexity"], row["val_accuracy"], row["val_tokens"]) == (None, None, None, 0)
    assert "no validation loss: no token of the validation data carries loss" in output
    assert "warning" not in output
