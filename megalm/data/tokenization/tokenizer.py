"""Tokenizers: any that comes as a Hugging Face ``tokenizer.json``, as which megalm stores its own, too. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from itertools import groupby, takewhile
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megalm.data.document import Document, Rejected
from megalm.data.tokenization.chat import Message, TemplateRefusal
from megalm.data.tokenization.chat_tokens import ChatTokens, chat_of, chatml_of, learnt_tokens
from megalm.data.tokenization.roles import ENDS, MASKS, START_KEY, USUAL_START, Marks, RoleReader, Roles
from megalm.data.tokenization.settings_files import (
    GENERATION_FILE,
    ROLES,
    SETTINGS_FILE,
    SettingsFiles,
    mark_special,
    mark_tokens,
    token_content,
)
from megalm.errors import DataError

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
_WORD_STARTS = ("Ġ", "▁", " ", "Ċ", "ĉ")
"""What the first token of a word begins with, where it is not ``##`` that marks the others."""


class Tokenizer:
    """Text ▶ token ids ▶ text; a byte-level BPE without loss for any UTF-8 text.

    Text that spells a special token stays text: a document about ``<|endoftext|>`` does not end there.
    """

    def __init__(self, definition: str, *, files: SettingsFiles | None = None, marks: Marks | None = None) -> None:
        """Take the text of a ``tokenizer.json``, the files beside it, and what is decided otherwise than they say."""
        # One process per core is how megalm tokenises; threads inside each would only compete.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        self.definition = definition
        self.files = SettingsFiles() if files is None else files
        self._tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(definition)
        self._tokenizer.encode_special_tokens = True
        # Many a published tokenizer.json cuts or pads texts at its model's length; no token may be lost.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        if not self._tokenizer.get_vocab_size(with_added_tokens=True):
            raise DataError("has no tokens")
        mark_special(self._tokenizer, self.files)
        self.roles = RoleReader(self._tokenizer, self.files).read(Marks() if marks is None else marks)
        mark_tokens(self._tokenizer, (*self.roles.before, self.roles.end))
        self.eos_id = self._id(self.roles.end)
        self.before_ids = tuple(map(self._id, self.roles.before))
        """What every document begins with, such as ``bos``; empty: with its text."""
        self.end_ids = (*map(self._id, takewhile(lambda token: token != self.roles.end, self.roles.after)), self.eos_id)
        """What every document ends with; the last one is ``eos_id``."""

    @classmethod
    def load(cls, path: str | Path, *, marks: Marks | None = None) -> Tokenizer:
        """Read a ``tokenizer.json`` and what the files beside it say of its tokens.

        Args:
            path: of the file, or of a folder that has one: of a run, a dataset, or a model as Hugging Face's are kept.
            marks: what is decided otherwise than the files say.

        Raises:
            DataError: the file is missing or is no tokenizer, or no token of it ends a document.
        """
        path = Path(path)
        if path.is_dir():
            path = path / TOKENIZER_FILE
            if not path.exists():
                raise DataError(f"tokenizer {path.parent}: the folder has no {TOKENIZER_FILE}")
        try:
            definition = path.read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"tokenizer {path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"tokenizer {path} is not a tokenizer.json: {error}") from None
        return cls.parse(definition, str(path), read=partial(_text_of, path.parent), marks=marks)

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and the files beside it: :meth:`load` gives the same roles."""
        for name, text in self.texts().items():
            (folder / name).write_text(text, encoding="utf-8")

    def texts(self) -> dict[str, str]:
        """Names of files ▶ what :meth:`save` writes into them, ``tokenizer.json`` last."""
        kept = dict(self.files.texts)
        if self._settings != self.files.values(SETTINGS_FILE):
            kept[SETTINGS_FILE] = json.dumps(self._settings, indent=2, ensure_ascii=False) + "\n"
        return {**kept, TOKENIZER_FILE: self.definition}

    @cached_property
    def _settings(self) -> dict[str, Any]:
        """``tokenizer_config.json`` as it was, with what was decided otherwise or said in a file that is not kept."""
        settings = self.files.values(SETTINGS_FILE)
        if not self.files.texts:
            settings["eos_token"] = self.roles.end
        said = self._said_by(settings)
        if said == self.roles:
            return settings
        if said is None or any(said.token(role) != self.roles.token(role) for role in ROLES):
            # All of them: what some roles leave open, others may decide.
            stated = {role: settings.get(f"{role}_token") for role in ROLES}
            new = {
                role: self.roles.token(role) for role in ROLES if token_content(stated[role]) != self.roles.token(role)
            }
            settings |= {f"{role}_token": new.get(role, stated[role]) for role in ROLES}
        if said is None or said.before != self.roles.before:
            settings["add_bos_token"] = self.roles.add_bos
            said = self._said_by(settings)
        if said is None or said.before != self.roles.before:
            settings[START_KEY] = list(self.roles.before)
        return settings

    def _said_by(self, settings: dict[str, Any]) -> Roles | None:
        """The roles by other contents of ``tokenizer_config.json``; None: it leaves too much open."""
        try:
            return Tokenizer(self.definition, files=self.files.kept_with(settings)).roles
        except DataError:
            return None

    @classmethod
    def parse(
        cls,
        definition: str,
        name: str,
        *,
        read: Callable[[str], str | None] | None = None,
        marks: Marks | None = None,
    ) -> Tokenizer:
        """The tokenizer that a text defines.

        Args:
            definition: text of a ``tokenizer.json``.
            name: what messages call it.
            read: gives the text of a file beside it, by its name; None where that is not there.
            marks: what is decided otherwise than the files say.

        Raises:
            DataError: it is no tokenizer, or no token of it ends a document.
        """
        try:
            files = None if read is None else SettingsFiles.read(read)
            return cls(definition, files=files, marks=marks)
        except DataError as error:
            raise DataError(f"tokenizer {name}: {error}") from None
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer {name} is not a tokenizer.json: {error}") from None

    @property
    def document_start(self) -> tuple[str, ...] | None:
        """What a dataset's index says of the start of its documents; None: the usual one."""
        usual = tuple(token for token in USUAL_START if self._tokenizer.token_to_id(token) is not None)
        return None if self.roles.before == usual else self.roles.before

    @property
    def is_marked_as_usual(self) -> bool:
        """Whether documents begin and end as usual names of tokens alone would have it."""
        names = (name for name in ENDS if self._tokenizer.token_to_id(name) is not None)
        return self.document_start is None and self.roles.end == next(names, None)

    def role_id(self, role: str) -> int | None:
        """Id of the token of one of ``ROLES``; None: there is no such token."""
        token = self.roles.token(role)
        return None if token is None else self.id_of(token)

    @cached_property
    def mask_id(self) -> int | None:
        """The token that stands for a masked one."""
        usual = (self._tokenizer.token_to_id(token) for token in MASKS)
        return next((number for number in (self.role_id("mask"), *usual) if number is not None), None)

    @cached_property
    def vocab_size(self) -> int:
        """Token ids are below this, special tokens included; unused ids between them count."""
        return int(max(self._tokenizer.get_vocab(with_added_tokens=True).values())) + 1

    @cached_property
    def sha256(self) -> str:
        """Hash of the definition: equal hashes give equal tokens."""
        return hashlib.sha256(self.definition.encode()).hexdigest()

    @property
    def hash_with_roles(self) -> str:
        """Hash of the definition and the files beside it: equal hashes give equal documents."""
        return hashlib.sha256(json.dumps(self.texts(), sort_keys=True).encode()).hexdigest()

    @property
    def kind(self) -> str:
        """The model, as the definition names it, such as ``BPE``, ``WordPiece`` or ``Unigram``."""
        return type(self._tokenizer.model).__name__

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Names and ids of tokens that no text spells."""
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: number for number, token in sorted(added.items()) if token.special}

    @cached_property
    def special_ids(self) -> NDArray[np.int64]:
        """Ids of special tokens, ascending; ids without a token count to them."""
        known = np.zeros(self.vocab_size, dtype=bool)
        known[list(self._tokenizer.get_vocab(with_added_tokens=True).values())] = True
        known[list(self.special_tokens.values())] = False
        return np.flatnonzero(~known)

    @cached_property
    def continues_word(self) -> NDArray[np.bool_]:
        """[V]: whether a token goes on with the word before it: a letter or digit, and no mark of a word's start."""
        continues = np.zeros(self.vocab_size, dtype=bool)
        prefixed = self.kind == "WordPiece"
        for token, number in self._tokenizer.get_vocab(with_added_tokens=False).items():
            if prefixed:
                continues[number] = token.startswith("##")
            else:
                continues[number] = not token.startswith(_WORD_STARTS) and token[:1].isalnum()
        continues[self.special_ids] = False
        return continues

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without what begins and ends a document.

        Raises:
            DataError: UTF-8 cannot hold the text.
        """
        check_text(text)
        return list(self._as_text(self._tokenizer.encode(text, add_special_tokens=False).ids))

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text that a model is to continue: as a document begins, without its end.

        Where the tokenizer has a chat template, the marks that this writes are tokens in the text too. Any other
        special token that the text spells stays text.
        """
        ids = self.encode(text) if self.chat is None else self.encode_marked(text)
        begun = self.chat is not None and tuple(ids[: len(self.before_ids)]) == self.before_ids
        return (ids if begun else [*self.before_ids, *ids]) or [self.eos_id]

    def encode_marked(self, text: str) -> list[int]:
        """What :meth:`encode` gives, but marks of conversations are tokens: of a text that a template has written.

        Raises:
            DataError: the tokenizer has no chat template and no marks of turns.
        """
        return self._as_text(self._marking(text).ids, self.conversations.mark_ids)

    def encode_conversation(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the assistant begins to speak, as documents of such data begin.

        Args:
            messages: each a mapping of ``role`` and ``content``.

        Raises:
            DataError: the tokenizer has no chat template and no marks of turns, or the template refuses the messages.
        """
        conversations = self.conversations
        for message in messages:
            check_text(message["content"])
            if spelt := [mark for mark in conversations.template.marks if mark in message["content"]]:
                raise DataError(f"a message spells {spelt[0]}, which marks turns; no message may hold it")
        try:
            text = conversations.template.text(messages, add_generation_prompt=True)
        except TemplateRefusal as reason:
            raise DataError(str(reason)) from None
        ids = self.encode_marked(text)
        return ids if tuple(ids[: len(self.before_ids)]) == self.before_ids else [*self.before_ids, *ids]

    @cached_property
    def chat(self) -> ChatTokens | None:
        """The marks of a conversation's turns; None: the tokenizer has no chat template."""
        return chat_of(self._tokenizer, self.roles)

    @cached_property
    def conversations(self) -> ChatTokens:
        """What puts conversations together: the tokenizer's chat template; ChatML where it has that one's marks alone.

        Raises:
            DataError: it has neither.
        """
        return self.chat or chatml_of(self._tokenizer, self.roles)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """What ends a generated text: the end of a document, of an assistant's turn, or what the model's files say."""
        named = self.files.values(GENERATION_FILE).get("eos_token_id")
        ids = {number for number in (named if isinstance(named, list) else [named]) if type(number) is int}
        turn_end = None if self.chat is None else self.chat.turn_end_id
        return frozenset(ids | {self.eos_id} | ({turn_end} if turn_end is not None else set()))

    def rendered(self, document: Document) -> Document | Rejected:
        """A document as it is tokenised: turns are put together by :attr:`conversations`, which may raise."""
        return self.conversations.render(document) if document.is_conversation else document

    def encode_many(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """What :meth:`encode` gives for each of many texts, faster."""
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return (self._as_text(encoding.ids) for encoding in encodings)

    def encode_runs(self, document: Document) -> list[tuple[list[int], bool]]:
        """Tokens of a document of several segments, tokenised as one text, in runs that carry loss or do not."""
        text = "".join(str(segment.text) for segment in document.segments)
        encoding = self._marking(text) if document.marked else self._tokenizer.encode(text, add_special_tokens=False)
        marks = self.conversations.mark_ids if document.marked else frozenset[int]()
        flagged = zip(learnt_tokens(document.segments, encoding.offsets), encoding.ids, strict=True)
        runs = [([n for _, n in run], flag) for flag, run in groupby(flagged, key=itemgetter(0))]
        return [(self._as_text(ids, marks), flag) for ids, flag in runs]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out, and the marks of the chat template."""
        marks = frozenset[int]() if self.chat is None else self.chat.mark_ids
        return str(self._tokenizer.decode([n for n in ids if n not in marks], skip_special_tokens=True))

    def id_of(self, token: str) -> int | None:
        """Id of a token by its name; None: there is none."""
        number = self._tokenizer.token_to_id(token)
        return None if number is None else int(number)

    def name_of(self, number: int) -> str:
        """How the vocabulary spells a token; ``no token`` for an id without one."""
        return str(self._tokenizer.id_to_token(number) or "no token")

    def _marking(self, text: str) -> tokenizers.Encoding:
        """A text with the marks of the chat template as tokens."""
        check_text(text)
        return self.conversations.tokenizer.encode(text, add_special_tokens=False)

    def _as_text(self, ids: list[int], marks: frozenset[int] = frozenset()) -> list[int]:
        """Tokens of a text; where one is a special token, whose name the text spells, those of its characters.

        ``marks`` are special tokens that are meant as such.
        """
        reserved = self._reserved - marks
        if reserved.isdisjoint(ids):
            return ids
        return [part for number in ids for part in (self._spelt(number) if number in reserved else (number,))]

    @cached_property
    def _reserved(self) -> frozenset[int]:
        """Ids that no text may have: of special tokens, but for those that stand for what cannot be spelt."""
        unknown = {getattr(self._tokenizer.model, "unk_token", None), self.roles.unk}
        return frozenset(i for token, i in self.special_tokens.items() if token not in unknown or i == self.eos_id)

    def _spelt(self, number: int) -> list[int]:
        """A special token's name as ordinary words: some models hold it among these."""
        name = self._tokenizer.id_to_token(number) or ""
        parts = [token.id for part in (name[:1], name[1:]) if part for token in self._tokenizer.model.tokenize(part)]
        return [part for part in parts if part not in self._reserved]

    def _id(self, token: str) -> int:
        number = self._tokenizer.token_to_id(token)
        assert number is not None, token
        return int(number)


def check_text(text: object) -> None:
    """Refuse what no tokenizer takes.

    Raises:
        DataError: it is no text, or JSON has spelt half of a surrogate pair in it.
    """
    if not isinstance(text, str):
        raise DataError(f"{type(text).__name__} where a text belongs; a str")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # Python keeps a byte of a command line or a terminal that is no UTF-8 as a surrogate of this range.
        byte = f"the byte {code - 0xDC00:#04x}, which is no UTF-8; text in UTF-8"
        half = f"half of one (the lone surrogate \\u{code:04x}); text that UTF-8 can hold"
        raise DataError(f"character {error.start + 1} is {byte if 0xDC80 <= code <= 0xDCFF else half}") from None


def _text_of(folder: Path, name: str) -> str | None:
    """The text of a file in a folder; None: it is not there."""
    try:
        return (folder / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{folder / name} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{folder / name}: is not text: {error}") from None
