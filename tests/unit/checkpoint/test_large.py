"""What a checkpoint of GPT-3 175B costs as the number of ranks grows; counted, not timed."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
from benchmarks.large_checkpoint import BUCKET_MIB, HIDDEN, LAYERS, LENGTH, records_of_rank, topology_of, write_indexes
from layouts import header

from megalm.checkpoint import collect
from megalm.checkpoint.collect import INDEX_ENDING, await_indexes
from megalm.checkpoint.manifest import MANIFEST_FILE, parse_manifest, read_manifest, read_text
from megalm.checkpoint.pieces import RANKS_PER_FOLDER, rank_file, rank_folders
from megalm.checkpoint.reads import bytes_to_read
from megalm.checkpoint.store import complete_checkpoints, remove_folder
from megalm.checkpoint.writer import complete_checkpoint
from megalm.engine.resume import runs_of_rank
from megalm.errors import CheckpointError

PARAMETERS = LAYERS * (12 * HIDDEN**2 + 13 * HIDDEN) + 50257 * HIDDEN + LENGTH * HIDDEN + 2 * HIDDEN


def _complete(folder: Path, dp: int) -> tuple[Path, int]:
    """A checkpoint of 175B from all ranks' indexes, and how many pieces it has."""
    topology = topology_of(dp)
    pieces = write_indexes(folder / "unfinished", topology)
    complete_checkpoint(folder / "unfinished", folder / "step-00000001", header(1), topology.world_size)
    return folder / "step-00000001", pieces


@pytest.fixture(scope="module")
def two_replicas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    return _complete(tmp_path_factory.mktemp("dp2"), 2)


@pytest.fixture(scope="module")
def eight_replicas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    return _complete(tmp_path_factory.mktemp("dp8"), 8)


def _listings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    listed: list[str] = []
    listdir = os.listdir
    monkeypatch.setattr(collect.os, "listdir", lambda path: listed.append(Path(path).name) or listdir(path))
    return listed


@pytest.mark.parametrize(("world_size", "listings"), [(8, 1), (256, 1), (257, 2), (1024, 4), (16384, 64)])
def test_rank_0_lists_a_folder_for_256_ranks_and_none_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, listings: int
) -> None:
    for name, ranks in rank_folders(world_size):
        (tmp_path / name).mkdir(exist_ok=True)
        for rank in ranks:
            (tmp_path / rank_file(rank, INDEX_ENDING)).touch()
        (tmp_path / name / "rank-00000.json.unfinished").touch()
    listed = _listings(monkeypatch)
    await_indexes(tmp_path, world_size, lambda: "waited")
    assert len(listed) == listings == -(-world_size // RANKS_PER_FOLDER)
    assert set(Counter(listed).values()) == {1}


def test_a_folder_is_listed_again_until_it_is_complete_and_the_others_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect.time, "sleep", lambda _: None)
    for name, ranks in rank_folders(1024):
        (tmp_path / name).mkdir(exist_ok=True)
        for rank in ranks:
            if rank != 300:
                (tmp_path / rank_file(rank, INDEX_ENDING)).touch()
    listed, looks = _listings(monkeypatch), []

    def given_up() -> str | None:
        looks.append(len(listed))
        if len(looks) == 3:
            (tmp_path / rank_file(300, INDEX_ENDING)).touch()
        return None

    await_indexes(tmp_path, 1024, given_up)
    assert listed == [tmp_path.name, *["ranks-00256"] * 4, "ranks-00512", "ranks-00768"]


def test_ranks_that_are_missing_in_any_folder_are_named(tmp_path: Path) -> None:
    for rank in range(1024):
        file = tmp_path / rank_file(rank, INDEX_ENDING)
        file.parent.mkdir(exist_ok=True)
        if rank not in (3, 255, 256, 1023):
            file.touch()
    with pytest.raises(CheckpointError, match=r"no index of 4 of 1024 ranks \(3, 255, 256, 1023\): too late"):
        await_indexes(tmp_path, 1024, lambda: "too late")


def test_a_folder_has_the_files_of_256_ranks() -> None:
    by_folder = Counter(str(Path(rank_file(rank)).parent) for rank in range(16384))
    assert len(by_folder) == 64
    assert set(by_folder.values()) == {256}
    assert rank_file(255) == "rank-00255.safetensors", "where a job of up to 256 ranks has them all"
    assert rank_file(256) == "ranks-00256/rank-00256.safetensors"
    assert [name for name, _ in rank_folders(1024)] == [".", "ranks-00256", "ranks-00512", "ranks-00768"]


def test_a_manifest_does_not_grow_with_pieces_but_by_the_seals_of_ranks(
    two_replicas: tuple[Path, int], eight_replicas: tuple[Path, int]
) -> None:
    """Version 4 had about 400 bytes for each piece: 35 MB on 1,024 ranks."""
    sizes = {}
    for ranks, (path, pieces) in ((256, two_replicas), (1024, eight_replicas)):
        manifest = read_manifest(path)
        assert sum(len(record.pieces) for record in manifest.tensors.values()) == pieces > 80 * ranks
        sizes[ranks] = (path / MANIFEST_FILE).stat().st_size - 64 * ranks
    assert sizes[1024] < 500_000
    assert sizes[1024] < 1.1 * sizes[256]


@pytest.mark.slow
def test_so_it_is_on_16384_ranks(tmp_path: Path) -> None:
    path, pieces = _complete(tmp_path, 128)
    assert pieces > 1_000_000
    assert (path / MANIFEST_FILE).stat().st_size - 64 * 16384 < 550_000
    assert len(list(path.rglob("*.json*"))) == 1, "the indexes are gone"
    assert [info.step for info in complete_checkpoints(tmp_path)] == [1]
    remove_folder(path)
    assert list(tmp_path.iterdir()) == []


def _calls_of(action: Callable[[], object]) -> int:
    """Python functions that are entered."""
    calls = 0

    def count(_, event: str, __) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
    return calls


def test_completing_is_linear_in_pieces_and_reading_does_not_depend_on_them(tmp_path: Path) -> None:
    completing, reading = {}, {}
    for dp in (2, 8):
        topology, folder = topology_of(dp), tmp_path / str(dp)
        pieces = write_indexes(folder / "unfinished", topology)
        final = folder / "step-00000001"
        calls = _calls_of(
            lambda: complete_checkpoint(folder / "unfinished", final, header(1), topology.world_size)  # noqa: B023
        )
        completing[dp] = calls / pieces
        text = read_text(final)
        reading[dp] = _calls_of(lambda: parse_manifest(text, final, checked=True)) / pieces  # noqa: B023
    assert completing[8] < completing[2], "what is done for each tensor is done once"
    assert reading[8] < 0.4 * reading[2], "pieces are not made where none is asked for"
    assert reading[8] < 1


def test_another_rank_makes_the_pieces_of_its_own_tensors_alone(eight_replicas: tuple[Path, int]) -> None:
    path, _ = eight_replicas
    manifest = parse_manifest(read_text(path), path / MANIFEST_FILE, checked=True)
    topology = topology_of(128)
    rank = topology.rank_at(pp=5, dp=77, tp=3)
    runs = runs_of_rank(records_of_rank(topology, rank), topology, rank, zero_stage=1, bucket_mib=BUCKET_MIB)
    assert bytes_to_read(manifest.tensors, runs) > 0
    made = {name for name, record in manifest.tensors.items() if record.pieces.are_made}
    assert made == {run.name for run in runs}
    assert len(made) < 40 < len(manifest.tensors)


@pytest.mark.slow
@pytest.mark.parametrize("dp", [2, 4])
def test_all_ranks_together_read_a_checkpoint_once(two_replicas: tuple[Path, int], dp: int) -> None:
    """And what seven more tensor-parallel ranks have copies of: norms, biases after products by rows, positions."""
    tensors = read_manifest(two_replicas[0]).tensors
    assert sum(prod(record.shape) for record in tensors.values()) == PARAMETERS
    topology = topology_of(dp)
    read = 0
    for rank in range(topology.world_size):
        runs = runs_of_rank(records_of_rank(topology, rank), topology, rank, zero_stage=1, bucket_mib=BUCKET_MIB)
        read += bytes_to_read(tensors, runs)
    copied = LAYERS * 6 * HIDDEN + LENGTH * HIDDEN + 2 * HIDDEN
    padding = sum(piece.length for record in tensors.values() for piece in record.pieces) // 3 - PARAMETERS
    assert padding == 7 * HIDDEN, "rows that make the words of eight ranks equally many"
    assert read == 12 * (PARAMETERS + padding + 7 * copied)
