"""Preparing a corpus: nothing lost, the same bytes for any number of workers, and no half dataset."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.data.dataset import inspect_dataset
from megalm.data.prepare import Recipe, prepare, split_of
from megalm.data.shards import TokenShards
from megalm.data.tokenizer import END_OF_TEXT, Tokenizer, train_byte_level_bpe
from megalm.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[3]
TOOL = REPOSITORY / "tools" / "prepare_data.py"
TEXTS = [f"document {i}: the quick brown fox number {i * 7919} jumps over it\n" * (1 + i % 5) for i in range(40)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03d}.txt").write_text(text)
    return folder


def recipe(corpus: Path, **changes) -> Recipe:
    settings = {"corpus": "text", "inputs": (str(corpus),), "tokenizer_vocab": 300, "val_fraction": 0.2}
    return Recipe(**{**settings, "chunk_tokens": 64, "chunks_per_shard": 5, **changes})


def run(corpus: Path, out: Path, workers: int = 1, **changes):
    return prepare(recipe(corpus, **changes), out, workers=workers, overwrite=False, progress=lambda *_: None)


def digest(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "recipe.json"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def texts_of(out: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    shards = TokenShards(out / split, 1)
    ids = [int(shards.sequence(0)[0][0])] + [int(shards.sequence(i)[0][1]) for i in range(len(shards))]
    documents, current = [], []
    for token in ids:
        if token == tokenizer.eos_id:
            documents.append(tokenizer.decode(current))
            current = []
        else:
            current.append(token)
    assert not current, "every document ends with end-of-text"
    return documents


def test_nothing_is_lost_and_documents_stay_whole(corpus: Path, tmp_path: Path) -> None:
    counts = run(corpus, tmp_path / "d")
    assert counts.documents == len(TEXTS)
    for split in ("train", "val"):
        assert texts_of(tmp_path / "d", split) == [t for t in TEXTS if split_of(t, 0.2) == split]


def test_any_number_of_workers_writes_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        run(corpus, tmp_path / str(workers), workers)
    assert digest(tmp_path / "1") == digest(tmp_path / "3")


def test_a_document_keeps_its_side_when_the_corpus_grows(corpus: Path) -> None:
    sides = [split_of(text, 0.3) for text in TEXTS]
    assert set(sides) == {"train", "val"}
    assert [split_of(text, 0.3) for text in reversed(TEXTS)] == sides[::-1]
    assert all(split_of(t, 0.5) == "val" for t, side in zip(TEXTS, sides, strict=True) if side == "val")


def test_empty_and_undecodable_documents_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03d}").write_text(text)
    (folder / "empty").write_text(" \n")
    (folder / "latin").write_bytes("café".encode("latin-1"))
    (folder / "replacement").write_text("a real \ufffd stays")
    counts = run(folder, tmp_path / "d")
    assert (counts.empty, counts.undecodable, counts.documents) == (1, 1, len(TEXTS) + 2)


def test_a_second_time_it_is_up_to_date_and_a_change_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    assert run(corpus, out) is not None
    before = digest(out)
    assert run(corpus, out) is None
    with pytest.raises(DataError, match="--overwrite replaces it"):
        run(corpus, out, val_fraction=0.4)
    assert digest(out) == before
    prepare(recipe(corpus, val_fraction=0.4), out, workers=1, overwrite=True, progress=lambda *_: None)
    assert digest(out) != before


def test_an_empty_split_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of the 40 documents falls into val"):
        run(corpus, tmp_path / "d", val_fraction=1e-9)
    assert not (tmp_path / "d").exists()


def test_killed_half_way_it_leaves_no_dataset_and_can_be_run_again(tmp_path: Path) -> None:
    out = tmp_path / "d"
    command = [sys.executable, TOOL, "--corpus", "stdlib", "--tokenizer-vocab", "2000", "--out", out, "--workers", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / ".d.partial" / "train").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    with pytest.raises(DataError, match=r"no such folder \(.*was left by .* cut off\); prepare one"):
        inspect_dataset(out)
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0
    assert not (tmp_path / ".d.partial").exists()
    assert inspect_dataset(out).vocab_size == 2000


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--corpus", "text", "--out", "x"], 2, "either --tokenizer"),
        (["--corpus", "text", "--input", "/nowhere", "--tokenizer-vocab", "300", "--out", "x"], 3, "no such file"),
        (["--corpus", "text", "--tokenizer-vocab", "300", "--out", "x"], 3, "needs --input"),
        (["--corpus", "stdlib", "--tokenizer-vocab", "10", "--out", "x"], 2, "must be at least 257"),
        (["--corpus", "stdlib", "--tokenizer", "/nowhere.json", "--out", "x"], 3, "cannot be read"),
        (["--corpus", "stdlib", "--tokenizer-vocab", "300", "--out", "x", "--val-fraction", "2"], 2, "between 0 and 1"),
        (["--verify", "/nowhere"], 3, "no dataset here"),
    ],
)
def test_mistakes_get_one_line_and_an_exit_code(arguments, code, message, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, TOOL, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == (2 if arguments[0] == "--verify" else 1), "one line, or one per split"
    assert list(tmp_path.iterdir()) == [] or code == 3


def test_verify_names_a_corrupt_chunk(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    run(corpus, out)
    shard = out / "val" / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    data[650] ^= 1
    shard.write_bytes(data)
    result = subprocess.run([sys.executable, TOOL, "--verify", out], capture_output=True, text=True, check=False)
    assert result.returncode == 3
    assert "val/shard-000000.tar chunk 0" in result.stderr


@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text.encode("utf-8", "replace").decode()


def test_text_that_spells_a_special_token_stays_text() -> None:
    ids = TOKENIZER.encode(f"a {END_OF_TEXT} b")
    assert TOKENIZER.eos_id not in ids
    assert TOKENIZER.decode(ids) == f"a {END_OF_TEXT} b"


def test_training_is_deterministic() -> None:
    assert train_byte_level_bpe(TEXTS, 300).sha256 == TOKENIZER.sha256
    assert train_byte_level_bpe(TEXTS[:20], 300).sha256 != TOKENIZER.sha256


TOKENIZER = train_byte_level_bpe(TEXTS, 300)


def test_inspecting_needs_no_torch_and_finds_a_foreign_tokenizer(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    run(corpus, out)
    program = (
        f"import sys; from megalm.data.dataset import inspect_dataset; inspect_dataset({str(out)!r}); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    (out / "tokenizer.json").write_text(train_byte_level_bpe(TEXTS[:9], 290).definition)
    with pytest.raises(DataError, match="is not the tokenizer that made these tokens"):
        inspect_dataset(out)
