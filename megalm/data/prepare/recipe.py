"""What decides the bytes of a prepared dataset. No torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.data.document import Corpus
from megalm.data.prepare.clean import Cleaning
from megalm.data.prepare.corpora import CORPORA, CorpusOptions
from megalm.data.shards.index import VERSION
from megalm.data.tokenization.roles import Marks
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import DataError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


@dataclass(frozen=True)
class Recipe:
    """A corpus and all that is done to it.

    Attributes:
        corpus: a name in ``CORPORA``.
        options: what the corpus is told.
        cleaning: what is done to each document.
        exact_duplicates: remove documents whose text is that of an earlier one.
        tokenizer: path of a ``tokenizer.json``; None: train one.
        eos: name of the token that ends a document; None: the tokenizer's own.
        add_bos: whether documents begin with the tokenizer's ``bos``; None: as its own files say.
        tokenizer_vocab: vocabulary of the tokenizer to train.
        tokenizer_kind: ``bpe`` (byte-level) or ``wordpiece``.
        val_fraction: share of documents that go to validation, chosen by a hash of their text; 0: none.
        val_inputs: files and folders of a validation corpus, of the same kind; ``val_fraction`` is 0 then.
        chunk_tokens: tokens per chunk; sequence lengths must divide it.
        chunks_per_shard: chunks per tar file.
        pack: sequence length to pack whole documents for (best fit); 0: concatenate them.
        license: of the texts, for the data card and the cards of models; None: not stated.
    """

    corpus: str
    options: CorpusOptions = field(default_factory=CorpusOptions)
    cleaning: Cleaning = field(default_factory=Cleaning)
    exact_duplicates: bool = False
    tokenizer: str | None = None
    eos: str | None = None
    add_bos: bool | None = None
    tokenizer_vocab: int | None = None
    tokenizer_kind: str = "bpe"
    val_fraction: float = 0.02
    val_inputs: tuple[str, ...] = ()
    chunk_tokens: int = 8192
    chunks_per_shard: int = 4096
    pack: int = 0
    license: str | None = None

    @property
    def masked(self) -> bool:
        """Whether tokens need a loss mask beside them."""
        return self.corpus == "sft" or self.pack > 0

    def open_corpus(self) -> Corpus:
        """The corpus.

        Raises:
            DataError: an input is missing or an option does not apply.
        """
        return CORPORA[self.corpus](self.options)

    def open_val_corpus(self) -> Corpus | None:
        """The validation corpus; None: there is none of its own.

        Raises:
            DataError: an input is missing or an option does not apply.
        """
        if not self.val_inputs:
            return None
        try:
            return CORPORA[self.corpus](replace(self.options, inputs=self.val_inputs))
        except DataError as error:
            raise DataError(str(error).replace("--input", "--val-input")) from None

    @property
    def splits(self) -> tuple[str, ...]:
        """What the dataset is divided into."""
        return ("train", "val") if self.val_inputs or self.val_fraction > 0 else ("train",)

    @property
    def local_inputs(self) -> tuple[str, ...]:
        """What the user names to be read."""
        return (*self.options.inputs, *self.val_inputs)

    @property
    def marks(self) -> Marks:
        """What is decided of a document's marks otherwise than the tokenizer's own files do."""
        return Marks(eos=self.eos, add_bos=self.add_bos)

    def signature(self, corpus: Corpus, val_corpus: Corpus | None = None) -> str:
        """Changes with anything that would change the dataset."""
        given = None if self.tokenizer is None else Tokenizer.load(self.tokenizer, marks=self.marks)
        evaluation = [_sha256_of(name) for name in self.cleaning.decontaminate]
        parts = {
            **_settings(self),
            "options": {**_settings(self.options), "inputs": None},
            "cleaning": _settings(self.cleaning),
            "tokenizer": None if given is None else given.sha256,
            "files": corpus.fingerprint(),
            "evaluation": evaluation,
            "format": VERSION,
        }
        if val_corpus is not None:
            parts["val_inputs"] = val_corpus.fingerprint()
        if given is not None and not given.is_marked_as_usual:
            parts["marks"] = [given.roles.before, given.roles.end]
        if given is not None and self.corpus == "sft" and given.roles.chat_template is not None:
            parts["chat_template"] = given.roles.chat_template
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


_LATER = frozenset({"add_bos", "encoding", "license", "scrub_secrets", "undecodable", "val_inputs"})
"""Options that older datasets were made without: at their defaults they leave a signature as it was."""


def _settings(options: DataclassInstance) -> dict[str, Any]:
    """Fields and values, without options that came later and are at their defaults."""
    defaults = {one.name: one.default for one in fields(options)}
    return {name: value for name, value in asdict(options).items() if name not in _LATER or value != defaults[name]}


def _sha256_of(name: str) -> str:
    try:
        with Path(name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"--decontaminate {name}: cannot be read: {error.strerror}") from None
