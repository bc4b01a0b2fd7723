"""Token shards: the same bytes from any feeding, every label once, and every fault named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.index import INDEX_FILE, MEMBER_HEADER_BYTES, read_index
from megalm.data.shards import ShardWriter, TokenShards, find_corruption, iterate_with_webdataset
from megalm.errors import DataError

CHUNK = 12
VOCAB = 500


def write(folder: Path, tokens: np.ndarray, cuts: list[int] | None = None, vocab_size: int = VOCAB) -> Path:
    writer = ShardWriter(
        folder, tokenizer_sha256="ab", vocab_size=vocab_size, eos_id=0, chunk_tokens=CHUNK, chunks_per_shard=3
    )
    for part in np.split(tokens, sorted(cuts or [])):
        writer.add(part, documents=1)
    writer.close()
    return folder


def some_tokens(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, VOCAB, count)


@settings(max_examples=40, deadline=None)
@given(count=st.integers(2, 120), cuts=st.lists(st.integers(0, 120), max_size=6), length=st.sampled_from([1, 3, 4, 12]))
def test_every_label_is_read_once_whatever_the_total(count, cuts, length, tmp_path_factory) -> None:
    tokens = some_tokens(count)
    folder = write(tmp_path_factory.mktemp("s"), tokens, [c for c in cuts if c < count])
    shards = TokenShards(folder, length)
    assert shards.index.tokens == count
    inputs, labels = [], []
    for i in range(len(shards)):
        row, valid = shards.sequence(i)
        assert row.shape == (length + 1,)
        inputs += row[:-1][:valid].tolist()
        labels += row[1:][:valid].tolist()
    assert inputs == tokens[:-1].tolist()
    assert labels == tokens[1:].tolist()


def test_the_bytes_do_not_depend_on_how_tokens_were_fed(tmp_path: Path) -> None:
    tokens = some_tokens(100)
    first, second = write(tmp_path / "a", tokens), write(tmp_path / "b", tokens, [1, 13, 50, 51, 99])
    for path in sorted(first.glob("shard*")):
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_stock_webdataset_reads_the_same_chunks(tmp_path: Path) -> None:
    tokens = some_tokens(8 * CHUNK + 1)
    chunks = list(iterate_with_webdataset(write(tmp_path / "d", tokens)))
    assert len(chunks) == 8
    for i, chunk in enumerate(chunks):
        assert chunk.tolist() == tokens[i * CHUNK : (i + 1) * CHUNK + 1].tolist()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(500, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")])
def test_the_smallest_dtype_that_holds_the_vocabulary(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    tokens = np.array([0, vocab_size - 1, 5, 7])
    shards = TokenShards(write(tmp_path / "d", tokens, vocab_size=vocab_size), 4)
    assert shards.index.dtype == dtype
    assert shards.sequence(0)[0][1] == vocab_size - 1


def test_a_token_outside_the_vocabulary_is_refused_when_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="token id 500 is outside the vocabulary of 500"):
        write(tmp_path / "d", np.array([1, 500]))


def test_too_few_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="1 tokens are too few"):
        write(tmp_path / "d", np.array([1]))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write(tmp_path / "split", some_tokens(8 * CHUNK))


def test_a_sound_dataset_has_no_fault(dataset: Path) -> None:
    assert list(find_corruption(dataset)) == []


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def test_a_flipped_bit_names_file_chunk_and_bytes(dataset: Path) -> None:
    stride = read_index(dataset).stride
    start = stride + MEMBER_HEADER_BYTES
    flip(dataset / "shard-000001.tar", start + 3)
    (fault,) = find_corruption(dataset)
    assert f"shard-000001.tar chunk 1 (bytes {start} to {start + 26})" in fault
    shards = TokenShards(dataset, CHUNK)
    shards.sequence(3)
    with pytest.raises(DataError, match=r"shard-000001\.tar chunk 1 "):
        shards.sequence(4)


def test_a_changed_header_is_found_by_the_shards_hash(dataset: Path) -> None:
    flip(dataset / "shard-000000.tar", 5)
    (fault,) = find_corruption(dataset)
    assert "shard-000000.tar: sha256 differs" in fault


@pytest.mark.parametrize("members", [None, 1], ids=["anywhere", "at a member boundary"])
def test_a_truncated_shard_is_found_at_once(dataset: Path, members: int | None) -> None:
    path = dataset / "shard-000000.tar"
    keep = 700 if members is None else members * read_index(dataset).stride
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"shard-000000\.tar: {keep} bytes, index\.json says"):
        TokenShards(dataset, CHUNK)
    assert any("shard-000000.tar" in fault and f"{keep} bytes" in fault for fault in find_corruption(dataset))


def test_missing_and_foreign_files_are_named(dataset: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", some_tokens(97))
    (dataset / "shard-000001.tar.idx.json").write_bytes((other / "shard-000001.tar.idx.json").read_bytes())
    (dataset / "shard-000002.tar").unlink()
    faults = "\n".join(find_corruption(dataset))
    assert "shard-000001.tar.idx.json: does not belong to" in faults
    assert "shard-000002.tar: cannot be read" in faults
    with pytest.raises(DataError, match=r"shard-000002\.tar: missing"):
        TokenShards(dataset, CHUNK)


def edit_index(dataset: Path, **changes) -> None:
    path = dataset / INDEX_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "format version 2; this megalm reads version 1"),
        ({"format": "other"}, "not the index of a megalm-tokens dataset"),
        ({"tokens": 10**9}, "1000000000 tokens in 8 chunks of 12"),
        ({"stride": 1}, "do not fit together"),
        ({"shards": [{"name": "../x", "chunks": 8, "bytes": 1, "sha256": "", "checks_sha256": ""}]}, "leaves the"),
        ({"shards": [{"name": "x"}]}, "incomplete or damaged"),
    ],
)
def test_an_index_that_does_not_fit_is_refused(dataset: Path, changes, message: str) -> None:
    edit_index(dataset, **changes)
    with pytest.raises(DataError, match=message):
        TokenShards(dataset, CHUNK)


def test_no_index_means_no_dataset(dataset: Path) -> None:
    (dataset / INDEX_FILE).unlink()
    with pytest.raises(DataError, match=r"half-written: it has shards but no index\.json"):
        read_index(dataset)


def test_a_length_that_does_not_divide_the_chunk_is_refused(dataset: Path) -> None:
    with pytest.raises(DataError, match=r"model\.sequence_length=5: does not divide the 12 tokens"):
        TokenShards(dataset, 5)
