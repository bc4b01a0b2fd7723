"""What was loaded is proven to be what was saved, and one rank's view of the disk is waited for."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from layouts import Layout, full_tensors, save

from megalm.checkpoint.manifest import COMPLETE_FILE, combined_hash, read_manifest
from megalm.core.parameters import StatePiece
from megalm.errors import CheckpointError
from megalm.mesh.groups import ParallelContext
from megalm.mesh.parameter import ParameterRecord
from megalm.mesh.slices import ShardSpec
from megalm.runs import start as start_module
from megalm.runs.start import StartMode, StartPoint, await_visible
from megalm.training.restoring import restore


class Engine:
    """Holds whole tensors; ``spoil`` is what goes wrong on the way into the model."""

    def __init__(self, spoil: str | None = None, lost: str | None = None) -> None:
        self.shapes = {name: tuple(full.shape) for (name, kind), full in full_tensors().items() if name != lost}
        self.spoil = spoil
        self.weights: dict[str, torch.Tensor] = {}

    def full_shapes(self):
        return self.shapes

    def load_state(self, source, **_):
        for name, shape in self.shapes.items():
            self.weights[name] = source.read_local(name, "weight", ShardSpec.replicated(*shape)).clone()
        if self.spoil:
            self.weights[self.spoil].view(-1)[3] += 1e-6

    def held_pieces(self):
        return self.state_pieces()

    def model_pieces(self):
        return self.state_pieces()

    def state_pieces(self):
        return [
            StatePiece(ParameterRecord(name, ShardSpec.replicated(*weight.shape)), "weight", 0, weight.view(-1))
            for name, weight in self.weights.items()
        ]


@pytest.fixture
def start(tmp_path: Path) -> StartPoint:
    return StartPoint(StartMode.INIT_FROM, save(tmp_path, Layout(tp=2, dp=2, cuts=(0.4,)))[0])


def test_one_line_says_what_was_loaded_and_its_hash(start: StartPoint) -> None:
    restored = restore(start, Engine(), None, ParallelContext.single())
    saved = combined_hash(read_manifest(start.path).fingerprints)
    assert restored.words == f"init_from, step 1: weights alone; hash {saved}; {start.path}"
    assert restored.lineage["parent"]["parameters"] == saved


def test_a_weight_that_changed_on_its_way_is_named(start: StartPoint) -> None:
    with pytest.raises(CheckpointError) as error:
        restore(start, Engine(spoil="qkv.weight"), None, ParallelContext.single())
    assert str(error.value) == f"{start.path}: qkv.weight: what was loaded is not what was saved"


def test_a_tensor_that_no_rank_holds_is_named(start: StartPoint) -> None:
    with pytest.raises(CheckpointError, match=r"norm\.weight: in the checkpoint, not in the model"):
        restore(start, Engine(lost="norm.weight"), None, ParallelContext.single())


def test_a_checkpoint_that_another_host_has_just_written_is_waited_for(start: StartPoint) -> None:
    marker = start.path / COMPLETE_FILE
    text = marker.read_text()
    marker.unlink()
    threading.Timer(0.3, lambda: marker.write_text(text)).start()
    began = time.monotonic()
    await_visible(start)
    assert time.monotonic() - began >= 0.25


def test_one_that_never_appears_is_named(start: StartPoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_module, "_VISIBLE_SECONDS", 0.1)
    (start.path / COMPLETE_FILE).unlink()
    with pytest.raises(CheckpointError, match="does not see it"):
        await_visible(start)
