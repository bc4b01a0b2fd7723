"""Saves that die at the worst moments, and manifests that lie in their types: one line, and nothing lost."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from layouts import SHAPES, Layout, header, pieces_of, save, shard_of

from megalm.checkpoint import store, writer
from megalm.checkpoint.manifest import COMPLETE_FILE, MANIFEST_FILE, Piece, TensorRecord
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.store import complete_checkpoints, find_latest, prune, torn_checkpoints
from megalm.checkpoint.writer import save_checkpoint
from megalm.errors import CheckpointError


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


def test_a_kill_while_the_same_step_is_replaced_loses_no_checkpoint(tmp_path: Path, monkeypatch) -> None:
    save(tmp_path, Layout(), step=5)
    real = shutil.rmtree

    def killed(path, *args, **kwargs):
        if Path(path).name.endswith("step-00000005"):
            raise KeyboardInterrupt
        real(path, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(writer.shutil, "rmtree", killed)
        pieces = pieces_of(Layout(), 0, 0)
        save_checkpoint(tmp_path, header(5), pieces, rank=0, world_size=1, agree=lambda error: error)
    assert list(CheckpointReader(find_latest(tmp_path).path).find_corruption()) == []


def test_a_kill_while_pruning_is_cleaned_up_by_the_next_save(tmp_path: Path, monkeypatch) -> None:
    for step in (1, 2):
        save(tmp_path, Layout(), step=step)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        prune(tmp_path, 1)
    assert [info.step for info in complete_checkpoints(tmp_path)] == [2]
    assert len(torn_checkpoints(tmp_path)) == 1
    save(tmp_path, Layout(), step=3)
    assert torn_checkpoints(tmp_path) == []


def test_ranks_that_do_not_share_the_file_system_are_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(writer, "INDEX_WAIT_SECONDS", 0.1)
    (tmp_path / "rank-00000.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"no index of 2 of 3 ranks \(1, 2\)"):
        writer._await_indexes(tmp_path, 3)


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
    manifest = json.loads((checkpoint / MANIFEST_FILE).read_text())
    for piece in manifest["tensors"]["norm.weight"]["pieces"]:
        piece.update(fields)
    _rewrite(checkpoint, manifest)
    with pytest.raises(CheckpointError, match=r"norm\.weight|incomplete or damaged"):
        CheckpointReader(checkpoint)


@pytest.mark.parametrize("step", [True, -1, "7", None])
def test_a_step_is_a_count(tmp_path: Path, step: object) -> None:
    checkpoint = save(tmp_path, Layout())[0]
    _rewrite(checkpoint, {**json.loads((checkpoint / MANIFEST_FILE).read_text()), "step": step})
    with pytest.raises(CheckpointError, match="incomplete or damaged"):
        CheckpointReader(checkpoint)


def test_rows_and_columns_do_not_add_up_to_a_tensor() -> None:
    pieces = [
        Piece("weight", "f", str(dim), dim, (half,), 0, 0, 8, "float32", "") for dim, half in ((0, (0, 2)), (1, (2, 4)))
    ]
    assert TensorRecord((4, 4), tuple(pieces)).holes("weight") == "slices along different dims [0, 1]"


def test_slices_are_read_back_after_every_one_of_these_rules(tmp_path: Path) -> None:
    reader = CheckpointReader(save(tmp_path, Layout(tp=3))[0])
    assert {name: tuple(reader.read_local(name, "weight", shard_of(name, 1, 0)).shape) for name in SHAPES} == SHAPES


def _rewrite(checkpoint: Path, manifest: dict) -> None:
    text = json.dumps(manifest)
    (checkpoint / MANIFEST_FILE).write_text(text)
    (checkpoint / COMPLETE_FILE).write_text(hashlib.sha256(text.encode()).hexdigest())
