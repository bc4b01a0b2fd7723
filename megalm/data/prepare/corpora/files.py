"""Text: the running Python's standard library, and any files, one document each or many."""

from __future__ import annotations

import platform
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megalm.data.document import Corpus, Document, Rejected
from megalm.data.names import shown
from megalm.data.prepare.corpora.contents import UTF_8, NotText, decode
from megalm.data.prepare.corpora.find import Found
from megalm.data.prepare.corpora.options import CorpusOptions
from megalm.data.prepare.corpora.records import PlainText, RecordCorpus
from megalm.data.prepare.corpora.streams import Files, find_files, open_text, size_of
from megalm.data.tally import RejectedFile
from megalm.errors import DataError

SPLITS_ON = ("file", "blank-line", "line")
_LOOKED_INTO, _ENOUGH = 20, 10
"""Files that are looked into for where documents could end, and how many documents there should then be."""
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"})
"""Folders below the standard library that are not written to be read: third parties, generated data, tests."""


@dataclass(frozen=True)
class WholeFiles:
    """Some files, one document each.

    Attributes:
        paths: in order.
        bytes: of all of them, on disk.
        encoding: of files without a byte-order mark; None: UTF-8.
    """

    paths: tuple[Path, ...]
    bytes: int
    encoding: str | None = None

    def documents(self) -> Iterator[Document | Rejected | RejectedFile]:
        """Read the files."""
        for path in self.paths:
            try:
                with open_text(path, self.encoding) as stream:
                    text = decode(stream.content.read(), UTF_8, stream.mark)
            except NotText as finding:
                yield RejectedFile(shown(path), finding.reason, size_of(path), finding.advice)
            else:
                yield Document.plain(shown(path), text)


@dataclass(frozen=True)
class FileCorpus(Files):
    """Files, one document each.

    Attributes:
        encoding: of files without a byte-order mark; None: UTF-8.
    """

    encoding: str | None = None

    def blocks(self, block_bytes: int) -> Iterator[WholeFiles]:
        """Groups of files of about ``block_bytes``; a larger file is a group of its own."""
        group: list[Path] = []
        size = 0
        for path in self.files:
            group.append(path)
            size += size_of(path)
            if size >= block_bytes:
                yield WholeFiles(tuple(group), size, self.encoding)
                group, size = [], 0
        if group:
            yield WholeFiles(tuple(group), size, self.encoding)


def stdlib_corpus(options: CorpusOptions) -> Corpus:
    """The ``.py`` files of the running Python's standard library: real text that every machine has.

    Raises:
        DataError: an option was given, or this Python ships without its library's sources.
    """
    options.check("stdlib")
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if not _NOT_LIBRARY & set(path.relative_to(root).parts)]
    if not files:
        raise DataError(f"no .py files below {root}: this Python was installed without its library's sources")
    return FileCorpus(f"standard library of Python {platform.python_version()}", Found(tuple(sorted(files))))


def text_corpus(options: CorpusOptions) -> Corpus:
    """Files, and all files below folders; each is a document, or its paragraphs or lines are.

    Raises:
        DataError: no input, one that does not exist or holds no file, or an unknown ``split_on``.
    """
    options.check("text", "inputs", "split_on", "encoding", "undecodable")
    if options.split_on not in SPLITS_ON:
        raise DataError(f"--split-on {options.split_on}: {', '.join(SPLITS_ON)}")
    found = find_files(options.inputs)
    if options.split_on == "file":
        if options.undecodable != CorpusOptions.undecodable:
            raise DataError(
                f"--undecodable {options.undecodable}: files that are one document each are always left out"
            )
        return FileCorpus(options.source, found, options.encoding)
    blank_lines = options.split_on == "blank-line"
    return RecordCorpus(options.source, found, PlainText(), options.reading, blank_lines)


def finer_split(corpus: Corpus, options: CorpusOptions) -> str:
    """Which ``--split-on`` would make more documents of files; empty: none."""
    if not isinstance(corpus, Files) or options.split_on == "line":
        return ""
    files = lines = paragraphs = 0
    for path in corpus.files[:_LOOKED_INTO]:
        try:
            with open_text(path, options.encoding) as text:
                sample = text.head()
        except NotText:
            continue
        files += 1
        lines += sum(1 for line in sample.splitlines() if line.strip())
        paragraphs += len(re.findall(rb"\S[^\S\n]*(?:\n[^\S\n]*){2,}(?=\S)", sample)) + 1
    today = paragraphs if options.split_on == "blank-line" else files
    for name, count in (("blank-line", paragraphs), ("line", lines)):
        if count >= _ENOUGH and count > today:
            return f"--split-on {name} makes {count:,} or more documents of it"
    return f"--split-on line makes {lines:,} documents of it" if lines > today else ""
