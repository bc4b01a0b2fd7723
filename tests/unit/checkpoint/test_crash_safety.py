"""Saves that die at the worst moments, and manifests that lie in their types: one line, and nothing lost."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch
from layouts import SHAPES, Layout, fields_of, fields_of_version_4, header, pieces_of, rewrite, save, shard_of

from megalm.checkpoint import save as save_module
from megalm.checkpoint import store, writer
from megalm.checkpoint.manifest import COMPLETE_FILE, MANIFEST_FILE
from megalm.checkpoint.pieces import Piece, TensorRecord
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.save import Save, save_checkpoint
from megalm.checkpoint.store import (
    Retention,
    complete_checkpoints,
    find_latest,
    prune,
    remove_leftovers,
    torn_checkpoints,
)
from megalm.checkpoint.writer import PieceToWrite, complete_checkpoint, temporary_folder, write_rank
from megalm.core.parameters import StatePiece
from megalm.errors import CheckpointError
from megalm.mesh.parameter import ParameterRecord
from megalm.mesh.slices import Cut, ShardSpec
from megalm.training.saving import HostCopy


def _no_room_for(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_text = writer._write_text

    def full_disk(path: Path, text: str) -> None:
        if path.name == name:
            raise OSError(28, "No space left on device", str(path))
        write_text(path, text)

    monkeypatch.setattr(writer, "_write_text", full_disk)


@pytest.mark.parametrize("name", [MANIFEST_FILE, COMPLETE_FILE, "rank-00001.json"])
def test_a_failed_save_leaves_nothing_behind_and_the_same_step_untouched(tmp_path: Path, monkeypatch, name) -> None:
    save(tmp_path, Layout(tp=2), step=5)
    _no_room_for(monkeypatch, name)
    for step in (5, 6):
        for result in save(tmp_path, Layout(tp=2), step=step):
            assert isinstance(result, CheckpointError)
            assert f"{name}: No space left on device" in str(result)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    assert list(CheckpointReader(find_latest(tmp_path).path).find_corruption()) == []


class _Killed(BaseException):
    """Nobody catches it: what a SIGKILL at this place would leave stays."""


def _killed(*_, **__):
    raise _Killed


@pytest.mark.parametrize("moment", ["before the new one is there", "before the old one is deleted"])
def test_a_kill_while_the_same_step_is_replaced_loses_no_checkpoint(tmp_path: Path, monkeypatch, moment) -> None:
    final = save(tmp_path, Layout(), step=5)[0]
    pieces = [PieceToWrite.of(piece) for piece in pieces_of(Layout(), 0, 0)]
    temporary = temporary_folder(tmp_path, 5, 1)
    write_rank(temporary, 0, pieces)
    rename = Path.rename
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        if moment.endswith("deleted"):
            patch.setattr(writer, "remove_folder", _killed)
        else:
            patch.setattr(Path, "rename", lambda self, to: _killed() if self == temporary else rename(self, to))
        complete_checkpoint(temporary, final, header(5), 1)
    latest = find_latest(tmp_path)
    assert latest.step == 5
    assert list(CheckpointReader(latest.path).find_corruption()) == []
    remove_leftovers(tmp_path)
    assert find_latest(tmp_path) == latest, "the next life finds it, too"
    assert torn_checkpoints(tmp_path) == []


def test_a_kill_while_pruning_is_cleaned_up_by_the_next_life(tmp_path: Path, monkeypatch) -> None:
    for step in (1, 2):
        save(tmp_path, Layout(), step=step)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        prune(tmp_path, Retention(last=1))
    assert [info.step for info in complete_checkpoints(tmp_path)] == [2]
    assert len(torn_checkpoints(tmp_path)) == 1
    remove_leftovers(tmp_path)
    assert torn_checkpoints(tmp_path) == []


def test_ranks_that_do_not_share_the_file_system_are_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(save_module, "INDEX_WAIT_SECONDS", 0.1)
    with pytest.raises(CheckpointError, match=r"no index of 2 of 3 ranks \(1, 2\): not seen within"):
        save_checkpoint(tmp_path, header(1), [], rank=0, world_size=3, agree=lambda error: error)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_fails_calls_the_others_off(tmp_path: Path, monkeypatch) -> None:
    """Rank 0 does not wait for the index that will never come."""

    def broken(layout, tp_rank, dp_rank):
        pieces = pieces_of(layout, tp_rank, dp_rank)
        return [replace(piece, values=piece.values.double()) for piece in pieces] if tp_rank else pieces

    for result in save(tmp_path, Layout(tp=2), pieces=broken):
        assert isinstance(result, CheckpointError)
        assert "torch.float64, masters and moments are float32" in str(result)
    assert list(tmp_path.iterdir()) == []


def test_a_bug_in_the_thread_is_not_swallowed(tmp_path: Path) -> None:
    piece = replace(PieceToWrite.of(pieces_of(Layout(), 0, 0)[0]), load=lambda: 1 // 0)
    with pytest.raises(CheckpointError, match="ZeroDivisionError"):
        save_checkpoint(tmp_path, header(1), [piece], rank=0, world_size=1, agree=lambda error: error)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The save's thread waits at its first piece while this one goes on; what it writes is the state of the copy."""
    may_write = Event()
    values = torch.arange(6.0)
    state = StatePiece(ParameterRecord("norm.weight", ShardSpec.replicated(6)), "weight", 0, values)
    copy = HostCopy().take([state])[0]

    def load():
        may_write.wait(30)
        return copy.load()

    running = Save(tmp_path, header(1), [replace(copy, load=load)], rank=0, world_size=1)
    values.fill_(7.0)  # the next step
    assert not running.is_complete
    assert complete_checkpoints(tmp_path) == []
    may_write.set()
    running.finish(lambda error: error)
    assert running.is_complete
    reader = CheckpointReader(running.path)
    assert reader.read_local("norm.weight", "weight", ShardSpec.replicated(6)).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "fields",
    [
        {"flat_start": "0"},
        {"flat_start": 0.0},
        {"length": True},
        {"file": 3},
        {"sha256": None},
        {"dim": "0"},
        {"padding": 2},
        {"ranges": [[0, 6]]},
        {"ranges": [[0, "6"]]},
    ],
)
def test_a_piece_of_the_wrong_type_is_one_line(tmp_path: Path, fields: dict) -> None:
    checkpoint = save(tmp_path, Layout())[0]
    manifest = fields_of_version_4(checkpoint)
    for piece in manifest["tensors"]["norm.weight"]["pieces"]:
        piece.update(fields)
    rewrite(checkpoint, manifest)
    with pytest.raises(CheckpointError, match=r"norm\.weight|incomplete or damaged"):
        CheckpointReader(checkpoint)


@pytest.mark.parametrize("step", [True, -1, "7", None])
def test_a_step_is_a_count(tmp_path: Path, step: object) -> None:
    checkpoint = save(tmp_path, Layout())[0]
    rewrite(checkpoint, {**fields_of(checkpoint), "step": step})
    with pytest.raises(CheckpointError, match="incomplete or damaged"):
        CheckpointReader(checkpoint)


def test_rows_and_columns_do_not_add_up_to_a_tensor() -> None:
    pieces = [
        Piece("weight", "f", str(dim), (Cut(dim, (half,)),), 0, 8, "float32", "")
        for dim, half in ((0, (0, 2)), (1, (2, 4)))
    ]
    assert TensorRecord((4, 4), tuple(pieces)).holes("weight") == "[2:4, 0:2]"


def test_slices_are_read_back_after_every_one_of_these_rules(tmp_path: Path) -> None:
    reader = CheckpointReader(save(tmp_path, Layout(tp=3))[0])
    assert {name: tuple(reader.read_local(name, "weight", shard_of(name, 1, 0)).shape) for name in SHAPES} == SHAPES


def test_rank_0_that_waits_for_a_cancelled_ranks_index_has_no_error_of_its_own(tmp_path: Path) -> None:
    pieces = [PieceToWrite.of(piece) for piece in pieces_of(Layout(), 0, 0)]
    running = Save(tmp_path, header(1), pieces, rank=0, world_size=2)
    assert running._written.wait(30)
    running.cancel()
    running.join(30)
    assert not running.is_complete
    said, words = [], iter([None, "rank 1: No space left", None])
    with pytest.raises(CheckpointError, match=r"^checkpoint of step 1 was not saved: rank 1: No space left"):
        running.finish(lambda word: said.append(word) or next(words))
    assert said == [None, None, None]


def test_a_save_that_is_cancelled_stops_between_pieces_and_the_other_ranks_error_is_told(tmp_path: Path) -> None:
    pieces = [PieceToWrite.of(piece) for piece in pieces_of(Layout(), 0, 0)]
    loaded, said = [], []

    def load(piece: PieceToWrite):
        if len(loaded) == 2:
            running.cancel()
        loaded.append(piece.name)
        return piece.load()

    # The thread may be quicker than this line: it waits for the name.
    ready = Event()
    first = replace(pieces[0], load=lambda: ready.wait(30) and load(pieces[0]))
    rest = [replace(piece, load=lambda piece=piece: load(piece)) for piece in pieces[1:]]
    running = Save(tmp_path, header(1), [first, *rest], rank=0, world_size=1)
    ready.set()
    with pytest.raises(CheckpointError, match=r"^checkpoint of step 1 was not saved: rank 3: No space left"):
        words = iter([None, "rank 3: No space left", None])  # all have ended; their errors; all have stopped
        running.finish(lambda word: said.append(word) or next(words))
    assert said == [None, None, None], "that it was cancelled is not the error that others are told"
    assert len(loaded) == 3 < len(pieces)
    assert list(tmp_path.iterdir()) == []


def test_what_goes_wrong_after_a_checkpoint_is_complete_is_a_warning(tmp_path: Path, monkeypatch) -> None:
    def unwilling(path: Path) -> None:
        raise OSError(39, "Directory not empty", str(path))

    save(tmp_path, Layout(), step=5)
    monkeypatch.setattr(writer, "remove_folder", unwilling)
    pieces = [PieceToWrite.of(piece) for piece in pieces_of(Layout(), 0, 0)]
    running = Save(tmp_path, header(5), pieces, rank=0, world_size=1, attempt=1, on_complete=lambda: 1 // 0)
    running.finish(lambda word: word)
    running.join()
    assert ["Directory not empty" in running.warnings[0], "ZeroDivisionError" in running.warnings[1]] == [True, True]
    assert list(CheckpointReader(find_latest(tmp_path).path).find_corruption()) == []


def test_bytes_are_on_the_disk_before_what_vouches_for_them(tmp_path: Path, monkeypatch) -> None:
    """What a power cut needs: pieces, then the manifest, then the marker, then the name."""
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def recorded_fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def recorded_rename(self: Path, to: Path) -> Path:
        events.append(f"▶ {Path(to).name}")
        return rename(self, to)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "rename", recorded_rename)
    save(tmp_path, Layout(), step=1)
    temporary = ".unfinished-step-00000001-0"
    assert events == [
        "rank-00000.safetensors",
        *("rank-00000.json.unfinished", "▶ rank-00000.json"),
        *("manifest.json.unfinished", "▶ manifest.json", temporary),
        *("COMPLETE.unfinished", "▶ COMPLETE", temporary),
        *("▶ step-00000001", tmp_path.name),
    ]
