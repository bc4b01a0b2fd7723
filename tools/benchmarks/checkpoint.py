"""What checkpoints cost: saving and loading beside a plain write of the same bytes, stalls, memory of converting, and
manifests of thousands of ranks.

Writers and readers take turns on one disk, round by round, and ratios are medians over rounds: a shared disk is slower
at one time than at another. A write ends when the bytes are on the disk (fsync), for both; a file is read after its
pages were dropped from the page cache, where the system heeds that.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

from benchmarks.large_checkpoint import topology_of, write_indexes
from benchmarks.table import Report, Row
from megalm.checkpoint.manifest import MANIFEST_FILE, parse_manifest, read_manifest
from megalm.checkpoint.pieces import WEIGHT
from megalm.checkpoint.reader import CheckpointReader
from megalm.checkpoint.save import save_checkpoint
from megalm.checkpoint.store import CHECKPOINTS_FOLDER, step_folder
from megalm.checkpoint.writer import Header, PieceToWrite, complete_checkpoint
from megalm.config.parse import config_to_dict
from megalm.config.schema import Model
from megalm.convert.checks import config_around
from megalm.convert.weights import full_shapes
from megalm.core.parameters import StatePiece
from megalm.mesh.parameter import ParameterRecord
from megalm.mesh.slices import ShardSpec
from megalm.training.saving import HostCopy

_LEAST_RATIO = 0.8
_MANIFEST_SECONDS = {8: 0.5, 128: 3.0}
"""Most that completing may compute, by data-parallel degree."""
_VOCABULARY = 50_257
_KINDS = (WEIGHT, "exp_avg", "exp_avg_sq")
_CONVERT = Path(__file__).resolve().parents[1] / "convert_checkpoint.py"

GPT3_125M = Model(num_layers=12, hidden_size=768, num_heads=12, sequence_length=2048, vocab_size=_VOCABULARY)
GPT_1B = Model(num_layers=18, hidden_size=2048, num_heads=16, sequence_length=1024, vocab_size=_VOCABULARY)


@dataclass(frozen=True)
class Options:
    """How long to measure.

    Attributes:
        rounds: repetitions that a median is taken of.
        convert: whether to convert the large model, which takes 14 GB of disk.
        folder: where to write; None: the system's folder for temporary files.
    """

    rounds: int = 5
    convert: bool = True
    folder: Path | None = None


def run(options: Options) -> Report:
    """Measure everything in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="megalm-bench-", dir=options.folder) as name:
        rows = _speed_rows(Path(name), options.rounds)
        rows += [row for dp in (8, 128) for row in _manifest_rows(Path(name) / f"manifest-{dp}", dp)]
        if options.convert:
            rows += _convert_rows(Path(name))
    return Report("checkpoint", rows)


def _speed_rows(folder: Path, rounds: int) -> list[Row]:
    """Masters and moments of GPT-3 125M, as one rank holds them."""
    state = list(_state(GPT3_125M))
    nbytes = sum(piece.values.nbytes for piece in state)
    named = {f"{piece.kind}/{piece.name}": piece.values for piece in state}
    seconds: dict[str, list[float]] = {name: [] for name in ("plain write", "save", "load", "first copy", "copy")}
    copy = HostCopy()
    for number in range(rounds):
        plain, checkpoints = folder / "plain.safetensors", folder / f"round-{number}"
        seconds["plain write"].append(_timed(lambda: _plain_write(named, plain)))  # noqa: B023 - called at once
        seconds["save"].append(_timed(lambda: _save(state, checkpoints)))  # noqa: B023
        _forget_pages(checkpoints)
        seconds["load"].append(_timed(lambda: _load(state, checkpoints)))  # noqa: B023
        seconds["copy" if number else "first copy"].append(_timed(lambda: copy.take(state)))
        for file in checkpoints.rglob("*.safetensors"):
            file.unlink()
    ratios = {
        name: median(plain / mine for plain, mine in zip(seconds["plain write"], seconds[name], strict=True))
        for name in ("save", "load")
    }
    speeds = {name: nbytes / median(taken) / 1e9 for name, taken in seconds.items() if taken}
    return [
        Row("plain safetensors write", speeds["plain write"], "GB/s", note=f"{nbytes / 1e9:.2f} GB, with fsync"),
        Row("save", speeds["save"], "GB/s", note="with sha256, fingerprints and fsync"),
        Row("save / plain write", ratios["save"], "", _LEAST_RATIO),
        Row("load", speeds["load"], "GB/s", note="every sha256 checked, copied into the model"),
        Row("load / plain write", ratios["load"], "", _LEAST_RATIO),
        Row("stall, first save", seconds["first copy"][0], "s", note="host memory is touched for the first time"),
        Row("stall, later saves", median(seconds["copy"] or seconds["first copy"]), "s", note="copy to host memory"),
    ]


def _manifest_rows(folder: Path, dp: int) -> list[Row]:
    """What rank 0 computes to complete a checkpoint of 175B, in its thread beside training, and ranks to read it."""
    topology = topology_of(dp)
    temporary, final = folder / "unfinished", folder / step_folder(1)
    pieces = write_indexes(temporary, topology)
    header = Header(1, {}, {}, {}, {})
    completed = _computed(lambda: complete_checkpoint(temporary, final, header, topology.world_size))
    text = (final / MANIFEST_FILE).read_text(encoding="utf-8")
    checked = _computed(lambda: read_manifest(final))
    taken = _computed(lambda: parse_manifest(text, final, checked=True))
    name = f"manifest, 175B on {topology.world_size:,} ranks"
    note = f"{pieces:,} pieces, {len(text) / 1e6:.1f} MB, {len(text) / pieces:.0f} bytes for each"
    return [
        Row(f"{name}: completed", completed, "CPU s", _MANIFEST_SECONDS[dp], at_most=True, note=note),
        Row(f"{name}: read by rank 0", checked, "CPU s", note="sha256 and every field checked"),
        Row(f"{name}: taken by others", taken, "CPU s", note="pieces are made where one is asked for"),
    ]


def _computed(action: Callable[[], object]) -> float:
    """Seconds of this thread's computing: no more can another thread wait for the interpreter."""
    started = time.thread_time()
    action()
    return time.thread_time() - started


def _convert_rows(folder: Path) -> list[Row]:
    """Peak resident memory of the tool on a model of 1 B parameters in fp32, there and back."""
    shapes = full_shapes(GPT_1B)
    sizes = [4 * prod(shape) for shape in shapes.values()]
    limit = 1.5 * max(sizes) / 1e6 + 500
    run_dir, hf, back = folder / "run", folder / "hf", folder / "back"
    _write_run(run_dir)
    rows = []
    for name, arguments in {
        "convert megalm ▶ hf": ("--from", "megalm", "--to", "hf", run_dir, hf),
        "convert hf ▶ megalm, tp2·pp2": ("--from", "hf", "--to", "megalm", hf, back, "--tp", 2, "--pp", 2),
        "convert megalm ▶ megatron, tp2·pp2": (
            "--from", "megalm", "--to", "megatron", back, folder / "megatron", "--tp", 2, "--pp", 2,
        ),
    }.items():  # fmt: skip
        seconds, megabytes = _peak_memory([sys.executable, _CONVERT, *map(str, arguments)])
        note = f"{sum(sizes) / 4e9:.2f} B parameters, largest tensor {max(sizes) / 1e6:.0f} MB, {seconds:.0f} s"
        rows.append(Row(f"{name}: peak memory", megabytes, "MB", limit, at_most=True, note=note))
    return rows


def _state(model: Model) -> Iterator[StatePiece]:
    generator = torch.Generator().manual_seed(0)
    for name, shape in full_shapes(model).items():
        for kind in _KINDS:
            values = torch.randn(prod(shape), generator=generator)
            yield StatePiece(ParameterRecord(name, ShardSpec.replicated(*shape)), kind, 0, values)


def _plain_write(named: dict[str, torch.Tensor], path: Path) -> None:
    save_file(named, path)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _save(state: list[StatePiece], folder: Path) -> None:
    pieces = [PieceToWrite.of(piece) for piece in state]
    header = Header(1, {}, {}, {}, {})
    save_checkpoint(folder, header, pieces, rank=0, world_size=1, agree=lambda error: error)


def _load(state: list[StatePiece], folder: Path) -> None:
    reader = CheckpointReader(next(folder.iterdir()))
    for piece in state:
        piece.values.copy_(reader.read_local(piece.name, piece.kind, piece.shard).view(-1))


def _forget_pages(folder: Path) -> None:
    """Have the next read come from the disk, where the system heeds the advice."""
    for file in folder.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _write_run(folder: Path) -> None:
    """A checkpoint of random weights, in the memory of one tensor."""
    generator = torch.Generator().manual_seed(0)

    def piece(name: str, shape: tuple[int, ...]) -> PieceToWrite:
        numel = prod(shape)
        load = partial(torch.randn, numel, generator=generator)
        return PieceToWrite(ParameterRecord(name, ShardSpec.replicated(*shape)), WEIGHT, 0, numel, load)

    pieces = [piece(name, shape) for name, shape in full_shapes(GPT_1B).items()]
    header = Header(1, config_to_dict(config_around(GPT_1B, name="bench")), {}, {}, {})
    save_checkpoint(folder / CHECKPOINTS_FOLDER, header, pieces, rank=0, world_size=1, agree=lambda error: error)


_MEASURED = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""A small process in between: what is forked off begins with its parent's size as its own largest."""


def _peak_memory(command: list[str]) -> tuple[float, float]:
    """Seconds that a command takes, and its largest resident memory in MB (10⁶ bytes)."""
    started = time.perf_counter()
    printed = subprocess.run([sys.executable, "-c", _MEASURED, *command], stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - started, int(printed.stdout) * 1024 / 1e6
