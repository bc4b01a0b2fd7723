"""The steps of cleaning, in order: decode, normalise, judge, scrub.

Duplicates are told apart later, over all documents.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass, replace

from megalm.data.document import Document, Rejected, Segment
from megalm.data.prepare.clean.decontaminate import DEFAULT_NGRAM, Contamination
from megalm.data.prepare.clean.pii import scrub
from megalm.data.prepare.clean.quality import Quality, quality_rule
from megalm.data.prepare.clean.secrets import Secrets


@dataclass(frozen=True)
class Cleaning:
    """Which steps are taken; none unless asked for.

    Attributes:
        normalise: a Unicode normal form, such as ``NFC``; None: text stays as it is.
        quality: names in ``QUALITY`` of rules that a document must pass.
        scrub_secrets: replace private keys and access tokens of services by placeholders.
        scrub_pii: replace e-mail addresses, phone numbers and the like by placeholders.
        decontaminate: evaluation files; documents that share an n-gram with one are removed.
        ngram: words of such an n-gram.
        encoding: of evaluation files that are not in UTF-8.
        max_document_bytes: documents that are longer are removed; None: any length.
        near_duplicates: whether MinHash bands are computed of each document.
    """

    normalise: str | None = None
    quality: tuple[str, ...] = ()
    scrub_secrets: bool = False
    scrub_pii: bool = False
    decontaminate: tuple[str, ...] = ()
    ngram: int = DEFAULT_NGRAM
    encoding: str | None = None
    max_document_bytes: int | None = None
    near_duplicates: bool = False


@dataclass(frozen=True)
class Cleaned:
    """A document that stays.

    Attributes:
        document: all of its texts decoded.
        notes: how often something in it was changed.
    """

    document: Document
    notes: dict[str, int]


class Cleaner:
    """Applies a :class:`Cleaning`; made once per process, since it reads the evaluation files.

    Raises:
        DataError: an evaluation file cannot be read, or the library of the quality rules or of secrets is missing.
    """

    def __init__(self, cleaning: Cleaning) -> None:
        self._cleaning = cleaning
        self._quality = [Quality(name) for name in cleaning.quality]
        self._secrets = Secrets() if cleaning.scrub_secrets else None
        self._contamination = (
            Contamination.of(cleaning.decontaminate, cleaning.ngram, cleaning.encoding)
            if cleaning.decontaminate
            else None
        )

    def clean(self, document: Document) -> Cleaned | Rejected:
        """The document as it will be tokenised, or why it does not stay."""
        cleaning, notes = self._cleaning, Counter[str]()
        document = self._decoded(document, notes)
        if not any(str(s.text).strip() for s in document.segments if s.learnt):
            return Rejected(document.name, "empty")
        limit = cleaning.max_document_bytes
        if limit is not None and len(document.text.encode("utf-8", "surrogatepass")) > limit:
            return Rejected(document.name, "over-long")
        for quality in self._quality:
            document, rule = quality_rule(quality, document, notes)
            if rule is not None:
                return Rejected(document.name, rule)
        if self._contamination is not None:
            source = self._contamination.source_of(document.text)
            if source is not None:
                return Rejected(document.name, f"contaminated: {source}")
        if self._secrets is not None:
            scrubbed = [self._secrets.scrub(str(s.text), notes) for s in document.segments]
            document = document.with_texts(scrubbed)
        if cleaning.scrub_pii:
            document = document.with_texts([scrub(str(s.text), notes) for s in document.segments])
        return Cleaned(document, dict(notes))

    def _decoded(self, document: Document, notes: Counter[str]) -> Document:
        segments = tuple(self._decoded_segment(segment, notes) for segment in document.segments)
        return replace(document, segments=segments)

    def _decoded_segment(self, segment: Segment, notes: Counter[str]) -> Segment:
        if isinstance(segment.text, bytes):
            text = segment.text.decode("utf-8", errors="replace")
            if "\ufffd" in text and text.encode() != segment.text:
                notes["bytes that are no UTF-8, replaced"] += 1
        else:
            text = segment.text
            # JSON may spell half of a surrogate pair, which no encoding holds.
            whole = text.encode("utf-8", "replace").decode("utf-8") if _has_surrogate(text) else text
            if whole != text:
                notes["lone surrogates, replaced"] += 1
            text = whole
        form = self._cleaning.normalise
        if form is not None and not unicodedata.is_normalized(form, text):  # type: ignore[arg-type]
            text = unicodedata.normalize(form, text)  # type: ignore[arg-type]
            notes[f"not {form}, normalised"] += 1
        return replace(segment, text=text)


def _has_surrogate(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False
