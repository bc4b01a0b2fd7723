"""Safetensors files that are written tensor by tensor: what the library reads, and what a failing disk does."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalm.checkpoint import tensor_file
from megalm.checkpoint.tensor_file import TensorFileWriter, TensorSpec

TENSORS = {"a": torch.arange(1000.0), "b": torch.ones(3, 5, dtype=torch.bfloat16), "c": torch.zeros(0)}
SPECS = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files begin to be flushed after 512 bytes, in chunks of 256; which threads flushed."""
    threads: list[str] = []
    fsync = os.fsync

    def recorded(descriptor: int) -> None:
        threads.append(threading.current_thread().name.partition("_")[0])
        fsync(descriptor)

    monkeypatch.setattr(tensor_file, "_FLUSH_BYTES", 512)
    monkeypatch.setattr(tensor_file, "_CHUNK_BYTES", 256)
    monkeypatch.setattr(os, "fsync", recorded)
    return threads


def _write(path: Path) -> None:
    with TensorFileWriter(path, SPECS, metadata={"format": "pt"}) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)


def test_the_library_reads_what_was_written_and_flushed_on_the_way(tmp_path: Path, flushed: list[str]) -> None:
    _write(tmp_path / "x")
    read = load_file(tmp_path / "x")
    assert {name: (t.dtype, t.shape) for name, t in read.items()} == {n: (t.dtype, t.shape) for n, t in TENSORS.items()}
    assert all(torch.equal(read[name], tensor) for name, tensor in TENSORS.items())
    assert flushed[0] == "flush" and flushed[-1] == "MainThread", "behind the writing, and all of it in the end"


@pytest.mark.parametrize("flush_bytes", [512, 4000])  # an early flush fails, or the last one, which no later one finds
def test_what_the_disk_says_behind_the_writing_is_raised_with_the_files_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flushed: list[str], flush_bytes: int
) -> None:
    """The system tells of it once: a flush after it would find nothing wrong."""
    told: list[bool] = []

    def full_once(_: int) -> None:
        if not told:
            told.append(True)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensor_file, "_FLUSH_BYTES", flush_bytes)
    monkeypatch.setattr(os, "fsync", full_once)
    with pytest.raises(OSError, match="No space left") as caught:
        _write(tmp_path / "x")
    assert caught.value.filename == str(tmp_path / "x")


def test_a_file_given_up_is_closed_after_its_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flushed: list[str]
) -> None:
    """Its descriptor's number may be another file's at once."""
    begun, may_end, done = threading.Event(), threading.Event(), []

    def slow(descriptor: int) -> None:
        begun.set()
        assert may_end.wait(30)
        done.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", slow)
    threading.Timer(0.2, may_end.set).start()
    with (
        pytest.raises(ZeroDivisionError),
        TensorFileWriter(tmp_path / "x", SPECS) as writer,
    ):
        writer.write("a", TENSORS["a"])
        assert begun.wait(30)
        raise ZeroDivisionError
    assert done == [(tmp_path / "x").stat().st_ino]


def test_tensors_come_as_they_were_announced(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"x: b torch.bfloat16 \[3, 5\] comes where a .* is due"),
        TensorFileWriter(tmp_path / "x", SPECS) as writer,
    ):
        writer.write("b", TENSORS["b"])
    with (
        pytest.raises(ValueError, match="2 tensors were announced and not written"),
        TensorFileWriter(tmp_path / "y", SPECS) as writer,
    ):
        writer.write("a", TENSORS["a"])
