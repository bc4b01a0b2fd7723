"""What a run starts from: every combination of resume, init_from and what earlier lives left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from layouts import Layout, pieces_of

from megalm.checkpoint.manifest import COMPLETE_FILE
from megalm.checkpoint.save import save_checkpoint
from megalm.checkpoint.store import (
    CHECKPOINTS_FOLDER,
    TEMPORARY_PREFIX,
    Retention,
    complete_checkpoints,
    prune,
    set_aside,
)
from megalm.checkpoint.writer import Header, PieceToWrite
from megalm.config.schema import Config, Data, Model, Optim, Run, Train
from megalm.errors import CheckpointError
from megalm.runs.start import RESUMED_FROM, StartMode, StartPoint, resolve_start, run_folder


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(
        run=Run(name="try1", dir=str(tmp_path)),
        model=Model(num_layers=2, hidden_size=64, num_heads=4, sequence_length=32),
        data=Data(path=("data",)),
        optim=Optim(lr=1e-3),
        train=Train(steps=4, micro_batch_size=1, global_batch_size=2),
    )


def _save(
    config: Config, step: int, *, data: dict | None = None, training: dict | None = None, unknown: tuple[str, ...] = ()
) -> Path:
    """A checkpoint; ``unknown`` are fields of the model that its megalm had not."""
    values = asdict(config)
    values["model"] = {name: value for name, value in values["model"].items() if name not in unknown}
    header = Header(step, values, {"tp": 1}, data or {}, training or {"progress": {"step": step}})
    folder = run_folder(config) / CHECKPOINTS_FOLDER
    pieces = [PieceToWrite.of(piece) for piece in pieces_of(Layout(), 0, 0)]
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
    torn, lost = start.notes
    assert torn.startswith("ignored ") and torn.endswith("step-00000002: an interrupted save")
    assert "cut off at step 2, before its first checkpoint" in lost


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


def test_a_requeued_job_does_not_go_back_to_the_named_checkpoint_again(config: Config, tmp_path: Path) -> None:
    named = _save(replace(config, run=replace(config.run, name="other")), 2)
    back = _with(config, resume=str(named))
    start = resolve_start(back, run_folder(config))
    assert (start.path, start.is_named, start.notes) == (named, True, ())
    origin = {"progress": {"step": 3}, RESUMED_FROM: {"checkpoint": str(named.resolve()), "step": 2}}
    own = _save(config, 3, training=origin)
    start = resolve_start(back, run_folder(config))
    assert (start.path, start.step, start.is_named) == (own, 3, False)
    assert start.notes == (f"checkpoint.resume={named}: the run has gone on from there to step 3",)


def test_a_run_that_goes_back_sets_its_later_checkpoints_aside(config: Config) -> None:
    """Else the newest by number would be of the course that was left, and the next save the first to be deleted."""
    older, later = _save(config, 2), _save(config, 5)
    own = run_folder(config) / CHECKPOINTS_FOLDER
    start = resolve_start(_with(config, resume=str(older)), run_folder(config))
    assert (start.step, start.is_named) == (2, True)
    assert start.notes == (f"{later} is set aside: the run goes back to step 2",)
    assert [path.name for path in set_aside(own, start.step)] == ["step-00000005.set-aside"]
    assert resolve_start(config, run_folder(config)).path == older
    prune(own, Retention(last=1))
    assert [info.step for info in complete_checkpoints(own)] == [2]
    set_aside(own, 0)
    with pytest.raises(CheckpointError, match=r"set aside.*checkpoint\.resume=PATH"):  # and never from scratch
        resolve_start(config, run_folder(config))


def test_a_start_point_survives_its_journey_to_other_ranks(config: Config) -> None:
    source = _save(config, 3)
    start = resolve_start(_with(config, resume=str(source)), run_folder(config))
    assert StartPoint.from_dict(json.loads(json.dumps(asdict(start), default=str))) == start


def test_init_from_is_for_the_fresh_start_only_so_that_a_requeued_job_continues(config: Config) -> None:
    source = _save(config, 3)
    mine = _with(replace(config, run=replace(config.run, name="try2")), init_from=str(source))
    start = resolve_start(mine, run_folder(mine))
    assert (start.mode, start.path, start.step) == (StartMode.INIT_FROM, source, 0)
    own = _save(mine, 1)
    start = resolve_start(mine, run_folder(mine))
    assert (start.mode, start.path, start.step) == (StartMode.RESUME, own, 1)
    assert start.notes == (
        f"checkpoint.init_from={source}: was for the beginning; the run goes on from its own step 1",
    )


def test_finetuning_needs_a_phase_of_its_own_and_says_which(config: Config) -> None:
    source = _save(config, 3, data={"phases": [{"number": 0}, {"number": 2}]})
    mine = _with(replace(config, run=replace(config.run, name="try2")), finetune_from=str(source))
    with pytest.raises(CheckpointError, match=r"data\.phase=0: .* in phase 2 already; data\.phase=3 begins"):
        resolve_start(mine, run_folder(mine))
    mine = replace(mine, data=replace(mine.data, phase=3))
    start = resolve_start(mine, run_folder(mine))
    assert (start.mode, start.path, start.step) == (StartMode.FINETUNE, source, 0)
    own = _save(mine, 1, data={"phases": [{"number": 3}]})
    assert resolve_start(mine, run_folder(mine)).path == own, "a requeued job continues"


def test_converted_weights_begin_a_run_and_resume_none(config: Config) -> None:
    source = _save(config, 0, training={"imported": {"format": "hf"}})
    with pytest.raises(CheckpointError, match=r"converted weights.*checkpoint\.init_from="):
        resolve_start(config, run_folder(config))
    for mode in ("init_from", "finetune_from"):
        mine = _with(replace(config, run=replace(config.run, name="try2")), **{mode: str(source)})
        assert resolve_start(mine, run_folder(mine)).path == source


def test_what_weights_do_not_depend_on_may_change_with_a_note_in_a_new_run(config: Config) -> None:
    source = _save(config, 3)
    changed = replace(config, run=replace(config.run, name="try2"), model=replace(config.model, dropout=0.1))
    start = resolve_start(_with(changed, init_from=str(source)), run_folder(changed))
    assert start.notes == (
        f"model.dropout=0.1: {source} was trained with 0.0; this run trains with its own 0.1 (model.dropout=0.0 keeps "
        "the other)",
    )
    longer = replace(changed, model=replace(config.model, sequence_length=64))
    with pytest.raises(CheckpointError, match=r"model\.sequence_length=64"):  # learned positions are weights
        resolve_start(_with(longer, init_from=str(source)), run_folder(longer))


def test_a_rotary_context_may_be_stretched(config: Config) -> None:
    config = replace(config, model=replace(config.model, position="rotary"))
    source = _save(config, 3)
    model = replace(config.model, sequence_length=64, rotary_scaling="yarn", rotary_factor=2.0)
    longer = replace(config, run=replace(config.run, name="try2"), model=model)
    notes = resolve_start(_with(longer, init_from=str(source)), run_folder(longer)).notes
    assert [note.split("=")[0] for note in notes] == [
        "model.rotary_factor",
        "model.rotary_scaling",
        "model.sequence_length",
    ]


def test_fields_that_an_older_megalm_had_not_are_what_they_default_to(config: Config) -> None:
    folder = _save(config, 3, unknown=("head_dim", "position_offset", "projection_bias", "norm_bias"))
    assert resolve_start(config, run_folder(config)).path == folder
    other = replace(config, run=replace(config.run, name="try2"))
    assert resolve_start(_with(other, init_from=str(folder)), run_folder(other)).notes == ()
    for name, value in (("head_dim", 8), ("position_offset", 2), ("norm_bias", False)):
        changed = replace(config, model=replace(config.model, **{name: value}))
        with pytest.raises(CheckpointError, match=rf"model\.{name}=.*was trained with (null|0); set model\.{name}="):
            resolve_start(changed, run_folder(config))


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
    program = "import sys, megalm.runs.start; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_steps_after_the_checkpoint_are_told_to_be_computed_again(config: Config) -> None:
    _save(config, 3)
    record = run_folder(config) / "metrics.jsonl"
    for last, note in (
        (3, ()),
        (4, ("resumed at step 3, 1 step after it is computed again",)),
        (13, ("resumed at step 3, 10 steps after it are computed again",)),
    ):
        record.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, last + 1)))
        assert resolve_start(config, run_folder(config)).notes == note


def test_dropout_and_the_stretch_of_a_rotary_context_may_change_in_a_run_that_goes_on(config: Config) -> None:
    _save(config, 3)
    dropout = replace(config, model=replace(config.model, dropout=0.1, attention_dropout=0.1))
    assert resolve_start(dropout, run_folder(config)).step == 3
    longer = replace(config, model=replace(config.model, sequence_length=64))
    with pytest.raises(CheckpointError, match=r"model\.sequence_length=64"):  # learned positions are weights
        resolve_start(longer, run_folder(config))
    rotary = replace(config, run=replace(config.run, name="try2"), model=replace(config.model, position="rotary"))
    _save(rotary, 3)
    longer = replace(rotary, model=replace(rotary.model, sequence_length=64))
    assert resolve_start(longer, run_folder(longer)).step == 3
