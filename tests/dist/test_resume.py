"""Resume: killed at any moment, interrupted or moved to another layout, a run continues as if nothing had happened."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from cli_runs import losses_of, run, start, steps_of, wait_for_step

from megalm.checkpoint.manifest import read_manifest
from megalm.runs.record import checkpoint_rows, read_metrics

STEPS = 16
LAYOUT = (
    "parallel.tp=2",
    "parallel.pp=2",
    f"train.steps={STEPS}",
    "checkpoint.every=5",
    "checkpoint.keep_last=0",
    "model.dropout=0.1",  # whose masks a resumed run draws as if nothing had happened
    "model.attention_dropout=0.1",
)
ONE_RANK = ("parallel.tp=1", "parallel.pp=1")
"""Enough where the layout is not what is tested; a checkpoint has none."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory, tiny_dataset: Path) -> list[str]:
    return [*LAYOUT, f"data.path={tiny_dataset}", f"run.dir={tmp_path_factory.mktemp('runs')}"]


@pytest.fixture(scope="module")
def uninterrupted(common: list[str]) -> list[tuple[float, float]]:
    code, output = run([*common, "run.name=straight"])
    assert code == 0, output
    return losses_of(_run_dir(common, "straight"))


def _run_dir(common: list[str], name: str) -> Path:
    return Path(common[-1].removeprefix("run.dir=")) / name


@pytest.fixture(scope="module")
def killed(common: list[str], uninterrupted) -> Path:
    """A run of which every process was killed without warning, some steps after its first checkpoint."""
    run_dir = _run_dir(common, "killed")
    with start([*common, "run.name=killed"]) as process:
        wait_for_step(run_dir, 7, process)
        os.killpg(process.pid, signal.SIGKILL)
        _kill_ranks_of(run_dir)
        process.communicate()
    assert 7 <= steps_of(run_dir)[-1] < STEPS
    return run_dir


def _kill_ranks_of(run_dir: Path) -> None:
    """Ranks may live in sessions of their own; they die with their launcher, but not at the same instant."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        before = steps_of(run_dir)
        time.sleep(0.3)
        if steps_of(run_dir) == before:
            return
    raise AssertionError("ranks outlive their launcher")


def test_killed_and_resumed_equals_uninterrupted_to_the_last_bit(common, uninterrupted, killed: Path) -> None:
    code, output = run([*common, "run.name=killed"])
    assert code == 0, output
    assert "step-000000" in output, "it says what it resumed from"
    assert steps_of(killed) == list(range(1, STEPS + 1)), "each step once: the record was cut back to the checkpoint"
    assert losses_of(killed) == uninterrupted


def test_a_complete_run_says_so_and_trains_no_further(common, uninterrupted) -> None:
    code, output = run([*common, "run.name=straight"])
    assert code == 0
    assert "complete" in output and "train.steps=" in output
    assert steps_of(_run_dir(common, "straight")) == list(range(1, STEPS + 1))


def test_an_interrupt_saves_and_resumes(common, uninterrupted) -> None:
    run_dir = _run_dir(common, "interrupted")
    with start([*common, "run.name=interrupted", "checkpoint.every=0"]) as process:
        wait_for_step(run_dir, 3, process)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert 3 <= steps_of(run_dir)[-1] < STEPS
    code, output = run([*common, "run.name=interrupted", "checkpoint.every=0"])
    assert code == 0, output
    assert losses_of(run_dir) == uninterrupted


def test_another_layout_continues_the_same_curve(common, uninterrupted, tmp_path) -> None:
    """With the data in their order; ``test_resharding.py`` has many layouts."""
    checkpoint = _run_dir(common, "straight") / "checkpoints" / "step-00000010"
    overrides = [*common, f"run.dir={tmp_path}", "run.name=moved", f"checkpoint.resume={checkpoint}"]
    overrides += [*ONE_RANK, "launch.ranks=2", "engine.zero_stage=3"]
    code, output = run(overrides)
    assert code == 0, output
    assert steps_of(tmp_path / "moved") == list(range(11, STEPS + 1))
    for (loss, norm), (want_loss, want_norm) in zip(losses_of(tmp_path / "moved"), uninterrupted[10:], strict=True):
        assert loss == pytest.approx(want_loss, abs=1e-5)
        assert norm == pytest.approx(want_norm, abs=1e-4)


def test_init_from_takes_weights_alone(common, uninterrupted, tmp_path) -> None:
    source = _run_dir(common, "straight")
    code, output = run([*common, *ONE_RANK, f"run.dir={tmp_path}", "run.name=fresh", f"checkpoint.init_from={source}"])
    assert code == 0, output
    rows = losses_of(tmp_path / "fresh")
    assert steps_of(tmp_path / "fresh") == list(range(1, STEPS + 1)), "its own steps, from one"
    assert rows[0][0] < uninterrupted[0][0] - 0.1, "it starts from what the source had learnt"


def test_finetuning_begins_a_phase_and_remembers_where_its_weights_are_from(common, uninterrupted, tmp_path) -> None:
    source = _run_dir(common, "straight")
    overrides = [*common, *ONE_RANK, f"run.dir={tmp_path}", "run.name=tuned", "train.steps=2"]
    code, output = run([*overrides, f"checkpoint.finetune_from={source}"])
    assert code == 3
    assert "data.phase=1 begins the phase to fine-tune in" in output
    code, output = run([*overrides, f"checkpoint.finetune_from={source}", "data.phase=1", "model.dropout=0.2"])
    assert code == 0, output
    assert "model.dropout=0.2: " in output and "was trained with 0.1" in output
    saved = read_manifest(tmp_path / "tuned" / "checkpoints" / "step-00000002")
    parent = saved.training["parent"]
    assert (parent["mode"], parent["step"], parent["data"]["consumed_samples"]) == ("finetune", STEPS, 4 * STEPS)
    assert f"loaded   finetune, step {STEPS}: " in output and f"hash {parent['parameters']}; " in output
    assert [phase["number"] for phase in saved.data["phases"]] == [1]
    assert losses_of(tmp_path / "tuned")[0][0] < uninterrupted[0][0] - 0.1


def test_the_record_has_every_checkpoint_and_its_stall(common, uninterrupted) -> None:
    rows = read_metrics(_run_dir(common, "straight") / "metrics.jsonl")
    saves = checkpoint_rows(rows)
    assert [row["step"] for row in saves] == [5, 10, 15, STEPS]
    assert all(row["gigabytes"] > 0 and row["write_seconds"] > 0 and row["stall_seconds"] >= 0 for row in saves)


def test_a_changed_model_or_seed_is_refused(common, uninterrupted) -> None:
    code, output = run([*common, "run.name=straight", "model.num_layers=4", "train.steps=99"])
    assert code == 3, output
    assert "model.num_layers=4" in output
    assert "was trained with 3" in output
    code, output = run([*common, *ONE_RANK, "run.name=straight", "run.seed=5", "train.steps=99"])
    assert code == 3, output
    assert output.count("run.seed=5: the checkpoint was trained with 1234") == 1
    assert "Traceback" not in output
