"""Checkpoints: any layout reads what any layout wrote; what is damaged or torn never loads."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import (
    KINDS,
    SHAPES,
    Layout,
    fields_of,
    fields_of_version_4,
    full_tensors,
    pieces_of,
    rewrite,
    save,
    shard_of,
)

from megalm.checkpoint.fingerprint import fingerprint
from megalm.checkpoint.manifest import COMPLETE_FILE, MANIFEST_FILE, combined_hash
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.store import (
    CheckpointInfo,
    Retention,
    complete_checkpoints,
    find_latest,
    locate,
    prune,
    remove_leftovers,
    torn_checkpoints,
)
from megalm.core.parameters import StatePiece
from megalm.errors import CheckpointError
from megalm.mesh.parameter import ParameterRecord
from megalm.mesh.slices import ShardSpec, padded_range

GOLDEN = Path(__file__).resolve().parents[2] / "golden"

layouts = st.builds(
    Layout,
    tp=st.sampled_from([1, 2, 3, 4]),
    dp=st.integers(1, 3),
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)


@settings(max_examples=40, deadline=None)
@given(written=layouts, read=layouts)
def test_any_layout_reads_what_any_layout_wrote(written: Layout, read: Layout, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    results = save(folder, written)
    assert all(isinstance(path, Path) for path in results), results
    reader = CheckpointReader(results[0])
    for (name, kind), full in full_tensors().items():
        for rank in range(read.tp):
            shard = shard_of(name, read.tp, rank)
            want = shard.take(full)
            assert torch.equal(reader.read_local(name, kind, shard), want)
            for dp_rank in range(read.dp):
                for piece in pieces_of(read, rank, dp_rank):
                    if (piece.name, piece.kind) == (name, kind):
                        got = reader.read_flat(name, kind, shard, piece.flat_start, piece.values.numel())
                        assert torch.equal(got, piece.values)
    assert list(reader.find_corruption()) == []


def unpadded_pieces_of(layout: Layout, tp_rank: int, dp_rank: int) -> list[StatePiece]:
    """As the engine hands them over; ``pieces_of`` has padding, as checkpoints did before."""
    pieces = [piece.without_padding for piece in pieces_of(layout, tp_rank, dp_rank)]
    return [piece for piece in pieces if piece.values.numel()]


@settings(max_examples=40, deadline=None)
@given(written=layouts, read=layouts, multiple=st.sampled_from([1, 4, 32]), padded=st.booleans())
def test_padding_of_any_size_is_read_as_zeros(written, read, multiple, padded, tmp_path_factory) -> None:
    folder = tmp_path_factory.mktemp("checkpoints")
    results = save(folder, written, pieces=pieces_of if padded else unpadded_pieces_of)
    assert all(isinstance(path, Path) for path in results), results
    reader = CheckpointReader(results[0])
    shape = SHAPES["embedding.weight"]
    for kind in ("weight", "exp_avg"):
        full = full_tensors()["embedding.weight", kind]
        for rank in range(read.tp):
            words, padding = padded_range(shape[0], rank, read.tp, multiple)
            shard = ShardSpec.along(shape, 0, (words,), padding)
            want = shard.take(full)
            assert torch.equal(reader.read_local("embedding.weight", kind, shard), want)
            local = torch.full(shard.local_shape, float("nan"))
            reader.read_into(local, "embedding.weight", kind, shard)
            assert torch.equal(local, want)
            cuts = [0, *sorted(round(cut * want.numel()) for cut in read.cuts), want.numel()]
            for start, stop in itertools.pairwise(cuts):
                got = reader.read_flat("embedding.weight", kind, shard, start, stop - start)
                assert torch.equal(got, want.view(-1)[start:stop])
    assert list(reader.find_corruption()) == []


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    result = save(tmp_path, Layout(tp=2, dp=2, cuts=(0.3,)), step=7)[0]
    assert isinstance(result, Path)
    return result


def test_no_pickle_and_no_leftovers(checkpoint: Path) -> None:
    names = sorted(path.name for path in checkpoint.iterdir())
    assert names == [COMPLETE_FILE, MANIFEST_FILE, *(f"rank-{rank:05d}.safetensors" for rank in range(4))]
    assert torn_checkpoints(checkpoint.parent) == []


def test_padding_is_not_saved_as_values(checkpoint: Path) -> None:
    fields = fields_of(checkpoint)
    record = fields["tensors"]["embedding.weight"]
    assert record["shape"] == [13, 6]
    cuts = {json.dumps(fields["cuts"][number]) for runs in record["runs"] for number in runs["cuts"]}
    assert sorted(cuts) == ["[[0, [[0, 7]], 0]]", "[[0, [[7, 13]], 1]]"]


def test_a_flipped_byte_is_found_and_never_loads(checkpoint: Path) -> None:
    file = checkpoint / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    reader = CheckpointReader(checkpoint)
    faults = list(reader.find_corruption())
    assert len(faults) == 1
    assert "rank-00001.safetensors" in faults[0]
    assert "sha256" in faults[0]
    name = faults[0].split("/")[-1].split(" is corrupt")[0].strip()
    with pytest.raises(CheckpointError, match="corrupt"):
        for kind in KINDS:
            reader.read_local(name, kind, shard_of(name, 1, 0))


def test_a_truncated_or_missing_file_is_named(checkpoint: Path) -> None:
    file = checkpoint / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    (checkpoint / "rank-00003.safetensors").unlink()
    faults = "\n".join(CheckpointReader(checkpoint).find_corruption())
    assert "rank-00000.safetensors" in faults
    assert "rank-00003.safetensors" in faults


def test_a_lying_header_is_refused(checkpoint: Path) -> None:
    file = checkpoint / "rank-00000.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + size])
    key = next(k for k in entries if k != "__metadata__")
    entries[key]["data_offsets"][1] += 4096
    text = json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors"):
        for name in SHAPES:
            CheckpointReader(checkpoint).read_local(name, "weight", shard_of(name, 1, 0))


def _norm(manifest: dict) -> dict:
    return manifest["tensors"]["norm.weight"]["runs"][0]


@pytest.mark.parametrize(
    ("version", "change", "message"),
    [
        (
            4,
            lambda m: m["tensors"]["norm.weight"]["pieces"][0].update(file="../other"),
            "leaves the checkpoint's folder",
        ),
        (4, lambda m: m["tensors"]["norm.weight"]["pieces"][0].update(length=99), "lie outside"),
        (5, lambda m: _norm(m).update(lengths=[99, 4]), r"norm\.weight.* lie outside"),
        (5, lambda m: _norm(m).update(counts=[9, 1]), r"norm\.weight.* lie outside"),
        (5, lambda m: _norm(m).update(ranks=[0]), r"norm\.weight.* of 1 runs"),
        (5, lambda m: _norm(m).update(ranks=[0, "../2"]), r"norm\.weight.*ranks: \[0, '../2'\]"),
        (5, lambda m: _norm(m).update(ranks=[0, 4]), r"norm\.weight.*from 4 on.* of 4 ranks"),
        (5, lambda m: _norm(m).update(lengths=[1, 4], counts=[2, 1], steps=[4, 1]), r"norm\.weight.*in steps of 4"),
        (5, lambda m: _norm(m).update(lengths=[1, 4], counts=[2, 1], steps=[0, 1]), r"norm\.weight.*in steps of 0"),
        (5, lambda m: _norm(m).update(counts=[0, 1]), r"norm\.weight.*0 ranks"),
        (5, lambda m: _norm(m).update(starts=[0, True]), r"norm\.weight.*starts: \[0, True\]"),
        (5, lambda m: _norm(m).update(cuts=[99, 99]), r"norm\.weight.*out of range"),
        (5, lambda m: _norm(m).update(kinds=[1]), r"norm\.weight.*kinds \[1\]"),
        (5, lambda m: m.update(seals=m["seals"][:-1]), "255 characters; 64 hexadecimal digits"),
        (5, lambda m: m.update(seals="G" * 256), "256 characters; 64 hexadecimal digits"),
        (5, lambda m: m.update(seals=None), "incomplete or damaged"),
        (5, lambda m: _norm(m).pop("starts") and None, r"norm\.weight"),
        (5, lambda m: _norm(m).update(other=[]), r"norm\.weight"),
        (5, lambda m: m["tensors"]["norm.weight"]["fingerprints"].update(weight="1"), r"norm\.weight.*fingerprints"),
        (5, lambda m: m["tensors"]["norm.weight"].update(trainable=1), r"norm\.weight.*trainable 1"),
        (5, lambda m: m["tensors"]["norm.weight"].update(shape=[-6]), r"norm\.weight.*shape"),
        (5, lambda m: m["cuts"].append([["0", [[0, 6]], 0]]), "incomplete or damaged"),
        (5, lambda m: m["cuts"].append(3), "incomplete or damaged"),
        (5, lambda m: m.update(version=1), "format version 1; this megalm reads versions 2, 3, 4, 5"),
        (5, lambda m: m.pop("data"), "incomplete or damaged"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(checkpoint: Path, version: int, change, message: str) -> None:
    fields = fields_of(checkpoint) if version == 5 else fields_of_version_4(checkpoint)
    rewrite(checkpoint, fields)
    assert list(CheckpointReader(checkpoint).find_corruption()) == []
    change(fields)
    path = checkpoint / MANIFEST_FILE
    path.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="changed since the checkpoint was completed"):
        CheckpointReader(checkpoint)
    rewrite(checkpoint, fields)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(checkpoint)


def test_parameters_that_do_not_fit_are_all_named(checkpoint: Path) -> None:
    reader = CheckpointReader(checkpoint)
    with pytest.raises(CheckpointError) as error:
        reader.check_parameters({"norm.weight": (7,), "new.weight": (2, 2)}, whole_model=True)
    text = str(error.value)
    assert "norm.weight: [6] in the checkpoint, [7] in the model" in text
    assert "new.weight: not in the checkpoint" in text
    assert "qkv.weight: in the checkpoint, not in the model" in text


def test_a_hole_is_found_when_saving_and_nothing_is_left(tmp_path: Path) -> None:
    def lossy(layout: Layout, tp_rank: int, dp_rank: int):
        pieces = pieces_of(layout, tp_rank, dp_rank)
        return [p for p in pieces if not (p.name == "qkv.weight" and dp_rank == 1 and p.kind == "exp_avg")]

    results = save(tmp_path, Layout(tp=2, dp=2, cuts=(0.5,)), pieces=lossy)
    for result in results:
        assert isinstance(result, CheckpointError)
        assert "qkv.weight: no rank wrote exp_avg elements" in str(result)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_fails_the_save_and_leaves_the_previous_one(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        assert isinstance(save(disk, Layout(), step=1)[0], Path)
        (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 8192))
        result = save(disk, Layout(), step=2)[0]
        assert isinstance(result, CheckpointError)
        assert "step 2 was not saved" in str(result)
        assert [info.step for info in complete_checkpoints(disk)] == [1]
        assert list(CheckpointReader(find_latest(disk).path).find_corruption()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, Layout(), step=step)
    prune(tmp_path, Retention(last=0))
    assert [info.step for info in complete_checkpoints(tmp_path)] == [1, 2, 3]
    prune(tmp_path, Retention(last=2))
    assert [info.step for info in complete_checkpoints(tmp_path)] == [2, 3]


def test_an_incomplete_checkpoint_is_never_the_latest(tmp_path: Path) -> None:
    save(tmp_path, Layout(), step=1)
    newest = save(tmp_path, Layout(), step=2)[0]
    (newest / COMPLETE_FILE).unlink()
    assert find_latest(tmp_path).step == 1
    assert torn_checkpoints(tmp_path) == [newest]
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        locate(newest)


def test_a_path_that_does_not_exist_is_fatal(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        locate(tmp_path / "nothing")


_KILLED = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)  # no threads before the forks below
from pathlib import Path
from layouts import Layout, save
folder, chance = Path(sys.argv[1]), random.Random(4)
for trial in range(20):
    child = os.fork()
    if child == 0:
        for step in range(1000 * trial + 2, 10**6):
            save(folder, Layout(tp=2, dp=2, cuts=(0.4,)), step)
    time.sleep(chance.uniform(0.0, 0.12))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    print(trial, flush=True)
    sys.stdin.readline()
"""


def test_sigkill_at_twenty_random_moments_leaves_a_loadable_checkpoint_and_the_torn_one_is_reported(tmp_path) -> None:
    save(tmp_path, Layout(), step=1)
    torn = 0
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        newest = 1
        for trial in range(20):
            assert process.stdout.readline() == f"{trial}\n"
            latest = find_latest(tmp_path)
            assert latest.step >= newest, "what was complete stays"
            newest = latest.step
            assert list(CheckpointReader(latest.path).find_corruption()) == []
            left = torn_checkpoints(tmp_path)
            assert latest.path not in left
            torn += bool(left)
            remove_leftovers(tmp_path)
            assert torn_checkpoints(tmp_path) == []
            prune(tmp_path, Retention(last=2))
            process.stdin.write("\n")
            process.stdin.flush()
    assert torn >= 10, "the kills hit saves"


@given(
    losses=st.lists(st.one_of(st.just(math.nan), st.just(math.inf), st.sampled_from([1.0, 2.0, 3.0])), max_size=9),
    last=st.integers(1, 3),
    best=st.integers(0, 3),
)
def test_no_better_checkpoint_goes_while_a_worse_one_is_kept_for_its_loss(losses, last: int, best: int) -> None:
    checkpoints = [CheckpointInfo(Path(str(step)), step) for step in range(len(losses))]
    expired = Retention(last=last, best=best).expired(checkpoints, lambda info: losses[info.step])
    kept = [info.step for info in checkpoints if info not in expired]
    assert kept[-last:] == list(range(len(losses)))[-last:]
    finite = sorted(loss for loss in losses if math.isfinite(loss))[:best]
    assert sorted(losses[step] for step in kept if math.isfinite(losses[step]))[: len(finite)] == finite


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(last=0), [1, 2, 3, 4, 5, 6]),
        (Retention(last=2), [5, 6]),
        (Retention(last=1, every=2), [2, 4, 6]),
        (Retention(last=1, best=2), [2, 4, 6]),
        (Retention(last=1, every=5, best=1), [4, 5, 6]),
    ],
)
def test_the_newest_every_nth_and_the_best_are_kept(retention: Retention, kept: list[int]) -> None:
    losses = {1: 9.0, 2: 2.5, 3: math.nan, 4: 2.5, 5: 3.0, 6: math.nan}
    checkpoints = [CheckpointInfo(Path(str(step)), step) for step in losses]
    expired = retention.expired(checkpoints, lambda info: losses[info.step])
    assert [info.step for info in checkpoints if info not in expired] == kept


def test_losses_on_other_samples_are_not_compared() -> None:
    losses, samples = {1: 1.0, 2: 2.0, 3: 0.5, 4: 0.4, 5: 9.0}, {1: "256", 2: "256", 3: "8", 4: "8", 5: "8"}
    checkpoints = [CheckpointInfo(Path(str(step)), step) for step in losses]
    retention = Retention(last=1, best=1)
    expired = retention.expired(checkpoints, lambda i: losses[i.step], lambda i: samples[i.step])
    assert [info.step for info in expired] == [2, 3], "1 is the best of the first samples, 4 of the others"


def test_the_best_is_read_from_manifests(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        save(tmp_path, Layout(), step, training={"validation": {"val_loss": loss}})
    save(tmp_path, Layout(), step=4, training={"validation": {"val_loss": 0.5, "whole_split": True}})
    save(tmp_path, Layout(), step=5, training={"validation": {"val_loss": "damaged"}})
    (save(tmp_path, Layout(), step=6)[0] / MANIFEST_FILE).write_text("damaged")
    save(tmp_path, Layout(), step=7)
    assert prune(tmp_path, Retention(last=1, best=1)) == []
    assert [info.step for info in complete_checkpoints(tmp_path)] == [2, 7]


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_formats_of_the_past_load_for_ever(version: int) -> None:
    """Written by the megalm of that version, on 8 or 4 ranks; see tests/golden/README.md."""
    folder = GOLDEN / f"checkpoint_v{version}"
    reader = CheckpointReader(folder / "step-00000003")
    assert list(reader.find_corruption()) == []
    expected = json.loads((folder / "expected.json").read_text())
    assert {key.partition("/")[2] for key in expected} == set(reader.manifest.tensors)
    for key, digest in expected.items():
        kind, _, name = key.partition("/")
        full = reader.read_local(name, kind, ShardSpec.replicated(*reader.manifest.tensors[name].shape))
        assert hashlib.sha256(full.contiguous().numpy().tobytes()).hexdigest() == digest, key
    assert (reader.manifest.step, reader.manifest.training["engine"]["optimizer_steps"]) == (3, 3)


def test_a_hash_of_parameters_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    hashes = set()
    for step, layout in enumerate((Layout(), Layout(tp=4), Layout(tp=3, dp=3, cuts=(0.1, 0.7)), Layout(dp=2)), start=1):
        hashes.add(combined_hash(CheckpointReader(save(tmp_path, layout, step)[0]).manifest.fingerprints))
    assert len(hashes) == 1


def test_a_hash_changes_with_a_bit_a_place_and_a_name() -> None:
    values = torch.arange(12.0).view(3, 4)
    shard = ShardSpec.replicated(3, 4)
    first = fingerprint("a", shard, 0, values.view(-1))
    for name, other in (("b", values), ("a", values.flip(0)), ("a", values.flip(1)), ("a", -values)):
        assert fingerprint(name, shard, 0, other.reshape(-1)) != first
    # Minus zero is another bit pattern than zero.
    assert fingerprint("a", shard, 0, torch.zeros(12)) != fingerprint("a", shard, 0, -torch.zeros(12))


_MEASURED = """
import re, sys
from pathlib import Path
from megalm.checkpoint.reader import CheckpointReader
from megalm.core.parameters import StatePiece
from megalm.mesh.slices import ShardSpec, padded_range
reader = CheckpointReader(Path(sys.argv[1]))
def peak():  # not ru_maxrss, which begins with the size of the process that this one was forked from
    return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text()).group(1))
reader.read_local("small", "weight", ShardSpec.replicated(8))
before = peak()
for number in range(6):
    reader.read_local(str(number), "weight", ShardSpec.along((2048, 4096), 1, ((0, 4096),)))
print(peak() - before)
"""


def test_memory_of_reading_is_bounded_by_a_tensor_and_a_piece(tmp_path: Path) -> None:
    """Six tensors of 32 MiB in halves by columns, read whole: one of them, and what it is assembled from, at a time."""
    pieces = []
    for number in range(6):
        for half in range(2):
            shard = ShardSpec.along((2048, 4096), 1, ((2048 * half, 2048 * (half + 1)),))
            pieces.append(
                [StatePiece(ParameterRecord(str(number), shard), "weight", 0, torch.zeros(shard.local_numel))]
            )
    pieces.append([StatePiece(ParameterRecord("small", ShardSpec.replicated(8)), "weight", 0, torch.zeros(8))])
    halves = [[p[0] for p in pieces[0:12:2]] + pieces[12], [p[0] for p in pieces[1:12:2]]]
    path = save(tmp_path, Layout(tp=2), pieces=lambda layout, tp_rank, dp_rank: halves[tp_rank])[0]
    command = [sys.executable, "-c", _MEASURED, str(path)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    # The full tensor, what is taken of it, and a piece of 16 MiB; not six of them.
    assert grown < (32 + 32 + 16 + 8) * 2**20
