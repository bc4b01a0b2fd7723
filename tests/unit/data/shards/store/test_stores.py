"""Where shards come from: the same bytes from a folder, a web server or a command, through every fault."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megalm.data.shards.read import TokenShards
from megalm.data.shards.store import Cache, MissingFile, open_store
from megalm.data.shards.store.http import HttpStore
from megalm.data.shards.store.local import map_file
from megalm.data.shards.store.pipe import PipeStore
from megalm.data.shards.write import ShardWriter
from megalm.errors import DataError
from tests.web_server import Server, serve

DATA = bytes(range(256)) * 8


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "www"
    folder.mkdir()
    (folder / "file.bin").write_bytes(DATA)
    with serve(folder) as server:
        yield server


def test_ranges_of_a_file(server: Server) -> None:
    file = server.store.open("file.bin", len(DATA))
    assert file.view(10, 300).tobytes() == DATA[10:310]
    assert file.view(len(DATA) - 1, 1).tobytes() == DATA[-1:]
    assert server.requests[0] == ("HEAD", "/file.bin", None)
    assert server.requests[1:] == [("GET", "/file.bin", "bytes=10-309"), ("GET", "/file.bin", "bytes=2047-2047")]
    assert server.store.read("file.bin") == DATA
    assert server.store.size("file.bin") == len(DATA)


@pytest.mark.parametrize("faults", [["503", "503"], ["429", "500", "502"], ["cut", "cut"], ["short"]])
def test_what_passes_is_tried_again(server: Server, faults: list[str]) -> None:
    file = server.store.open("file.bin", len(DATA))
    server.faults = list(faults)
    assert file.view(0, 1000).tobytes() == DATA[:1000]
    assert server.faults == []


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (["503"] * 5, "the server answers with status 503"),
        (["cut"] * 5, "no answer after 5 tries"),
        (["no ranges"], r"the server ignores ranges .* use a server that answers them \(206\), or pipe:curl"),
        (["403"], r"the server refuses it \(status 403\)"),
        (["404"], r"the server says it is not there \(status 404\)"),
        (["short"] * 5, "asked for bytes 0 to 999, the server sent 500 bytes .* 5 times"),
    ],
)
def test_what_stays_is_an_error_that_names_the_address(server: Server, faults: list[str], message: str) -> None:
    file = server.store.open("file.bin", len(DATA))
    server.faults = list(faults)
    with pytest.raises(DataError, match=rf"{server.address}/file\.bin: {message}"):
        file.view(0, 1000)


def test_a_file_that_shrank_or_is_gone(server: Server) -> None:
    with pytest.raises(DataError, match="2048 bytes, the index says 5000: cut short"):
        server.store.open("file.bin", 5000)
    file = server.store.open("file.bin", len(DATA))
    (server.folder / "file.bin").write_bytes(DATA[:100])
    with pytest.raises(DataError, match="ends before byte 1999: cut short"):
        file.view(1000, 1000)
    with pytest.raises(MissingFile, match="not there"):
        server.store.read("other")


def test_a_server_that_is_not_there_is_one_line() -> None:
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/data/a: no answer after 5 tries"):
        HttpStore("http://127.0.0.1:9/data", pause_seconds=0.01).read("a")


def test_a_password_is_sent_and_never_shown(server: Server) -> None:
    store = HttpStore(f"http://me:secret@127.0.0.1:{server.port}/", pause_seconds=0.01)
    assert store.read("file.bin") == DATA
    assert server.authorisation == ["Basic bWU6c2VjcmV0"]
    server.faults = ["403"]
    with pytest.raises(DataError) as error:
        store.read("file.bin")
    assert "secret" not in f"{error.value}{store.location}{store.path_of('x')}{store.below('y').location}".replace(
        "https://USER:PASSWORD", ""
    )


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    folder = tmp_path / "www" / "train"
    writer = ShardWriter(folder, tokenizer_sha256="x", vocab_size=500, eos_id=0, chunk_tokens=32, chunks_per_shard=4)
    writer.add(np.random.default_rng(0).integers(0, 500, 1000), [1000], ["a"])
    writer.close()
    return folder


def rows(shards: TokenShards) -> list[list[int]]:
    tokens = np.empty((len(shards), 17), dtype=np.int64)
    shards.read(np.arange(len(shards)), tokens, None)
    return tokens.tolist()


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_every_store_reads_the_same_dataset_and_finds_the_same_fault(server, dataset: Path, tmp_path: Path) -> None:
    cache = Cache(str(tmp_path / "cache"))
    stores = [
        open_store(dataset),
        server.store.below("train"),
        open_store(f"pipe:cat {tmp_path}/www/{{file}}", cache).below("train"),
    ]
    want = rows(TokenShards(stores[0], 16))
    for store in stores[1:]:
        assert rows(TokenShards(pickle.loads(pickle.dumps(store)), 16)) == want
    flip(dataset / "shard-000001.tar", 700)
    stores[2] = open_store(f"pipe:cat  {tmp_path}/www/{{file}}", cache).below("train")
    for store in stores:
        with pytest.raises(DataError, match=r"shard-000001\.tar chunk 0 .*corrupt, the checksum differs"):
            rows(TokenShards(store, 16))


def pipe(command: str, folder: Path, max_gib: float = 1.0) -> PipeStore:
    return open_store(f"pipe:{command}", Cache(str(folder / "cache"), max_gib))


def test_names_are_quoted_for_the_shell(tmp_path: Path) -> None:
    (tmp_path / "it's a $HOME file").write_bytes(b"x")
    assert pipe(f"cat {tmp_path}/{{file}}", tmp_path).read("it's a $HOME file") == b"x"


def test_a_command_that_fails_says_so(tmp_path: Path) -> None:
    store = pipe("echo no credentials for {file} >&2; exit 7", tmp_path)
    with pytest.raises(DataError, match=r"failed with exit code 7: no credentials for train/index\.json"):
        store.below("train").read("index.json")
    with pytest.raises(DataError, match="3 bytes, the index says 10: cut short"):
        pipe("printf abc; : {file}", tmp_path).open("shard", 10)
    assert not list((tmp_path / "cache").glob("*.tmp"))


def test_a_shard_is_fetched_once_and_again_when_it_was_tampered_with(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(DATA)
    store = pipe(f"echo once >> {tmp_path}/log; cat {tmp_path}/{{file}}", tmp_path)
    for _ in range(3):
        assert store.open("shard", len(DATA)).view(5, 10).tobytes() == DATA[5:15]
    assert (tmp_path / "log").read_text().count("once") == 1
    (cached,) = (tmp_path / "cache").glob("*.shard")
    cached.write_bytes(b"short")
    assert store.open("shard", len(DATA)).view(0, 4).tobytes() == DATA[:4]
    assert (tmp_path / "log").read_text().count("once") == 2


def open_shard(store: PipeStore) -> None:
    assert store.open("shard", len(DATA)).view(0, 4).tobytes() == DATA[:4]


def test_ranks_of_a_machine_fetch_a_shard_once(tmp_path: Path) -> None:
    (tmp_path / "shard").write_bytes(DATA)
    store = pipe(f"echo once >> {tmp_path}/log; sleep 0.5; cat {tmp_path}/{{file}}", tmp_path)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=open_shard, args=(store,)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
    assert (tmp_path / "log").read_text().count("once") == 1


def test_a_shard_that_another_run_removes_to_make_room_is_fetched_again(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "shard").write_bytes(b"12345")
    store = pipe(f"cat {tmp_path}/{{file}}", tmp_path)
    mapped, removed = [], []

    def remove_first(path: Path):
        mapped.append(path)
        if len(mapped) <= 2:
            path.unlink()
            removed.append(path)
        return map_file(path)

    monkeypatch.setattr("megalm.data.shards.store.pipe.map_file", remove_first)
    assert store.open("shard", 5).view(0, 5).tobytes() == b"12345"
    assert len(removed) == 2

    monkeypatch.setattr("megalm.data.shards.store.pipe.os.utime", lambda path: path.unlink())
    with pytest.raises(DataError, match=r"was removed from .*data\.cache_gib"):
        store.open("shard", 5)


def test_the_cache_stays_within_its_bound(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name).write_bytes(name.encode() * 1000)
    store = pipe(f"echo {{file}} >> {tmp_path}/log; cat {tmp_path}/{{file}}", tmp_path, max_gib=2500 / 2**30)
    first = store.open("a", 1000)
    for name in "bacd":
        store.open(name, 1000)
    assert (tmp_path / "log").read_text().split() == ["a", "b", "c", "d"]
    held = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.shard"))
    assert held <= 2500
    assert first.view(0, 3).tobytes() == b"aaa", "a deleted file that is mapped can still be read"
    with pytest.raises(DataError, match=r"data\.cache_gib=2\.32831e-06: .* alone is .*give the cache more"):
        store.open("e", 5000)
