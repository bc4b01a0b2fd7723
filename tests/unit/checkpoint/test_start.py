"""What a run starts from: every combination of resume, init_from and what earlier lives left behind."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from layouts import Layout, pieces_of

from megalm.checkpoint.manifest import COMPLETE_FILE
from megalm.checkpoint.start import StartMode, resolve_start, run_folder
from megalm.checkpoint.store import CHECKPOINTS_FOLDER, TEMPORARY_PREFIX
from megalm.checkpoint.writer import Header, save_checkpoint
from megalm.config.schema import Config, Data, Model, Optim, Run, Train
from megalm.errors import CheckpointError


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(
        run=Run(name="try1", dir=str(tmp_path)),
        model=Model(num_layers=2, hidden_size=64, num_heads=4, sequence_length=32),
        data=Data(path=("data",)),
        optim=Optim(lr=1e-3),
        train=Train(steps=4, micro_batch_size=1, global_batch_size=2),
    )


def _save(config: Config, step: int) -> Path:
    header = Header(step, asdict(config), {"tp": 1}, {}, {"step": step})
    folder = run_folder(config) / CHECKPOINTS_FOLDER
    pieces = pieces_of(Layout(), 0, 0)
    return save_checkpoint(folder, header, pieces, rank=0, world_size=1, agree=lambda error: error)


def _with(config: Config, **checkpoint: str | None) -> Config:
    return replace(config, checkpoint=replace(config.checkpoint, **checkpoint))


def test_a_new_run_starts_fresh_without_a_word(config: Config) -> None:
    start = resolve_start(config, run_folder(config))
    assert (start.mode, start.path, start.step, start.notes) == (StartMode.FRESH, None, 0, ())


def test_auto_resumes_the_newest_complete_one_and_names_the_torn(config: Config) -> None:
    older, newest = _save(config, 2), _save(config, 3)
    (newest / COMPLETE_FILE).unlink()
    start = resolve_start(config, run_folder(config))
    assert (start.mode, start.path, start.step) == (StartMode.RESUME, older, 2)
    assert start.notes == (f"ignored {newest}: an interrupted save",)


def test_a_run_cut_off_before_its_first_checkpoint_starts_over_and_says_so(config: Config) -> None:
    run_dir = run_folder(config)
    (run_dir / CHECKPOINTS_FOLDER / f"{TEMPORARY_PREFIX}step-00000002").mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"ste')
    start = resolve_start(config, run_dir)
    assert start.mode is StartMode.FRESH
    assert len(start.notes) == 1
    assert "cut off at step 2, before its first checkpoint" in start.notes[0]


def test_only_damaged_checkpoints_are_never_trained_over(config: Config) -> None:
    (_save(config, 3) / COMPLETE_FILE).unlink()
    with pytest.raises(CheckpointError, match="not complete and there is no other"):
        resolve_start(config, run_folder(config))


def test_never_refuses_a_run_that_has_a_checkpoint(config: Config) -> None:
    _save(config, 3)
    with pytest.raises(CheckpointError, match=r"checkpoint\.resume=never: run try1 has a checkpoint of step 3"):
        resolve_start(_with(config, resume="never"), run_folder(config))


def test_a_given_path_must_load(config: Config, tmp_path: Path) -> None:
    older, _ = _save(config, 2), _save(config, 3)
    assert resolve_start(_with(config, resume=str(older)), run_folder(config)).step == 2
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        resolve_start(_with(config, resume=str(tmp_path / "typo")), run_folder(config))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        fresh = replace(config, run=replace(config.run, name="try2"))
        resolve_start(_with(fresh, init_from=str(tmp_path / "typo")), run_folder(fresh))


def test_init_from_is_for_the_fresh_start_only_so_that_a_requeued_job_continues(config: Config) -> None:
    source = _save(config, 3)
    mine = _with(replace(config, run=replace(config.run, name="try2")), init_from=str(source))
    start = resolve_start(mine, run_folder(mine))
    assert (start.mode, start.path, start.step) == (StartMode.INIT_FROM, source, 0)
    own = _save(mine, 1)
    start = resolve_start(mine, run_folder(mine))
    assert (start.mode, start.path, start.step) == (StartMode.RESUME, own, 1)


def test_a_changed_model_is_refused_field_by_field(config: Config) -> None:
    _save(config, 3)
    changed = replace(config, model=replace(config.model, hidden_size=128, norm="rmsnorm"))
    with pytest.raises(CheckpointError) as error:
        resolve_start(changed, run_folder(config))
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert "model.hidden_size=128" in lines[0]
    assert "trained with 64" in lines[0]
    assert "model.norm=rmsnorm" in lines[1]


def test_the_launcher_asks_without_torch() -> None:
    program = "import sys, megalm.checkpoint.start; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
