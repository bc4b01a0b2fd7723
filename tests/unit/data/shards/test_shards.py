"""Token shards: the same bytes from any feeding, every label once, and every fault named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.shards.corruption import find_corruption
from megalm.data.shards.index import INDEX_FILE, MEMBER_HEADER_BYTES, read_index, signed
from megalm.data.shards.read import TokenShards, iterate_with_webdataset
from megalm.data.shards.store import LocalStore
from megalm.data.shards.write import ShardWriter
from megalm.errors import DataError

CHUNK = 12
VOCAB = 500


def write(
    folder: Path,
    tokens: np.ndarray,
    cuts: list[int] | None = None,
    vocab_size: int = VOCAB,
    mask: np.ndarray | None = None,
) -> Path:
    writer = ShardWriter(
        folder,
        tokenizer_sha256="ab",
        vocab_size=vocab_size,
        eos_id=0,
        chunk_tokens=CHUNK,
        chunks_per_shard=3,
        masked=mask is not None,
    )
    start = 0
    for part in np.split(tokens, sorted(cuts or [])):
        part_mask = None if mask is None else mask[start : start + part.size]
        writer.add(part, [part.size], [f"document at {start}"], part_mask)
        start += part.size
    writer.close()
    return folder


def faults_of(folder: Path) -> list[str]:
    return list(find_corruption(LocalStore(folder)))


def row(shards: TokenShards, sequence: int) -> tuple[np.ndarray, int]:
    tokens = np.empty((1, shards.sequence_length + 1), dtype=np.int64)
    numbers = np.array([sequence])
    shards.read(numbers, tokens, None)
    return tokens[0], int(shards.valid(numbers)[0])


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
        tokens_of_row, valid = row(shards, i)
        assert tokens_of_row.shape == (length + 1,)
        inputs += tokens_of_row[:-1][:valid].tolist()
        labels += tokens_of_row[1:][:valid].tolist()
    assert inputs == tokens[:-1].tolist()
    assert labels == tokens[1:].tolist()


def test_the_bytes_do_not_depend_on_how_tokens_were_fed(tmp_path: Path) -> None:
    tokens = some_tokens(100)
    first, second = write(tmp_path / "a", tokens), write(tmp_path / "b", tokens, [1, 13, 50, 51, 99])
    for path in sorted(first.glob("shard*.tar")):
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
    assert row(shards, 0)[0][1] == vocab_size - 1


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
    assert faults_of(dataset) == []


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def test_a_flipped_bit_names_file_chunk_and_bytes(dataset: Path) -> None:
    stride = read_index(dataset).stride
    start = stride + MEMBER_HEADER_BYTES
    flip(dataset / "shard-000001.tar", start + 3)
    (fault,) = faults_of(dataset)
    assert f"shard-000001.tar chunk 1 (bytes {start} to {start + 26})" in fault
    shards = TokenShards(dataset, CHUNK)
    row(shards, 3)
    with pytest.raises(DataError, match=r"shard-000001\.tar chunk 1 "):
        row(shards, 4)


@pytest.mark.parametrize("byte", [5, 512 + 70], ids=["tar header", "array header"])
def test_a_changed_header_is_found_to_the_byte(dataset: Path, byte: int) -> None:
    stride = read_index(dataset).stride
    flip(dataset / "shard-000000.tar", 2 * stride + byte)
    (fault,) = faults_of(dataset)
    assert f"shard-000000.tar chunk 2 (byte {2 * stride + byte}): the header of its tokens was changed" in fault


def test_changed_padding_is_found_by_the_shards_hash(dataset: Path) -> None:
    flip(dataset / "shard-000000.tar", read_index(dataset).stride - 1)
    (fault,) = faults_of(dataset)
    assert "shard-000000.tar: sha256 differs, though no chunk does" in fault


def test_every_single_byte_of_a_dataset_is_checked(dataset: Path) -> None:
    """Whatever byte of whatever file is flipped, verifying names that file."""
    for path in sorted(dataset.iterdir()):
        data = path.read_bytes()
        for offset in range(0, len(data), max(len(data) // 40, 1)):
            flip(path, offset)
            assert any(path.name in fault for fault in faults_of(dataset)), f"{path.name} byte {offset}"
            path.write_bytes(data)
    assert faults_of(dataset) == []


@pytest.mark.parametrize("members", [None, 1], ids=["anywhere", "at a member boundary"])
def test_a_truncated_shard_is_found_at_once(dataset: Path, members: int | None) -> None:
    path = dataset / "shard-000000.tar"
    keep = 700 if members is None else members * read_index(dataset).stride
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"shard-000000\.tar: {keep} bytes, index\.json says"):
        TokenShards(dataset, CHUNK)
    (fault,) = faults_of(dataset)
    first = members or 0
    stride = read_index(dataset).stride
    assert f"shard-000000.tar: {keep} bytes" in fault
    assert f"cut short at byte {keep}" in fault
    assert f"; lost: {path} chunks {first} to 2 (bytes {first * stride} to {3 * stride})" in fault


def test_missing_and_foreign_files_are_named(dataset: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other", some_tokens(97))
    (dataset / "shard-000001.tar.idx.json").write_bytes((other / "shard-000001.tar.idx.json").read_bytes())
    (dataset / "shard-000002.tar").unlink()
    stride = read_index(dataset).stride
    foreign, missing = faults_of(dataset)
    assert "shard-000001.tar.idx.json: does not belong to" in foreign
    assert f"shard-000001.tar chunks 0 to 2 (bytes 0 to {3 * stride}) cannot be checked" in foreign
    assert "shard-000002.tar: missing" in missing
    assert f"chunks 0 to 1 (bytes 0 to {2 * stride})" in missing
    with pytest.raises(DataError, match=r"shard-000002\.tar: missing"):
        TokenShards(dataset, CHUNK)


def edit_index(dataset: Path, **changes) -> None:
    path = dataset / INDEX_FILE
    path.write_text(json.dumps(signed({**json.loads(path.read_text()), **changes})))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 1}, "format version 1; this megalm reads version 2: prepare the dataset again"),
        ({"format": "other"}, "not the index of a megalm-tokens dataset"),
        ({"tokens": 10**9}, "1000000000 tokens in 3 shards of 3 chunks of 12 tokens"),
        ({"stride": 1}, "do not fit together"),
        ({"checks": None}, "incomplete or damaged"),
        ({"masked": 1}, "masked is 1, not true or false"),
        ({"packed_length": 5}, "packed_length 5 does not divide 12"),
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


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 120), length=st.sampled_from([3, 4, 12]))
def test_a_loss_mask_lies_beside_its_tokens(count: int, length: int, tmp_path_factory) -> None:
    tokens = some_tokens(count)
    mask = (tokens % 3 == 0).astype(np.uint8)
    folder = write(tmp_path_factory.mktemp("m"), tokens, [count // 2], mask=mask)
    shards = TokenShards(folder, length)
    assert shards.index.loss_tokens == mask.sum()
    numbers = np.arange(len(shards))
    rows = np.empty((len(shards), length + 1), dtype=np.int64)
    read = np.empty((len(shards), length + 1), dtype=np.uint8)
    shards.read(numbers, rows, read)
    flat = np.concatenate([read[i, 1:][: int(v)] for i, v in enumerate(shards.valid(numbers))])
    assert flat.tolist() == mask[1:].tolist()
    assert faults_of(folder) == []


def test_a_flipped_bit_of_a_mask_is_found(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", some_tokens(60), mask=np.ones(60, dtype=np.uint8))
    index = read_index(folder)
    flip(folder / "shard-000000.tar", index.stride + index.mask_offset + 2)
    (fault,) = faults_of(folder)
    assert "shard-000000.tar chunk 1 " in fault
    with pytest.raises(DataError, match="checksum differs"):
        row(TokenShards(folder, CHUNK), 1)


def test_documents_are_named_beside_the_shard_in_which_they_begin(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", some_tokens(90), [10, 36, 37, 80])
    lines = [
        [json.loads(line) for line in (folder / f"shard-{n:06d}.documents.jsonl").read_text().splitlines()]
        for n in range(3)
    ]
    assert [[line["start"] for line in shard] for shard in lines] == [[0, 10], [36, 37], [80]]
    assert lines[1][1] == {"start": 37, "tokens": 43, "name": "document at 37"}
    index = read_index(folder)
    assert (index.documents, index.tokens) == (5, 90)


def test_a_packed_dataset_has_one_length(tmp_path: Path) -> None:
    writer = ShardWriter(
        tmp_path / "p",
        tokenizer_sha256="ab",
        vocab_size=VOCAB,
        eos_id=0,
        chunk_tokens=CHUNK,
        chunks_per_shard=3,
        masked=True,
        packed_length=6,
    )
    writer.add(some_tokens(30), [30], ["a"])
    writer.close()
    TokenShards(tmp_path / "p", 6)
    with pytest.raises(DataError, match=r"model\.sequence_length=3: .* was packed for 6"):
        TokenShards(tmp_path / "p", 3)


def test_many_shards_take_few_open_files(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megalm.data.shards.read._OPEN_SHARDS", 2)
    tokens = some_tokens(400)
    shards = TokenShards(write(tmp_path / "d", tokens), CHUNK)
    for i in [*range(len(shards)), 0, 5, 1]:
        read, valid = row(shards, i)
        assert read[:valid].tolist() == tokens[i * CHUNK : i * CHUNK + valid].tolist()


def test_the_index_of_a_great_dataset_is_small() -> None:
    """One hash a shard: 223 thousand shards of 8,192 chunks are 15 trillion tokens."""
    from megalm.data.shards.index import Index

    index = Index("uint32", 8192, 8192, False, 0, "ab", 100_000, 0, 1, 15 * 10**12, 1, ("0" * 64,) * 223_518)
    assert index.num_shards == 223_518
    assert index.shard(223_517).chunks == index.num_chunks - 223_517 * 8192
    assert len(index.to_json()) < 20_000_000
