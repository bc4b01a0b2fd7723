"""What is read of which piece: exact, in part where it is proven, and counted."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import KINDS, Layout, fields_of, fields_of_version_4, full_tensors, pieces_of, rewrite, save, shard_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megalm.checkpoint.columns import cuts_from_fields, cuts_to_json
from megalm.checkpoint.manifest import MANIFEST_FILE, parse_manifest, read_text
from megalm.checkpoint.pieces import DIGESTS, Piece, TensorRecord
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.reads import bytes_to_read, plan_reads, shared_rows
from megalm.core.parameters import StatePiece
from megalm.errors import CheckpointError
from megalm.mesh.parameter import ParameterRecord, StateRun
from megalm.mesh.slices import Cut, Rows, ShardSpec


@st.composite
def rows(draw) -> Rows:
    count, width = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    stride = draw(st.sampled_from([width, width + 1, width + 3, 8, 16]).filter(lambda stride: stride >= width))
    local_stride = draw(st.integers(width, width + 3))
    several = count > 1
    return Rows(
        count,
        width,
        draw(st.integers(0, 5)),
        local_stride if several else 0,
        draw(st.integers(0, 40)),
        stride if several else 0,
    )


def _places(found: Rows) -> list[tuple[int, int]]:
    """(place in the full tensor, local place) of every element."""
    return [
        (
            found.full_start + row * found.full_stride + column,
            found.local_start + row * found.local_stride + column,
        )
        for row in range(found.rows)
        for column in range(found.width)
    ]


@settings(max_examples=500, deadline=None)
@given(one=rows(), other=rows())
def test_what_two_runs_share_is_every_element_of_both_once(one: Rows, other: Rows) -> None:
    mine, theirs = dict(_places(one)), dict(_places(other))
    wanted = sorted((mine[place], theirs[place]) for place in mine.keys() & theirs.keys())
    found = [(local, full) for shared in shared_rows(one, other) for full, local in _places(shared)]
    assert sorted(found) == wanted


SHAPE = (8, 6)


def _record(*pieces: tuple[ShardSpec, int, int]) -> TensorRecord:
    """Of pieces (slice, start, length)."""
    made = [
        Piece("weight", f"rank-{number:05d}.safetensors", "weight/w", shard.cuts, start, length, "float32", "")
        for number, (shard, start, length) in enumerate(pieces)
    ]
    return TensorRecord(SHAPE, made, fingerprint="0" * 16)


WHOLE = ShardSpec.replicated(*SHAPE)
LEFT, RIGHT = (ShardSpec.along(SHAPE, 1, ((low, low + 3),)) for low in (0, 3))
TOP, BOTTOM = (ShardSpec.along(SHAPE, 0, ((low, low + 4),)) for low in (0, 4))


@pytest.mark.parametrize(
    ("record", "shard", "run", "spans"),
    [
        (_record((WHOLE, 0, 20), (WHOLE, 20, 28)), WHOLE, (10, 15), {0: ((10, 20),), 1: ((0, 5),)}),
        (_record((WHOLE, 0, 48)), BOTTOM, (0, 24), {0: ((24, 48),)}),
        (_record((WHOLE, 0, 48)), BOTTOM, (5, 7), {0: ((29, 36),)}),
        # Two rows of three columns: with the three between them, without what is before and after.
        (_record((WHOLE, 0, 48)), RIGHT, (6, 6), {0: ((15, 24),)}),
        (_record((LEFT, 0, 24), (RIGHT, 0, 24)), WHOLE, (0, 24), {0: ((0, 12),), 1: ((0, 12),)}),
        # From the middle of one row to the middle of another.
        (_record((LEFT, 0, 24), (RIGHT, 0, 24)), WHOLE, (4, 10), {0: ((3, 8),), 1: ((1, 6),)}),
        (_record((TOP, 0, 24), (BOTTOM, 0, 24)), RIGHT, (9, 6), {0: ((21, 24),), 1: ((3, 6),)}),
        # Ranges that lie apart are read apart.
        (
            _record((WHOLE, 0, 48)),
            ShardSpec.along(SHAPE, 0, ((0, 1), (4, 5))),
            (0, 12),
            {0: ((0, 6), (24, 30))},
        ),
    ],
)
def test_of_a_piece_that_is_needed_in_part_that_part_is_read(
    record: TensorRecord, shard: ShardSpec, run: tuple[int, int], spans: dict[int, tuple]
) -> None:
    plan = plan_reads(record, "weight", shard, *run, in_part=True)
    assert {record.pieces.index(read.piece): read.spans for read in plan} == spans
    whole = plan_reads(record, "weight", shard, *run, in_part=False)
    assert [(read.piece, read.is_whole) for read in whole] == [(read.piece, True) for read in plan]
    runs = [StateRun(ParameterRecord("w", shard), "weight", *run)]
    expected = sum(stop - start for found in spans.values() for start, stop in found)
    assert bytes_to_read({"w": record}, runs) == 4 * expected
    unproven = replace(record, fingerprint=None)
    assert bytes_to_read({"w": unproven}, runs) == 4 * sum(read.piece.length for read in plan)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path, Layout(tp=2, dp=2, cuts=(0.3,)), step=7)[0]


layouts = st.builds(
    Layout,
    tp=st.sampled_from([1, 2, 3, 4]),
    dp=st.integers(1, 3),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)


@settings(max_examples=30, deadline=None)
@given(written=layouts, read=layouts)
def test_what_is_counted_is_what_was_planned_and_values_are_right(written: Layout, read: Layout, tmp_path_factory):
    checkpoint = save(tmp_path_factory.mktemp("checkpoints"), written)[0]
    for tp_rank in range(read.tp):
        for dp_rank in range(read.dp):
            reader = CheckpointReader(checkpoint, is_proven=True)
            pieces = pieces_of(read, tp_rank, dp_rank)
            for piece in pieces:
                length = piece.values.numel()
                found = reader.read_flat(piece.name, piece.kind, piece.shard, piece.flat_start, length)
                assert torch.equal(found, piece.values)
            runs = [StateRun(p.record, p.kind, p.flat_start, p.values.numel()) for p in pieces]
            assert reader.count.nbytes == bytes_to_read(reader.manifest.tensors, runs)


def _flip_last_byte(checkpoint: Path, rank: int) -> None:
    file = checkpoint / f"rank-{rank:05d}.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _last_piece(checkpoint: Path, rank: int):
    """(name, piece) at the end of a rank's file, which is that of the last exp_avg_sq."""
    tensors = CheckpointReader(checkpoint).manifest.tensors
    name = "projection.weight"
    found = [p for p in tensors[name].pieces if p.kind == "exp_avg_sq" and p.file == f"rank-{rank:05d}.safetensors"]
    return name, found[0]


def test_a_piece_that_is_read_whole_is_checked_and_one_in_part_cannot_be(checkpoint: Path) -> None:
    """It is the proof after loading that sees what happened to the part: its share of the fingerprint is another."""
    name, piece = _last_piece(checkpoint, 1)
    _flip_last_byte(checkpoint, 1)
    shard = ShardSpec(CheckpointReader(checkpoint).manifest.tensors[name].shape, piece.cuts)
    place = (name, piece.kind, shard)
    end = piece.flat_start + piece.length
    for is_proven in (False, True):
        reader = CheckpointReader(checkpoint, is_proven=is_proven)
        with pytest.raises(CheckpointError, match="corrupt"):
            reader.read_flat(*place, piece.flat_start, piece.length)
    reader = CheckpointReader(checkpoint, is_proven=True)
    values = reader.read_flat(*place, end - 1, 1)
    assert reader.count.nbytes == 4
    assert values[0] != shard.take(full_tensors()[name, piece.kind]).view(-1)[end - 1]
    with pytest.raises(CheckpointError, match="corrupt"):
        CheckpointReader(checkpoint).read_flat(*place, end - 1, 1)


def test_moments_of_older_versions_have_no_fingerprint_and_are_read_whole(checkpoint: Path) -> None:
    rewrite(checkpoint, fields_of_version_4(checkpoint))
    name, piece = _last_piece(checkpoint, 1)
    _flip_last_byte(checkpoint, 1)
    shard = ShardSpec(CheckpointReader(checkpoint).manifest.tensors[name].shape, piece.cuts)
    reader = CheckpointReader(checkpoint, is_proven=True)
    reader.read_flat(name, "weight", shard, piece.flat_start, 1)
    assert reader.count.nbytes == 4, "weights have one"
    with pytest.raises(CheckpointError, match="corrupt"):
        reader.read_flat(name, piece.kind, shard, piece.flat_start, 1)


def test_moments_have_fingerprints_that_no_layout_changes(tmp_path: Path) -> None:
    found = []
    for step, layout in enumerate((Layout(), Layout(tp=4), Layout(tp=3, dp=3, cuts=(0.1, 0.7))), start=1):
        manifest = CheckpointReader(save(tmp_path, layout, step)[0]).manifest
        found.append({(name, kind): t.fingerprint_of(kind) for name, t in manifest.tensors.items() for kind in KINDS})
    assert found[0] == found[1] == found[2]
    assert len(set(found[0].values())) == len(full_tensors())


def test_a_rank_may_hold_several_runs_of_a_tensor(tmp_path: Path) -> None:
    """As where ZeRO gives replicas a part of every bucket; runs of moments may lie otherwise than those of weights."""
    values = {kind: torch.randn(24) for kind in KINDS}
    record = ParameterRecord("norm.weight", ShardSpec.replicated(24))
    stretches = {0: [(12, 16), (0, 8)], 1: [(8, 12), (16, 24)]}

    def pieces(_: Layout, __: int, dp_rank: int) -> list[StatePiece]:
        found = [
            StatePiece(record, kind, start, values[kind][start:stop])
            for kind in KINDS
            for start, stop in stretches[dp_rank]
            if kind != "exp_avg_sq"
        ]
        low, high = 12 * dp_rank, 12 * dp_rank + 12
        return [*found, StatePiece(record, "exp_avg_sq", low, values["exp_avg_sq"][low:high])]

    path = save(tmp_path, Layout(dp=2), pieces=pieces)[0]
    reader = CheckpointReader(path)
    assert list(reader.find_corruption()) == []
    for kind in KINDS:
        assert torch.equal(reader.read_flat("norm.weight", kind, record.shard, 0, 24), values[kind])
        assert torch.equal(reader.read_flat("norm.weight", kind, record.shard, 5, 13), values[kind][5:18])
    keys = {piece.key for piece in reader.manifest.tensors["norm.weight"].pieces if piece.kind == "weight"}
    assert keys == {"weight/norm.weight", "weight/norm.weight@12", "weight/norm.weight@16"}
    twice = [StatePiece(record, "weight", 0, values["weight"])] * 2
    (error,) = save(tmp_path, Layout(), 2, pieces=lambda *_: twice)
    assert "norm.weight: a rank has two runs of weight from 0 on" in str(error)


def test_padding_is_zero_whatever_slices_the_checkpoint_has(checkpoint: Path) -> None:
    reader = CheckpointReader(checkpoint, is_proven=True)
    full = full_tensors()["embedding.weight", "weight"]
    for tp in (1, 2, 3, 4):
        for rank in range(tp):
            shard = shard_of("embedding.weight", tp, rank)
            assert torch.equal(reader.read_local("embedding.weight", "weight", shard), shard.take(full))


def test_a_manifest_of_another_rank_is_taken_without_making_its_pieces(checkpoint: Path) -> None:
    text = read_text(checkpoint)
    taken = parse_manifest(text, checkpoint / MANIFEST_FILE, checked=True)
    reader = CheckpointReader(checkpoint, manifest=taken)
    shard = shard_of("qkv.weight", 2, 0)
    assert torch.equal(
        reader.read_local("qkv.weight", "weight", shard), shard.take(full_tensors()["qkv.weight", "weight"])
    )
    made = {name for name, record in taken.tensors.items() if record.pieces.are_made}
    assert made == {"qkv.weight"}
    assert hashlib.sha256(text.encode()).hexdigest() in (checkpoint / "COMPLETE").read_text()
    assert taken.fingerprints == CheckpointReader(checkpoint).manifest.fingerprints


def test_cuts_are_read_as_they_were_written() -> None:
    cuts = (Cut(0, ((0, 2), (4, 6))), Cut(2, ((1, 3),), 1))
    assert cuts_from_fields(json.loads(cuts_to_json(cuts))) == cuts
    with pytest.raises(ValueError, match="a cut"):
        cuts_from_fields([[0, [[0, 1.0]], 0]])


def test_what_a_file_says_of_its_pieces_is_sealed_by_the_manifest(checkpoint: Path) -> None:
    """Bytes and their sha256 in the same file: one who changed both is found out by the seal."""
    file = checkpoint / "rank-00001.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    key = next(iter(tensors))
    tensors[key] = tensors[key] + 1
    digests = json.loads(metadata[DIGESTS])
    digests[key] = hashlib.sha256(tensors[key].numpy().tobytes()).hexdigest()
    save_file(tensors, file, {DIGESTS: json.dumps(digests)})
    faults = list(CheckpointReader(checkpoint).find_corruption())
    assert f"{key} is corrupt: the sha256 in its file are not what was saved" in "".join(faults)
    save_file(tensors, file)
    assert "the sha256 in its file are not what was saved" in next(CheckpointReader(checkpoint).find_corruption())


def test_ranks_in_equal_steps_are_one_stretch_and_others_are_not(tmp_path: Path) -> None:
    """Eight replicas of an even cut; then such as have other lengths, or come in another order."""
    record = ParameterRecord("w", ShardSpec.replicated(64))
    values = {kind: torch.randn(64) for kind in KINDS}

    def saved(step: int, places: list[tuple[int, int]]) -> dict:
        def pieces(_: Layout, __: int, dp_rank: int) -> list[StatePiece]:
            start, stop = places[dp_rank]
            return [StatePiece(record, kind, start, values[kind][start:stop]) for kind in KINDS if stop > start]

        path = save(tmp_path, Layout(dp=len(places)), step, pieces=pieces)[0]
        reader = CheckpointReader(path)
        assert list(reader.find_corruption()) == []
        for kind in KINDS:
            assert torch.equal(reader.read_flat("w", kind, record.shard, 0, 64), values[kind])
        (runs,) = fields_of(path)["tensors"]["w"]["runs"]
        assert runs["kinds"] == list(KINDS)
        assert len(reader.manifest.tensors["w"].pieces) == 3 * sum(runs["counts"])
        return {name: runs[name] for name in ("starts", "lengths", "ranks", "steps", "counts")}

    even = [(8 * n, 8 * n + 8) for n in range(8)]
    assert saved(1, even) == {"starts": [0], "lengths": [8], "ranks": [0], "steps": [1], "counts": [8]}
    # The last ones have less, or nothing.
    uneven = [(min(12 * n, 64), min(12 * n + 12, 64)) for n in range(8)]
    assert saved(2, uneven)["counts"] == [5, 1]
    assert saved(3, [(0, 0), *even[:4], (0, 0), *even[4:]])["counts"] == [4, 4]
    every_other = [place for n in range(8) for place in (even[n], (0, 0))]
    assert saved(4, every_other) == {"starts": [0], "lengths": [8], "ranks": [0], "steps": [2], "counts": [8]}
    assert saved(5, even[::-1])["counts"] == [1] * 8
