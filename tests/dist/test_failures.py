"""Runs that cannot go on end with the right exit code, one clear message and no traceback; none hangs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from cli_runs import run, steps_of

from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.store import complete_checkpoints
from megalm.launch.device import slow_format
from megalm.runs.record import read_metrics

pytestmark = pytest.mark.slow

TWO_RANKS = ("parallel.tp=1", "parallel.pp=2", "train.steps=20", "checkpoint.every=2")


def test_divergence_stops_the_run_and_keeps_the_last_good_checkpoint(tiny_dataset: Path, tmp_path: Path) -> None:
    common = [*TWO_RANKS, f"data.path={tiny_dataset}", f"run.dir={tmp_path}", "run.name=hot"]
    common += ["checkpoint.every=1", "checkpoint.keep_last=0"]  # the last good step's is being written at that moment
    code, output = run([*common, "optim.lr=1e18", "optim.schedule=constant", "optim.clip_grad_norm=0"])
    assert code == 4, output
    assert "training diverged" in output
    assert output.count("optim.lr") == 1, "said once, not by every rank"
    assert "Traceback" not in output
    saved = [info.step for info in complete_checkpoints(tmp_path / "hot" / "checkpoints")]
    assert saved == steps_of(tmp_path / "hot")[:-1]
    assert saved, "one step was good"


def test_a_corrupt_chunk_ends_the_run_and_is_named(tiny_dataset: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_dataset, data)
    shard = data / "train" / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    for offset in range(700, len(content) - 2048, 1536):  # somewhere in every chunk
        content[offset] ^= 1
    shard.write_bytes(content)
    changes = [f"data.path={data}", f"run.dir={tmp_path}", "run.name=corrupt", "engine.dtype=bf16"]
    code, output = run([*TWO_RANKS, *changes])
    assert code == 3, output
    assert output.count("emulates 16-bit products") == (slow_format("cpu", "bf16") is not None), "once, where it is so"
    assert "shard-000000.tar chunk" in output
    assert "checksum differs" in output
    assert "Traceback" not in output


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_full_disk_stops_training_only_where_it_is_to(policy: str, tiny_dataset: Path, tmp_path: Path) -> None:
    """There is room for one checkpoint, not for the two that exist until the older one is deleted.

    Metrics and logs are on the same disk: they wait, or are left out of the log, and end nothing.
    """
    disk = tmp_path / "full"
    checkpoints = disk / "checkpoints"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", disk], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        code, output = run(
            [
                f"data.path={tiny_dataset}",
                f"run.dir={tmp_path}",
                "run.name=full",
                "train.steps=12",
                "checkpoint.every=3",
                "checkpoint.keep_last=1",
                f"checkpoint.on_failure={policy}",
            ]
        )
        assert code == 3, output
        assert "Traceback" not in output
        assert [info.step for info in complete_checkpoints(checkpoints)] == [3], "the one before is untouched"
        assert list(CheckpointReader(checkpoints / "step-00000003").find_corruption()) == []
        assert [path.name for path in checkpoints.iterdir()] == ["step-00000003"], "nothing is left of the others"
        rows = read_metrics(tmp_path / "full" / "metrics.jsonl")
        failed = [row["step"] for row in rows if "checkpoint_error" in row]
        if policy == "continue":
            assert steps_of(tmp_path / "full") == list(range(1, 13))
            assert failed == [6, 9]
            assert output.count("training goes on (checkpoint.on_failure=continue)") == 2
            assert re.search("step 12 was not saved: .*No space left on device", output), "which the run is for"
        else:
            assert steps_of(tmp_path / "full")[-1] < 12
            assert failed == []
            assert re.search("step 6 was not saved: .*No space left on device", output)
    finally:
        subprocess.run(["umount", disk], check=True)
