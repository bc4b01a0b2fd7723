"""TensorFlow's bundles: checksums, and an index that lies."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import GOLDEN, moved_out, refused
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.convert.openai.crc32c import crc32c
from megalm.convert.openai.tf_bundle import TensorBundle, _masked, find_bundle
from megalm.errors import CheckpointError

GPT2 = GOLDEN / "openai_gpt2"


def _bit_by_bit(data: bytes) -> int:
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = state >> 1 ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def test_checksums_of_the_standard() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(bytes([0xFF] * 32)) == 0x62A8AB43
    assert crc32c(bytes(range(32))) == 0x46DD794E


@given(st.binary(max_size=600))
def test_checksum_of_any_bytes(data: bytes) -> None:
    assert crc32c(data) == _bit_by_bit(data)


def test_checksum_of_many_rows() -> None:
    data = np.random.RandomState(0).bytes(4 * (1 << 14) * 5 + 3)
    assert crc32c(data) == _bit_by_bit(data)


@pytest.mark.parametrize("name", ["124M", "sharded"])
def test_every_tensor_of_tensorflows_own_saver(name: str) -> None:
    expected = np.load(GPT2 / "expected.npz")
    bundle = TensorBundle(find_bundle(GPT2 / name))
    weights = [key for key in bundle.entries if key.startswith("model/") and not key.endswith("Adam")]
    assert len(weights) == 28
    for key in weights:
        assert np.array_equal(bundle.read(key).numpy(), expected[f"{name}/{key}"])


def test_scalars_and_other_dtypes() -> None:
    bundle = TensorBundle(find_bundle(GPT2 / "sharded"))
    assert bundle.read("global_step").item() == 7
    assert bundle.read("model/wte").dtype == torch.float16


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GPT2 / "124M", tmp_path / "124M"))


def test_damaged_bytes_of_a_tensor_are_noticed(copy: Path) -> None:
    data = copy / "model.ckpt.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[-1] ^= 1
    data.write_bytes(content)
    bundle = TensorBundle(copy / "model.ckpt")
    last = max(bundle.entries, key=lambda name: bundle.entries[name].offset)
    refused(lambda: bundle.read(last), data.name, last, "checksum")


def test_damaged_bytes_of_the_index_is_noticed(copy: Path) -> None:
    index = copy / "model.ckpt.index"
    content = index.read_bytes()
    unnoticed = []
    for place in range(0, len(content), 2):
        index.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        try:
            TensorBundle(copy / "model.ckpt")
            unnoticed.append(place)
        except CheckpointError as error:
            assert str(copy) in str(error)
    # The block of blocks' own checksum, the empty block before it, and the footer's padding carry no meaning.
    assert all(place > len(content) - 100 for place in unnoticed)


def test_files_cut_off_are_refused(copy: Path) -> None:
    index, data = copy / "model.ckpt.index", copy / "model.ckpt.data-00000-of-00001"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    refused(lambda: TensorBundle(copy / "model.ckpt"), data.name, "cut off")
    data.unlink()
    refused(lambda: TensorBundle(copy / "model.ckpt"), data.name, "missing")
    data.write_bytes(content)
    whole = index.read_bytes()
    for length in range(0, len(whole), 11):
        index.write_bytes(whole[:length])
        refused(lambda: TensorBundle(copy / "model.ckpt"), index.name)


def _varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def _block(entries: list[tuple[bytes, bytes]]) -> bytes:
    body = b"".join(_varint(0) + _varint(len(k)) + _varint(len(v)) + k + v for k, v in entries)
    return body + bytes(4) + (1).to_bytes(4, "little")


def _table(entries: list[tuple[bytes, bytes]], *, compression: int = 0) -> bytes:
    """An index with right checksums, whatever it says."""
    out, handles = b"", []
    for block in (_block(entries), _block([])):
        handles.append(_varint(len(out)) + _varint(len(block)))
        tail = block + bytes([compression])
        out += tail + _masked(crc32c(tail)).to_bytes(4, "little")
    block = _block([(b"zzz", handles[0])])
    index_handle = _varint(len(out)) + _varint(len(block))
    out += block + b"\0" + _masked(crc32c(block + b"\0")).to_bytes(4, "little")
    return out + (handles[1] + index_handle).ljust(40, b"\0") + (0xDB4775248B80FB57).to_bytes(8, "little")


def _entry(**fields: int | bytes) -> bytes:
    numbers = {"dtype": 1, "shape": 2, "shard": 3, "offset": 4, "size": 5, "slices": 7}
    out = b""
    for name, value in fields.items():
        kind = 2 if isinstance(value, bytes) else 0
        out += _varint(numbers[name] << 3 | kind)
        out += _varint(len(value)) + value if isinstance(value, bytes) else _varint(value)
    return out


def _shape(*dims: int) -> bytes:
    return b"".join(b"\x12" + _varint(len(d)) + d for d in (b"\x08" + _varint(n) for n in dims))


@pytest.mark.parametrize(
    ("header", "entry", "fragment"),
    [
        (b"\x08\x01", _entry(dtype=1, shape=_shape(4), size=16), None),
        (b"\x08\x01", _entry(dtype=1, shape=_shape(5), size=16), "not a tensor"),
        (b"\x08\x01", _entry(dtype=1, shape=_shape(1 << 40, 1 << 40), size=16), "not a tensor"),
        (b"\x08\x01", _entry(dtype=1, shape=_shape((1 << 64) - 1), size=16), "no number"),
        (b"\x08\x01", _entry(dtype=1, shape=_shape(1 << 60), size=1 << 62), "cut off"),
        (b"\x08\x01", _entry(dtype=1, shape=_shape(4), offset=(1 << 62), size=16), "cut off"),
        (b"\x08\x01", _entry(dtype=1, shape=_shape(4), shard=1, size=16), "data file 1 of 1"),
        (b"\x08\x01\x10\x01", _entry(dtype=1, shape=_shape(4), size=16), "big-endian"),
        (_entry(dtype=1 << 40), _entry(dtype=1, shape=_shape(4), size=16), "data files"),
        (b"", _entry(dtype=1, shape=_shape(4), size=16), "0 data files"),
        (b"\x08\x01", b"\x0b", "wire type"),
        (b"\x08\x01", b"\x12\xff\xff\xff\xff\x0f", "are left"),
        (b"\x08\x01", b"\xff" * 12, "64 bits"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, header: bytes, entry: bytes, fragment: str | None) -> None:
    (tmp_path / "m.data-00000-of-00001").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (tmp_path / "m.index").write_bytes(_table([(b"", header), (b"w", entry)]))
    if fragment is None:
        assert TensorBundle(tmp_path / "m").read("w").tolist() == [0, 1, 2, 3]
    else:
        refused(lambda: TensorBundle(tmp_path / "m"), "m.", fragment)


def test_compressed_partitioned_and_text_tensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.data-00000-of-00001").write_bytes(bytes(16))
    good = [(b"", b"\x08\x01"), (b"w", _entry(dtype=1, shape=_shape(4), size=16))]
    (tmp_path / "m.index").write_bytes(_table(good, compression=1))
    refused(lambda: TensorBundle(tmp_path / "m"), "compressed")
    entries = [(b"p", _entry(dtype=1, shape=_shape(9), slices=b"")), (b"t", _entry(dtype=7, shape=_shape(1), size=2))]
    (tmp_path / "m.index").write_bytes(_table([good[0], *entries]))
    bundle = TensorBundle(tmp_path / "m")
    refused(lambda: bundle.read("p"), "p is stored in parts")
    refused(lambda: bundle.read("t"), "dtype 7")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_entry_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, entry: bytes) -> None:
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "m.data-00000-of-00001").write_bytes(bytes(64))
    (folder / "m.index").write_bytes(_table([(b"", b"\x08\x01"), (b"w", entry)]))
    try:
        bundle = TensorBundle(folder / "m")
        bundle.read("w")
    except CheckpointError:
        pass


def test_the_file_checkpoint_names_a_bundle_beside_it(copy: Path) -> None:
    assert find_bundle(copy) == copy / "model.ckpt"
    for name in ("../model.ckpt", "/etc/passwd", "..", ""):
        (copy / "checkpoint").write_text(f'model_checkpoint_path: "{name}"\n')
        refused(lambda: find_bundle(copy), "checkpoint: names")
    (copy / "checkpoint").unlink()
    assert find_bundle(copy) == copy / "model.ckpt"
    shutil.copy(copy / "model.ckpt.index", copy / "second.index")
    refused(lambda: find_bundle(copy), "2 files *.index")


@pytest.mark.parametrize("name", ["checkpoint", "model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_links_out_of_the_folder_are_not_followed(copy: Path, tmp_path: Path, name: str) -> None:
    moved_out(copy / name, tmp_path / "elsewhere" / "it")
    refused(lambda: TensorBundle(find_bundle(copy)), name, "outside the folder")


def test_links_of_the_download_cache_are_followed(copy: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--gpt2" / "snapshots" / "0123" / "124M"
    snapshot.parent.mkdir(parents=True)
    copy.rename(snapshot)
    for file in list(snapshot.iterdir()):
        moved_out(file, tmp_path / "models--gpt2" / "blobs" / file.name)
    assert TensorBundle(find_bundle(snapshot)).entries
