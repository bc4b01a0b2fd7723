"""Every file is read right, or counted with the reason: encodings, compression, links, names, what is no text."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import socket
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from megalm.data.document import Document, Rejected
from megalm.data.prepare.clean.decontaminate import evaluation_texts
from megalm.data.prepare.corpora import CORPORA, CorpusOptions
from megalm.data.tally import FileTally, RejectedFile
from megalm.errors import DataError

WORDS = "Größe, façade — 12 €\n"
SPLITS = ("file", "line")


def read(corpus: str, *inputs: Path | str, block_bytes: int = 10**6, **options):
    """(texts, reasons of documents, left-out files) of a corpus."""
    opened = CORPORA[corpus](CorpusOptions(tuple(map(str, inputs)), **options))
    files = FileTally(opened.files_left_out.to_dict())
    texts, rules = [], []
    for block in opened.blocks(block_bytes):
        for document in block.documents():
            if isinstance(document, RejectedFile):
                files.add(document)
            elif isinstance(document, Rejected):
                rules.append(document.rule)
            else:
                texts.append(text_of(document))
    return texts, rules, files


def text_of(document: Document) -> str:
    segment = document.segments[-1]
    return segment.text.decode() if isinstance(segment.text, bytes) else segment.text


def reasons(files: FileTally) -> dict[str, int]:
    return {reason: one.files for reason, one in files.items()}


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.txt", data)
    return buffer.getvalue()


def tarred(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.mark.parametrize("split_on", SPLITS)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_a_byte_order_mark_says_the_encoding(encoding: str, split_on: str, tmp_path: Path) -> None:
    mark = "\ufeff" if encoding.endswith("-be") else ""
    (tmp_path / "a.txt").write_bytes((mark + WORDS).encode(encoding))
    texts, rules, files = read("text", tmp_path, split_on=split_on)
    assert [text.rstrip("\n") for text in texts] == [WORDS.rstrip("\n")]
    assert (rules, reasons(files)) == ([], {})


@pytest.mark.parametrize("split_on", SPLITS)
@pytest.mark.parametrize("encoding", ["iso-8859-15", "cp1252", "mac-roman", "utf-16-le"])
def test_the_user_says_the_encoding(encoding: str, split_on: str, tmp_path: Path) -> None:
    words = WORDS.replace("—", "-")
    (tmp_path / "a.txt").write_bytes(words.encode(encoding))
    (tmp_path / "b.txt").write_bytes(gzip.compress(words.encode(encoding)))
    texts, _, files = read("text", tmp_path, split_on=split_on, encoding=encoding)
    assert [text.rstrip("\n") for text in texts] == [words.rstrip("\n")] * 2
    assert reasons(files) == {}


@pytest.mark.parametrize("split_on", SPLITS)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.GZ", "a.bz2"])  # whatever it is called
@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress])
def test_compression_is_told_by_the_first_bytes_and_every_stream_is_read(pack, name, split_on, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pack(b"one\n") + pack(b"") + pack(b"two\n"))
    texts, _, files = read("text", tmp_path, split_on=split_on)
    assert "".join(text.rstrip("\n") for text in texts).replace("\n", "") == "onetwo"
    assert reasons(files) == {}


@pytest.mark.parametrize("split_on", SPLITS)
@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress])
def test_a_compressed_file_is_never_silently_short(pack, split_on: str, tmp_path: Path) -> None:
    whole = pack(b"a line\n" * 5000)
    cases = {"cut": whole[:-6], "second cut": whole + whole[:-6], "rubbish": whole + b"rubbish behind it"}
    for name, data in cases.items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(DataError, match=f"{name}: (damaged|cannot be read: damaged)"):
            read("text", path, split_on=split_on)


@pytest.mark.parametrize("split_on", SPLITS)
def test_what_is_no_text_is_left_out_and_counted_by_what_it_is(split_on: str, tmp_path: Path) -> None:
    binary = {
        "picture.txt": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9, "PNG image"),
        "paper": (b"%PDF-1.7\nall printable\n", "PDF"),
        "program": (b"\x7fELF" + bytes(60), "ELF program"),
        "archive": (zipped(b"words"), "zip archive"),
        "tape.gz": (gzip.compress(tarred(b"words")), "tar archive"),
        "seven.7z": (b"7z\xbc\xaf\x27\x1c" + bytes(20), "7z archive"),
        "base.db": (b"SQLite format 3\0" + bytes(90), "SQLite database"),
        "columns": (b"PAR1" + bytes(20) + b"PAR1", "Parquet file"),
        "unknown": (b"words\0more", "binary (has NUL bytes)"),
        "in a gzip": (gzip.compress(b"words\0more"), "binary (has NUL bytes)"),
    }
    for name, (data, _) in binary.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "good.txt").write_text("words")
    texts, rules, files = read("text", tmp_path, split_on=split_on)
    assert (texts, rules) == (["words"], [])
    assert reasons(files) == Counter(reason for _, reason in binary.values())
    by_reason = dict(files.items())
    assert by_reason["PDF"].examples == [str(tmp_path / "paper")]
    assert by_reason["PDF"].bytes == len(binary["paper"][0])
    assert by_reason["Parquet file"].examples == [f"{tmp_path / 'columns'} (--corpus hf reads it)"]


def test_utf_16_without_a_mark_is_named(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes("plain words in it".encode("utf-16-le"))
    _, _, files = read("text", tmp_path)
    assert files.line().endswith("a (if it is text, --encoding utf-16-le reads it))")


def test_a_nul_far_behind_the_beginning(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a line\n" * 20_000 + b"bad\0line\n" + b"a line\n")
    texts, rules, files = read("text", tmp_path, split_on="line")
    assert (len(texts), rules, reasons(files)) == (20_001, ["has NUL bytes"], {})
    texts, rules, files = read("text", tmp_path)
    assert (texts, rules, reasons(files)) == ([], [], {"binary (has NUL bytes)": 1})


@pytest.mark.parametrize("lines_before", [0, 30_000])  # in the part that is looked at first, and behind it
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("corpus", ["jsonl", "sft", "text"])
def test_records_in_latin_1_are_refused_or_read_right(corpus: str, pack, lines_before: int, tmp_path: Path) -> None:
    row = {"text": "Café"} if corpus == "jsonl" else {"prompt": "a", "completion": "Café"}
    line = "Café\n" if corpus == "text" else json.dumps(row, ensure_ascii=False) + "\n"
    before = line.replace("é", "e") * lines_before
    path = tmp_path / "a.jsonl"
    path.write_bytes(pack((before + line).encode("latin-1")))
    options = {"split_on": "line"} if corpus == "text" else {}
    offset = len(before) + line.index("é")
    expected = (
        rf"a\.jsonl: not UTF-8; byte {offset:,} is 0xe9; --encoding names another, such as latin-1 .*--undecodable"
    )
    with pytest.raises(DataError, match=expected):
        read(corpus, path, **options)

    opened = CORPORA[corpus](CorpusOptions((str(path),), encoding="latin-1", **options))
    documents = [document for block in opened.blocks(1000) for document in block.documents()]
    last = documents[-1].segments[-1].text
    assert (last.decode() if isinstance(last, bytes) else last) == "Café"
    assert len(documents) == lines_before + 1

    opened = CORPORA[corpus](CorpusOptions((str(path),), undecodable="reject", **options))
    documents = [document for block in opened.blocks(1000) for document in block.documents()]
    assert [document.rule for document in documents if isinstance(document, Rejected)] == ["not UTF-8"]
    assert len(documents) == lines_before + 1


def test_an_encoding_that_does_not_fit_or_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("Größe".encode("cp1252"))
    _, _, files = read("text", tmp_path, encoding="ascii")
    assert reasons(files) == {"not ascii": 1}
    for wrong in ("klingon", "base64", "rot13"):
        with pytest.raises(DataError, match=f"--encoding {wrong}: there is no such encoding"):
            read("text", tmp_path, encoding=wrong)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{"text": "a"}, {"text": "b"}]', "a JSON array, not JSON Lines"),
        ('[\n {"text": "a"},\n {"text": "b"}\n]\n', "a JSON array, not JSON Lines"),
        ('{\n "text": "a"\n}\n', "JSON over many lines, not JSON Lines"),
        ('{"text": "a",\r\n "more": 1}\r\n', "JSON over many lines, not JSON Lines"),
    ],
)
def test_json_that_is_no_json_lines_is_called_that(content: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    texts, rules, files = read("jsonl", tmp_path)
    assert (texts, rules, reasons(files)) == ([], [], {reason: 1})


def test_a_first_line_that_is_no_json_is_a_bad_line_not_a_bad_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"},\n{"text": "b"}\n')
    texts, rules, files = read("jsonl", tmp_path)
    assert (texts, rules, reasons(files)) == (["b"], ["malformed JSON"], {})


def test_odd_records(tmp_path: Path) -> None:
    rows = [
        '\ufeff{"text": "a mark, and CRLF"}',
        '{"text": "first", "text": "second"}',
        '{"text": NaN}',
        '{"text": "a score", "score": NaN}',
        "[1]",
        '{"text": "cut',
    ]
    (tmp_path / "a.jsonl").write_bytes("\r\n".join(rows).encode())
    texts, rules, _ = read("jsonl", tmp_path)
    assert texts == ["a mark, and CRLF", "a score"]
    assert rules == [
        "a field twice in one JSON object",
        "field text is no text",
        "JSON that is no object",
        "malformed JSON",
    ]


def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path) -> None:
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (corpus / "b", elsewhere / "inner"):
        folder.mkdir(parents=True)
        (folder / "x.txt").write_text(f"in {folder.name}")
    (corpus / "a").symlink_to(corpus / "b")  # a link whose name comes before the folder's own
    (corpus / "c").symlink_to(elsewhere)
    (elsewhere / "inner" / "back").symlink_to(corpus)
    (corpus / "itself").symlink_to("itself")
    (corpus / "nowhere").symlink_to("missing")
    opened = CORPORA["text"](CorpusOptions((str(corpus),)))
    assert [str(path.relative_to(corpus)) for path in opened.files] == ["b/x.txt", "c/inner/x.txt"]
    assert reasons(opened.files_left_out) == {"linked folder read already": 2, "link that leads nowhere": 2}


def test_the_same_file_again_is_said_and_read_once(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("words")
    os.link(tmp_path / "b.txt", tmp_path / "c.txt")
    (tmp_path / "a.txt").symlink_to("b.txt")
    (tmp_path / "d.txt").write_text("words")  # a copy is another file; --dedup is for those
    texts, _, files = read("text", tmp_path, tmp_path / "c.txt", tmp_path, tmp_path / "b.txt")
    assert texts == ["words", "words"]
    assert reasons(files) == {"the same file again": 8}
    assert files.line().startswith(
        f"8 the same file again (such as {tmp_path / 'a.txt'} (read as {tmp_path / 'b.txt'}))"
    )


def test_hidden_empty_and_special_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / ".hidden").write_text("12345")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("x")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path) if len(str(tmp_path)) > 90 else None
        server.bind(str(tmp_path / "s") if len(str(tmp_path)) <= 90 else "s")
    texts, _, files = read("text", tmp_path)
    assert texts == ["words"]
    expected = ("empty", "hidden", "hidden folder (not looked into)", "pipe, no file", "socket, no file")
    assert reasons(files) == dict.fromkeys(expected, 1)
    assert dict(files.items())["hidden"].bytes == 5
    with pytest.raises(
        DataError, match=r"pipe: is a pipe, and files are read more than once; write it to a file first"
    ):
        read("text", tmp_path / "pipe")


def test_files_with_other_endings_are_counted(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(b'{"text": "capitals"}\n'))
    (tmp_path / "b.ndjson.xz").write_bytes(lzma.compress(b'{"text": "xz"}\n'))
    (tmp_path / "readme.md").write_text("words")
    (tmp_path / "c.jsonl.7z").write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(20))
    texts, _, files = read("jsonl", tmp_path)
    assert texts == ["capitals", "xz"]
    assert reasons(files) == {"7z archive": 1, "not named .jsonl or .ndjson or .json": 1}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DataError, match=r"a\.txt: cannot be read: permission denied"):
        read("text", tmp_path)


def test_without_permission_as_the_system_says_it(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "b.txt").write_text("words")
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("a.txt"))
    with pytest.raises(DataError, match=r"a\.txt: cannot be read: permission denied; make them readable"):
        read("text", tmp_path)


def test_evaluation_files_follow_the_same_rules(tmp_path: Path) -> None:
    path = tmp_path / "test"
    path.write_bytes(lzma.compress(WORDS.encode("utf-16")))
    assert list(evaluation_texts(str(path))) == [WORDS.strip()]
    path.write_bytes(WORDS.replace("€", "E").replace("—", "-").encode("latin-1"))
    with pytest.raises(DataError, match=r"--decontaminate .*test: not UTF-8; byte 2 is 0xf6; --encoding names another"):
        list(evaluation_texts(str(path)))
    assert list(evaluation_texts(str(path), "latin-1")) == [WORDS.strip().replace("€", "E").replace("—", "-")]
    path.write_bytes(b"%PDF-1.4")
    with pytest.raises(DataError, match=r"test: PDF"):
        list(evaluation_texts(str(path)))
    array = tmp_path / "a.json"
    array.write_text(json.dumps([{"q": "one"}, {"q": "two"}], indent=1))
    assert list(evaluation_texts(str(array))) == ["one", "two"]


def test_a_dump_in_an_archive_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "dump.xml"
    path.write_bytes(b"7z\xbc\xaf\x27\x1c" + bytes(20))
    with pytest.raises(DataError, match=r"dump\.xml: 7z archive; unpack it"):
        read("wikipedia", path)
