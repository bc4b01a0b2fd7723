"""Preparing a corpus: nothing lost, the same bytes for any number of workers, and no half dataset."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megalm.data.prepare.blocks import is_validation
from megalm.data.prepare.clean import Cleaning
from megalm.data.prepare.corpora import CorpusOptions
from megalm.data.prepare.executors import local_workers
from megalm.data.prepare.progress import summary_lines
from megalm.data.prepare.recipe import Recipe
from megalm.data.prepare.run import prepare
from megalm.data.shards.dataset import inspect_dataset
from megalm.data.shards.read import TokenShards
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.data.tokenization.training import train_byte_level_bpe
from megalm.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[4]
TOOL = REPOSITORY / "tools" / "prepare_data.py"
TEXTS = [f"document {i}: the quick brown fox number {i * 7919} jumps over it\n" * (1 + i % 5) for i in range(40)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03d}.txt").write_text(text)
    return folder


def recipe(corpus: Path, **changes) -> Recipe:
    options = CorpusOptions((str(corpus),))
    settings = {
        "corpus": changes.pop("corpus_name", "text"),
        "options": options,
        "tokenizer_vocab": 300,
        "val_fraction": 0.2,
    }
    return Recipe(**{**settings, "chunk_tokens": 64, "chunks_per_shard": 5, **changes})


def run(corpus: Path, out: Path, workers: int = 1, *, overwrite: bool = False, progress=lambda *_: None, **changes):
    with local_workers(workers) as pool:
        return prepare(
            recipe(corpus, **changes), out, workers=pool, overwrite=overwrite, progress=progress, command="a test"
        )


def test_the_license_of_the_texts_is_in_both_cards(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "stated", license="CC BY-SA 4.0")
    run(corpus, tmp_path / "unstated")
    assert "License of the texts: CC BY-SA 4.0." in (tmp_path / "stated" / "data_card.md").read_text()
    assert "License" not in (tmp_path / "unstated" / "data_card.md").read_text()
    card = json.loads((tmp_path / "stated" / "data_card.json").read_text())
    assert card["recipe"]["license"] == "CC BY-SA 4.0"


def side(text: str, val_fraction: float) -> str:
    return "val" if is_validation(text, val_fraction) else "train"


def tokens_of(out: Path, split: str) -> list[int]:
    shards = TokenShards(out / split, 1)
    rows = np.empty((len(shards), 2), dtype=np.int64)
    shards.read(np.arange(len(shards)), rows, None)
    return [int(rows[0, 0]), *rows[:, 1].tolist()]


def digest(folder: Path) -> dict[str, str]:
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def texts_of(out: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.load(out / "tokenizer.json")
    documents, current = [], []
    for token in tokens_of(out, split):
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
        assert texts_of(tmp_path / "d", split) == [t for t in TEXTS if side(t, 0.2) == split]


def test_any_number_of_workers_writes_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        run(corpus, tmp_path / str(workers), workers)
    assert digest(tmp_path / "1") == digest(tmp_path / "3")


def test_a_document_keeps_its_side_when_the_corpus_grows(corpus: Path) -> None:
    sides = [side(text, 0.3) for text in TEXTS]
    assert set(sides) == {"train", "val"}
    assert all(side(t, 0.5) == "val" for t, now in zip(TEXTS, sides, strict=True) if now == "val")


def test_empty_and_undecodable_documents_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03d}").write_text(text)
    (folder / "empty").write_text(" \n")
    (folder / "latin").write_bytes("café".encode("latin-1"))
    (folder / "replacement").write_text("a real \ufffd stays")
    counts = run(folder, tmp_path / "d")
    assert counts.removed == {"empty": 1}
    assert counts.examples == {"empty": [str(folder / "empty")]}
    assert counts.files_left_out.to_dict() == {
        "not UTF-8": {
            "files": 1,
            "bytes": 4,
            "examples": [f"{folder / 'latin'} (byte 3 is 0xe9; --encoding names another, such as latin-1 or cp1252)"],
        }
    }
    assert counts.notes == {}
    assert (counts.read, counts.documents, counts.files) == (len(TEXTS) + 2, len(TEXTS) + 1, len(TEXTS) + 2)


def test_a_second_time_it_is_up_to_date_and_a_change_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    assert run(corpus, out) is not None
    before = digest(out)
    assert run(corpus, out) is None
    with pytest.raises(DataError, match="--overwrite replaces it"):
        run(corpus, out, val_fraction=0.4)
    assert digest(out) == before
    run(corpus, out, val_fraction=0.4, overwrite=True)
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
        while not list((tmp_path / ".d.partial").rglob("*.npz")) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / ".d.partial").rglob("0*.npz")}
    assert done
    assert not out.exists()
    with pytest.raises(DataError, match=r"no such folder \(.*was left by .* cut off\); prepare it"):
        inspect_dataset(out)
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "tokenising: goes on at " in again.stderr
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
        (["--verify", "/nowhere"], 3, "--verify /nowhere: no such folder"),
    ],
)
def test_mistakes_get_one_line_and_an_exit_code(arguments, code, message, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, TOOL, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1
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


def test_inspecting_needs_no_torch_and_finds_a_foreign_tokenizer(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    run(corpus, out)
    program = (
        "import sys; from pathlib import Path; from megalm.data.shards.dataset import inspect_dataset; "
        f"inspect_dataset(Path({str(out)!r})); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    (out / "tokenizer.json").write_text(train_byte_level_bpe(TEXTS[:9], 290).definition)
    with pytest.raises(DataError, match="is not the tokenizer that made these tokens"):
        inspect_dataset(out)


@pytest.mark.parametrize("stop_after", [0, 1, 3])
def test_cut_off_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path, stop_after: int, monkeypatch) -> None:
    monkeypatch.setattr("megalm.data.prepare.run._MIN_BLOCK_BYTES", 300)
    folder = tmp_path / "c"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:03d}.txt").write_text(text)
    run(folder, tmp_path / "straight")
    calls: list[str] = []

    def interrupt(phase: str, done) -> None:
        if phase == "tokenising":
            if len(calls) == stop_after:
                raise KeyboardInterrupt
            calls.append(phase)

    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "cut", progress=interrupt)
    assert not (tmp_path / "cut").exists()
    results = list((tmp_path / ".cut.partial" / "blocks").rglob("*.npz"))
    assert len(results) == stop_after + 1
    times = [path.stat().st_mtime_ns for path in results]
    resumed: list[int] = []

    def watch(phase: str, done) -> None:
        if phase == "tokenising":
            resumed.append(done.resumed)
        if phase == "writing shards":
            assert [path.stat().st_mtime_ns for path in results] == times, "finished blocks are not done again"

    run(folder, tmp_path / "cut", workers=2, progress=watch)
    assert min(resumed) > 0
    assert digest(tmp_path / "cut") == digest(tmp_path / "straight")


def test_another_recipe_does_not_go_on_with_the_blocks_of_the_first(corpus: Path, tmp_path: Path) -> None:
    def interrupt(phase: str, done) -> None:
        if phase == "tokenising":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(corpus, tmp_path / "d", progress=interrupt)
    run(corpus, tmp_path / "d", cleaning=Cleaning(scrub_pii=True), tokenizer_vocab=290)
    run(corpus, tmp_path / "e", cleaning=Cleaning(scrub_pii=True), tokenizer_vocab=290)
    assert digest(tmp_path / "d") == digest(tmp_path / "e")


def test_duplicates_are_removed_in_the_order_of_the_corpus(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    words = " ".join(f"word{i}" for i in range(200))
    texts = [*TEXTS, TEXTS[3], words, words.replace("word77", "another"), TEXTS[0]]
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_text(text)
    exact = run(folder, tmp_path / "exact", exact_duplicates=True)
    assert exact.removed == {"exact duplicate": 2}
    near = run(folder, tmp_path / "near", 2, exact_duplicates=True, cleaning=Cleaning(near_duplicates=True))
    assert near.removed["exact duplicate"] == 2
    assert near.removed["near duplicate"] >= 1
    kept = texts_of(tmp_path / "near", "train") + texts_of(tmp_path / "near", "val")
    assert words in kept
    assert words.replace("word77", "another") not in kept, "the first of two stays"


def test_prompts_carry_no_loss_and_packing_keeps_examples_whole(tmp_path: Path) -> None:
    lines = [{"prompt": f"question {i}? ", "completion": f"the answer {i * 31}"} for i in range(200)]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "not json\n")
    options = CorpusOptions((str(path),))
    summary = run(tmp_path, tmp_path / "d", corpus_name="sft", options=options, pack=32, chunks_per_shard=50)
    assert summary.removed == {"malformed JSON": 1}
    tokenizer = Tokenizer.load(tmp_path / "d" / "tokenizer.json")
    found = []
    for split in ("train", "val"):
        shards = TokenShards(tmp_path / "d" / split, 32)
        rows, mask = np.empty((len(shards), 33), dtype=np.int64), np.empty((len(shards), 33), dtype=np.uint8)
        shards.read(np.arange(len(shards)), rows, mask)
        assert not mask[:, 32].any(), "no row learns the first token of the next"
        for tokens, learnt in zip(rows[:, :32], mask[:, :32], strict=True):
            ends = np.flatnonzero(np.diff(np.pad(learnt, (0, 1))) == -1 % 256)
            for end in ends.tolist():
                start = end
                while learnt[start - 1]:
                    start -= 1
                assert tokens[end] == tokenizer.eos_id
                found.append(tokenizer.decode(tokens[start:end].tolist()))
    # The text is tokenised as one: the prompt's last space is in the first token of the completion.
    assert sorted(found) == sorted(f" {line['completion']}" for line in lines)


@pytest.mark.parametrize("pack", [0, 64])
def test_the_data_card_counts_rows_with_nothing_to_learn(tmp_path: Path, pack: int) -> None:
    prompts = [" ".join(str(i * 7919 + word) for word in range(60 if i % 3 else 1)) for i in range(99)]
    lines = [{"prompt": f"{prompt}? ", "completion": f"answer {i * 31}"} for i, prompt in enumerate(prompts)]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = CorpusOptions((str(path),))
    summary = run(tmp_path, tmp_path / "d", corpus_name="sft", options=options, pack=pack, chunk_tokens=256)
    data = json.loads((tmp_path / "d" / "data_card.json").read_text())
    card = (tmp_path / "d" / "data_card.md").read_text()
    for split in ("train", "val"):
        assert summary.rows[split].lengths == ((64,) if pack else (256, 128, 64))
        for length in summary.rows[split].lengths:
            shards = TokenShards(tmp_path / "d" / split, length)
            rows = np.empty((len(shards), length + 1), dtype=np.int64)
            mask = np.empty((len(shards), length + 1), dtype=np.uint8)
            shards.read(np.arange(len(shards)), rows, mask)
            real = np.arange(length) < shards.valid(np.arange(len(shards)))[:, None]
            nothing = int((~(mask[:, 1:] * real).any(axis=1)).sum())
            assert data["splits"][split]["rows"][str(length)] == {"rows": len(shards), "nothing_to_learn": nothing}
            assert f"| {split} | {length:,} | {len(shards):,} | {nothing:,} |" in card
    assert summary.rows["train"].empty[64] > 20
    long = sum(counted for what, counted in summary.notes.items() if "cut" in what)
    assert long == (66 if pack else 0), "two of three prompts are longer than a row"
    assert (f"| longer than --pack 64, cut into pieces that do not see one another | {long} |" in card) == bool(pack)
    assert any("nothing to learn" in line for line in summary_lines("d", summary, 1.0))


def test_where_every_token_carries_loss_no_row_is_counted(corpus: Path, tmp_path: Path) -> None:
    summary = run(corpus, tmp_path / "d")
    assert summary.rows == {}
    assert "nothing to learn" not in (tmp_path / "d" / "data_card.md").read_text()


def test_the_data_card_counts_and_shows(corpus: Path, tmp_path: Path) -> None:
    run(corpus, tmp_path / "d")
    card = (tmp_path / "d" / "data_card.md").read_text()
    data = json.loads((tmp_path / "d" / "data_card.json").read_text())
    assert "a test" in card
    assert f"| documents kept | {len(TEXTS)} |" in card
    assert data["tokenizer_sha256"] in card
    assert data["tokens"] == sum(data["splits"][split]["tokens"] for split in ("train", "val"))
    picture = (tmp_path / "d" / "document_lengths.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert int.from_bytes(picture[16:20], "big") == 960


def test_a_text_too_small_for_the_vocabulary_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three one two three\n")
    few = run(tmp_path / "a.txt", tmp_path / "d", tokenizer_vocab=5000, val_fraction=0.0)
    said = f"--tokenizer-vocab 5000: the text is enough for a tokenizer of {few.vocab_size} tokens only"
    assert 257 <= few.vocab_size < 300
    assert said in summary_lines("d", few, 1.0)
    assert f"{said}.\n" in (tmp_path / "d" / "data_card.md").read_text()
    enough = run(tmp_path / "a.txt", tmp_path / "e", tokenizer_vocab=258, val_fraction=0.0)
    assert not any("--tokenizer-vocab" in line for line in summary_lines("e", enough, 1.0))
