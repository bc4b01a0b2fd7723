"""Runs that cannot go on end with the right exit code, one clear message and no traceback; none hangs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli_runs import run, steps_of

from megalm.checkpoint.store import complete_checkpoints

pytestmark = pytest.mark.slow

TWO_RANKS = ("parallel.tp=1", "parallel.pp=2", "train.steps=20", "checkpoint.every=2")


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tiny_dataset: Path, tmp_path: Path) -> None:
    common = [*TWO_RANKS, f"data.path={tiny_dataset}", f"run.dir={tmp_path}", "run.name=hot"]
    code, output = run([*common, "optim.lr=1e18", "optim.schedule=constant", "optim.clip_grad_norm=0"])
    assert code == 4, output
    assert "training diverged" in output
    assert output.count("optim.lr") == 1, "said once, not by every rank"
    assert "Traceback" not in output
    saved = [info.step for info in complete_checkpoints(tmp_path / "hot" / "checkpoints")]
    assert all(step < steps_of(tmp_path / "hot")[-1] for step in saved)


def test_a_corrupt_chunk_ends_the_run_and_is_named(tiny_dataset: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_dataset, data)
    shard = data / "train" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    for offset in range(700, len(content) - 2048, 1536):  # somewhere in every chunk
        content[offset] ^= 1
    shard.write_bytes(content)
    code, output = run([*TWO_RANKS, f"data.path={data}", f"run.dir={tmp_path}", "run.name=corrupt"])
    assert code == 3, output
    assert "shard-000000.tar chunk" in output
    assert "checksum differs" in output
    assert "Traceback" not in output
