"""What passes from corpora through cleaning to the tokenizer. No torch.

A corpus is cut into *blocks*: one process lists them, which is cheap and always gives the same list; any process reads
one, which is where decompression aside all work is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from megalm.data.tally import FileTally, RejectedFile


@dataclass(frozen=True)
class Segment:
    """A stretch of a document.

    Attributes:
        text: its text; bytes where a corpus has not decoded them.
        learnt: whether its tokens carry loss (a prompt's do not).
        role: who says it in a conversation, whose turns a chat template is to put together; None: it is no turn.
    """

    text: str | bytes
    learnt: bool = True
    role: str | None = None


@dataclass(frozen=True)
class LeftOut:
    """What a reader left out of a document that is not markup: tables, captions, templates that it cannot render.

    Attributes:
        kinds: by name, how often something was left out and how many words it had.
        kept_words: words of the document that stay.
        lost_words: words that do not, without those of references, which are no part of the text.
    """

    kinds: Mapping[str, tuple[int, int]]
    kept_words: int
    lost_words: int

    @property
    def share(self) -> float:
        """Of the document's words, those that do not stay."""
        return self.lost_words / max(self.kept_words + self.lost_words, 1)


@dataclass(frozen=True)
class Document:
    """One document of a corpus.

    Attributes:
        name: where it is from, so that a person finds it again: a path, ``file.jsonl:17``, an article's title.
        segments: its text, in order; one for plain text, several for prompts and completions, or turns.
        left_out: what its reader left out; None: nothing, or it does not count.
        marked: whether a chat template wrote the text, so that its marks in it are tokens.
    """

    name: str
    segments: tuple[Segment, ...]
    left_out: LeftOut | None = None
    marked: bool = False

    @classmethod
    def plain(cls, name: str, text: str | bytes) -> Document:
        """A document all of which is learnt."""
        return cls(name, (Segment(text),))

    @property
    def is_conversation(self) -> bool:
        """Whether the segments are turns that no template has put together yet."""
        return any(segment.role is not None for segment in self.segments)

    @property
    def text(self) -> str:
        """The text of all segments, which are decoded already; of turns, with who says what."""
        return "".join(str(s.text) if s.role is None else f"{s.role}\n{s.text!s}\n" for s in self.segments)

    def with_texts(self, texts: list[str]) -> Document:
        """The same document with other texts in its segments, in order."""
        return replace(
            self, segments=tuple(replace(s, text=text) for s, text in zip(self.segments, texts, strict=True))
        )


@dataclass(frozen=True)
class Rejected:
    """Something in a corpus that is no document.

    Attributes:
        name: where it is.
        rule: why, in a word or two that reports count by: ``malformed JSON``, ``redirect``.
        left_out: what its reader left out; None: nothing, or it does not count.
    """

    name: str
    rule: str
    left_out: LeftOut | None = None


class Block(Protocol):
    """A part of a corpus, small enough for a worker's memory; picklable, and light where it can be."""

    @property
    def bytes(self) -> int:
        """Its share of the corpus's ``total_bytes``, for progress."""

    def documents(self) -> Iterator[Document | Rejected | RejectedFile]:
        """Read the block; the same in every process that sees the corpus's files."""


class Corpus(Protocol):
    """A deterministic sequence of documents."""

    @property
    def source(self) -> str:
        """Where it comes from, in words."""

    @property
    def total_bytes(self) -> int:
        """Size of its files on disk, or of its text where there are none."""

    @property
    def num_files(self) -> int:
        """How many files it reads; 0 where it has none."""

    @property
    def files_left_out(self) -> FileTally:
        """Files that it does not read, known before any is opened."""

    def fingerprint(self) -> str:
        """Changes when a file is added, removed, renamed, resized or touched; reads no contents."""

    def blocks(self, block_bytes: int) -> Iterator[Block]:
        """All blocks, in order, of about ``block_bytes`` of text each; the same list every time."""
