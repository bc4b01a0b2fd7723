"""Corpora: every document once, whatever the size of blocks, however the file is compressed; nothing lost silently."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.document import Document, Rejected
from megalm.data.prepare.corpora import CORPORA, CorpusOptions
from megalm.errors import DataError

PACK = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lambda data: lzma.compress(data[: len(data) // 2]) + lzma.compress(data[len(data) // 2 :]) + bytes(4),
    ".zst": lambda data: zstandard.compress(data[: len(data) // 2]) + zstandard.compress(data[len(data) // 2 :]),
}


def read(corpus: str, *inputs: Path, block_bytes: int = 10**6, **options) -> list[Document | Rejected]:
    opened = CORPORA[corpus](CorpusOptions(tuple(map(str, inputs)), **options))
    blocks = [pickle.loads(pickle.dumps(block)) for block in opened.blocks(block_bytes)]
    assert sum(block.bytes for block in blocks) <= opened.total_bytes
    return [document for block in blocks for document in block.documents()]


def texts(documents: list[Document | Rejected]) -> list[str]:
    return [
        b"".join(s.text if isinstance(s.text, bytes) else s.text.encode() for s in d.segments).decode()
        for d in documents
        if isinstance(d, Document)
    ]


lines = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\0\ufeff"), max_size=12), max_size=30)


@pytest.mark.parametrize("suffix", PACK)
@settings(max_examples=40, deadline=None)
@given(content=lines, block_bytes=st.integers(1, 80), last=st.sampled_from(["", "\n"]))
def test_lines_and_paragraphs_do_not_depend_on_blocks(suffix, content, block_bytes, last, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("t") / f"a.txt{suffix}"
    data = ("\n".join(content) + last).encode()
    path.write_bytes(PACK[suffix](data))
    stripped = [line.encode() for line in content]
    by_line = [line.rstrip(b"\r") for line in stripped if line.strip()]
    found = read("text", path, block_bytes=block_bytes, split_on="line")
    assert [text.encode() for text in texts(found)] == by_line

    paragraphs, current = [], []
    for line in [*stripped, b""]:
        if line.strip():
            current.append(line)
        elif current:
            paragraphs.append(b"\n".join(current).rstrip(b"\r\n"))
            current = []
    found = read("text", path, block_bytes=block_bytes, split_on="blank-line")
    assert [text.encode() for text in texts(found)] == paragraphs
    for document in found if paragraphs else []:
        offset = int(document.name.rpartition("@")[2])
        assert data[offset:].startswith(document.segments[0].text.encode() if not document.segments else b"")


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("block_bytes", [1, 50, 10**6])
def test_records_and_what_is_wrong_with_them(suffix: str, block_bytes: int, tmp_path: Path) -> None:
    rows = [
        json.dumps({"text": "one"}),
        "{not json",
        json.dumps(["text"]),
        json.dumps({"body": "two"}),
        json.dumps({"text": 3}),
        "",
        json.dumps({"text": "four \u2028 five"}, ensure_ascii=False),
    ]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(PACK[suffix]("\r\n".join(rows).encode()))
    found = read("jsonl", path, block_bytes=block_bytes)
    assert texts(found) == ["one", "four \u2028 five"]
    assert [d.rule for d in found if isinstance(d, Rejected)] == [
        "malformed JSON",
        "JSON that is no object",
        "no field text",
        "field text is no text",
    ]
    assert found[0].name == f"{path}@0"


def test_a_field_of_a_nested_record(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": {"b": "deep"}}\n{"a.b": "flat"}\n{"a": 1}\n')
    assert texts(read("jsonl", tmp_path, text_field="a.b")) == ["deep", "flat"]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("corpus", ["jsonl", "text"])
def test_a_damaged_archive_is_named(corpus: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    whole = PACK[suffix](b'{"text": "a line of some length"}\n' * 5000)
    path.write_bytes(whole[: len(whole) // 2] if suffix != ".zst" else whole[: len(whole) // 3])
    with pytest.raises(DataError, match=rf"a\.jsonl\{suffix}: (damaged|cannot be read: damaged)"):
        read(corpus, path)


def test_parquet_row_groups(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"id": i, "text": f"row {i}" if i % 4 else None} for i in range(10)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    found = read("hf", tmp_path)
    assert texts(found) == [f"row {i}" for i in range(10) if i % 4]
    assert [d.name for d in found if isinstance(d, Rejected)] == [f"{tmp_path}/a.parquet:{i}" for i in (0, 4, 8)]
    with pytest.raises(DataError, match=r"--text-field body: .*has no such column; it has id, text"):
        read("hf", tmp_path, text_field="body")
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"b\.parquet: is no parquet file"):
        read("hf", tmp_path / "b.parquet")


def test_a_named_dataset_that_cannot_be_loaded_is_one_line(monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(*_, **__):
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"--input some/name: cannot be loaded: no route to the hub$"):
        read("hf", Path("some/name"))


def test_a_named_dataset_is_streamed(monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"text": f"text {i}"} for i in range(7)] + [{"other": 1}]
    local = datasets.IterableDataset.from_generator(lambda: iter(rows))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: local)
    corpus = CORPORA["hf"](CorpusOptions(("name",), hf_config="small", hf_split="test"))
    assert corpus.source == "name/small (test)"
    blocks = list(corpus.blocks(12))
    assert len(blocks) == 4
    found = [document for block in blocks for document in block.documents()]
    assert texts(found) == [f"text {i}" for i in range(7)]


def test_prompts_completions_and_templates(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "2+2=", "completion": "4"}\n{"prompt": "x", "completion": " "}\n{"prompt": "x"}\n'
    )
    found = read("sft", tmp_path)
    assert [(s.text, s.learnt) for s in found[0].segments] == [("2+2=", False), ("4", True)]
    assert [d.rule for d in found[1:]] == ["empty completion", "no field completion"]
    (tmp_path / "b.jsonl").write_text('{"d": "talk", "s": "short", "n": {"t": "news"}}\n')
    (document,) = read("sft", tmp_path / "b.jsonl", prompt="{n.t}: {d}\n\nSummary:\n", completion="s")
    assert document.segments[0].text == "news: talk\n\nSummary:\n"
    with pytest.raises(DataError, match=r"--prompt '\{d': .*expected '\}'"):
        read("sft", tmp_path, prompt="{d")


def test_fields_that_are_asked_for_come_before_messages(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    both = {"messages": chat, "prompt": "p", "completion": "c", "q": "2+2=", "a": "4"}
    rows = [both, {"messages": chat}, {**both, "a": 4}, {"q": "only"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read("sft", tmp_path, prompt="{q}", completion="a")
    assert [s.text for s in found[0].segments] == ["2+2=", "4"]
    assert found[1].is_conversation, "where a record has none of the fields"
    assert [d.rule for d in found[2:]] == ["field a is no text", "no field a"]
    assert read("sft", tmp_path)[0].is_conversation, "without a wish, messages are what is learnt from"


def test_of_a_conversation_only_answers_are_learnt(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = [
        {"messages": messages},
        {"messages": []},
        {"messages": [{"role": "poet", "content": "x"}]},
        {"messages": messages[:1]},
        {"messages": [*messages, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
        {"messages": [{**message, "tool_calls": None} for message in messages]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read("sft", tmp_path)
    assert [s.text for s in found[0].segments if s.learnt] == ["hello"]
    assert [s.role for s in found[0].segments] == ["user", "assistant"]
    assert found[0].is_conversation
    assert found[0].text == "user\nhi\nassistant\nhello\n"
    assert [d.rule for d in found[1:5]] == [
        "messages are no list",
        "a message without role or content",
        "no answer to learn",
        "a message that calls tools: text alone is read",
    ]
    assert found[5].is_conversation


@pytest.mark.parametrize(
    ("corpus", "options", "message"),
    [
        ("stdlib", {"inputs": ("x",)}, "--input x: the stdlib corpus takes no such option; --corpus text reads files"),
        ("text", {}, "--corpus text needs --input"),
        ("text", {"inputs": ("/nowhere",)}, "--input /nowhere: no such file or folder"),
        ("text", {"inputs": ("/tmp",), "text_field": "x"}, "--text-field x: the text corpus takes no such option"),
        ("text", {"inputs": ("/etc/hostname",), "split_on": "page"}, "--split-on page: file, blank-line, line"),
        ("wikipedia", {"inputs": ("/nowhere.xml",)}, "no such file or folder"),
        ("hf", {"inputs": ("a", "b")}, "one dataset name at a time"),
    ],
)
def test_options_that_do_not_apply_are_refused(corpus: str, options, message: str) -> None:
    with pytest.raises(DataError, match=message):
        CORPORA[corpus](CorpusOptions(**options))


def test_a_folder_without_such_files_and_hidden_ones(tmp_path: Path) -> None:
    (tmp_path / ".hidden.jsonl").write_text("{}")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no files ending in \.jsonl"):
        read("jsonl", tmp_path)
    assert texts(read("text", tmp_path)) == ["x"]
