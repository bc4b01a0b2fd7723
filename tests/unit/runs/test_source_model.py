"""Which model a run has that begins with another's weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from layouts import Layout, pieces_of

from megalm.checkpoint.save import save_checkpoint
from megalm.checkpoint.store import CHECKPOINTS_FOLDER
from megalm.checkpoint.writer import Header, PieceToWrite
from megalm.config.compose import compose, composition
from megalm.config.parse import config_to_dict
from megalm.config.schema import Config
from megalm.errors import CheckpointError, ConfigError
from megalm.runs.source_model import source_model
from megalm.runs.start import StartMode, resolve_start, run_folder

BASE = ["model=quickstart", "model.num_layers=2", "model.hidden_size=64", "model.vocab_size=96", "run.name=base"]


def save(config: Config, step: int = 3) -> Path:
    header = Header(step, config_to_dict(config), {"tp": 1}, {}, {"progress": {"step": step}})
    pieces = [PieceToWrite.of(piece) for piece in pieces_of(Layout(), 0, 0)]
    folder = run_folder(config) / CHECKPOINTS_FOLDER
    return save_checkpoint(folder, header, pieces, rank=0, world_size=1, agree=lambda error: error)


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A run with a checkpoint, in the working folder."""
    monkeypatch.chdir(tmp_path)
    config = compose(BASE)
    save(config)
    return config


@pytest.mark.parametrize("field", ["init_from", "finetune_from"])
def test_the_model_is_the_sources(base: Config, field: str) -> None:
    source = f"checkpoint.{field}=runs/${{logging.wandb_group}}"
    made = composition([source, "logging.wandb_group=base", "run.name=next", "data.phase=1"], source_model)
    assert made.config.model == base.model
    assert made.notes == ("model          taken from runs/base/checkpoints/step-00000003",)
    start = resolve_start(made.config, run_folder(made.config))
    assert start.mode in (StartMode.INIT_FROM, StartMode.FINETUNE) and start.notes == ()


def test_what_the_user_gives_stays_and_is_told_or_refused(base: Config) -> None:
    arguments = ["checkpoint.init_from=runs/base", "run.name=next"]
    legal = compose([*arguments, "model.dropout=0.1"], source_model)
    (note,) = resolve_start(legal, run_folder(legal)).notes
    assert note.startswith("model.dropout=0.1: runs/base/checkpoints/step-00000003 was trained with 0.0; this run")
    for given in (["model.num_layers=4"], ["model=gpt3_125m"]):
        other = compose([*arguments, *given], source_model)
        with pytest.raises(CheckpointError) as refused:
            resolve_start(other, run_folder(other))
        layers = other.model.num_layers
        assert f"model.num_layers={layers}: runs/base/checkpoints/step-00000003 was trained with 2" in str(
            refused.value
        )


def test_an_experiments_model_gives_way(base: Config) -> None:
    made = composition(["experiment=quickstart", "checkpoint.init_from=runs/base", "run.name=next"], source_model)
    assert made.config.model == base.model
    assert "not the experiment's model=quickstart: num_layers 6 → 2, hidden_size 192 → 64" in made.notes[0]


def test_more_words_need_no_number(base: Config) -> None:
    more = ["checkpoint.init_from=runs/base", "run.name=next", "checkpoint.extend_vocab=true"]
    assert compose(more, source_model).model.vocab_size is None
    assert compose([*more, "model.vocab_size=120"], source_model).model.vocab_size == 120


def test_a_requeued_run_has_its_own_model_though_the_source_is_gone(base: Config) -> None:
    arguments = ["checkpoint.init_from=runs/base", "run.name=next", "model.dropout=0.1"]
    first = compose(arguments, source_model)
    save(first)
    shutil.rmtree(run_folder(base))
    again = composition(["checkpoint.init_from=runs/base", "run.name=next"], source_model)
    assert again.config.model == first.model
    assert again.places["model.num_layers"].startswith("runs/next/checkpoints/")


def test_nothing_is_taken_from_what_is_no_checkpoint(base: Config) -> None:
    with pytest.raises(
        ConfigError, match=r"checkpoint\.init_from=runs/bsae: not a complete checkpoint of this machine"
    ):
        compose(["checkpoint.init_from=runs/bsae"], source_model)
    assert compose(["experiment=quickstart", "checkpoint.init_from=/on/a/cluster"], source_model).model.num_layers == 6
    assert (
        source_model({"run": {"dir": 3, "name": "x"}, "checkpoint": {"init_from": "a", "finetune_from": None}}) is None
    )
