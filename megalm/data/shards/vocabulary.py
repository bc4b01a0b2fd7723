"""Whether two tokenizers give the same ids: the one check wherever a model meets data or a tokenizer. No torch.

Equal hashes of the definitions give equal tokens. Where the hashes differ, the definitions are compared: two files may
say the same in other words, and one tokenizer may be the other with tokens added, as marks for the turns of a chat.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from megalm.data.shards.index import read_index
from megalm.data.shards.store import MissingFile, Store
from megalm.data.tokenization.tokenizer import TOKENIZER_FILE, Tokenizer
from megalm.errors import DataError

_GIVES_NO_IDS = ("version", "truncation", "padding", "post_processor", "decoder", "added_tokens", "model")
"""Parts of a ``tokenizer.json`` that do not decide which id a stretch of text gets, or are compared on their own."""
_SPOKEN_TOKENS = 5
"""Added tokens that a message names."""


class Relation(StrEnum):
    """What a tokenizer is to another one."""

    SAME = "same"
    """Every text has the same ids."""
    GROWN = "grown"
    """The other one with tokens added: what both have has the same ids."""
    OTHER = "other"
    """Ids mean other things."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer, as it is compared and named in messages.

    Attributes:
        where: the file, or what recorded it.
        size: token ids are below this.
        sha256: of the definition.
        definition: the text of its ``tokenizer.json``; None where only its hash is known.
    """

    where: str
    size: int
    sha256: str
    definition: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, tokenizer: Tokenizer, where: object) -> Vocabulary:
        """That of a tokenizer which lies at ``where``."""
        return cls(str(where), tokenizer.vocab_size, tokenizer.sha256, tokenizer.definition)

    @classmethod
    def of_dataset(cls, store: Store, split: str = "train") -> Vocabulary:
        """That of a prepared dataset; its index vouches for the hash.

        Raises:
            DataError: the index is missing or damaged.
        """
        index = read_index(store.below(split))
        try:
            data = store.read(TOKENIZER_FILE)
        except MissingFile:
            data = b""
        is_whole = hashlib.sha256(data).hexdigest() == index.tokenizer_sha256
        definition = data.decode("utf-8", errors="replace") if is_whole else None
        return cls(store.path_of(TOKENIZER_FILE), index.vocab_size, index.tokenizer_sha256, definition)

    @classmethod
    def parse(cls, definition: str, where: str) -> Vocabulary:
        """That of a ``tokenizer.json``; only its size is taken of it.

        Raises:
            DataError: it is no tokenizer.
        """
        size = max(_ids(_load(definition, where)).values(), default=-1) + 1
        return cls(where, size, hashlib.sha256(definition.encode()).hexdigest(), definition)

    def __str__(self) -> str:
        return f"{self.where} ({self.size:,} tokens, sha256 {self.sha256[:12]})"


def relation(old: Vocabulary, new: Vocabulary) -> Relation:
    """What a tokenizer is to the one that a model was trained with.

    Raises:
        DataError: a definition is no tokenizer.
    """
    if old.sha256 == new.sha256:
        return Relation.SAME
    if old.definition is None or new.definition is None:
        return Relation.OTHER
    before, after = _load(old.definition, old.where), _load(new.definition, new.where)
    mine, theirs = _ids(before), _ids(after)
    if any(theirs.get(token) != number for token, number in mine.items()) or _rules(before) != _rules(after):
        return Relation.OTHER
    added = _added(after)
    known = _added(before)
    if any(added.get(token) != how for token, how in known.items()):
        return Relation.OTHER
    extra = theirs.keys() - mine.keys()
    if extra <= added.keys():
        # A token that was an ordinary word and is cut out of text now changes the ids of text that the model knows.
        return (Relation.GROWN if extra else Relation.SAME) if added.keys() - known.keys() <= extra else Relation.OTHER
    return Relation.OTHER


def added_tokens(old: Vocabulary, new: Vocabulary) -> tuple[str, ...]:
    """The tokens that a grown tokenizer has and the old one has not, by id."""
    assert old.definition is not None and new.definition is not None
    mine, theirs = (_ids(_load(each.definition or "", each.where)) for each in (old, new))
    return tuple(sorted(theirs.keys() - mine.keys(), key=theirs.__getitem__))


def beyond(vocabulary: Vocabulary, rows: int) -> tuple[list[str], list[str]]:
    """The tokens whose ids a model of so many rows has no embedding of: ordinary words, and added tokens."""
    parts = _load(vocabulary.definition or "", vocabulary.where)
    added, ids = _added(parts), _ids(parts)
    missing = sorted((token for token, number in ids.items() if number >= rows), key=ids.__getitem__)
    return [token for token in missing if token not in added], [token for token in missing if token in added]


def spoken(tokens: Sequence[str]) -> str:
    """Added tokens in words: ``2 tokens added (<|im_start|>, <|im_end|>)``."""
    more = ", …" if len(tokens) > _SPOKEN_TOKENS else ""
    plural = "s" if len(tokens) != 1 else ""
    return f"{len(tokens):,} token{plural} added ({', '.join(tokens[:_SPOKEN_TOKENS])}{more})"


def check_same(model: Vocabulary, data: Vocabulary, what: str, why: str) -> None:
    """Refuse data of another tokenizer than a model's, where neither may change.

    Args:
        model: the tokenizer that the model was trained with.
        data: the one that made the data.
        what: the data, as the message begins.
        why: what other ids would do.

    Raises:
        DataError: naming both, and what helps.
    """
    found = relation(model, data)
    # Data from before the model's tokens were added have no other ids than the model knows.
    if found is Relation.SAME or (found is Relation.OTHER and relation(data, model) is Relation.GROWN):
        return
    remedy = f"prepare the text again with --tokenizer {model.where}"
    if found is Relation.GROWN:
        remedy = (
            f"it is the model's with {spoken(added_tokens(model, data))}: a new run with checkpoint.finetune_from or "
            f"checkpoint.init_from and checkpoint.extend_vocab=true learns them; or {remedy}"
        )
    raise DataError(f"{what}: made by another tokenizer than the model's, {why}: {data}, not {model}; {remedy}")


def _load(definition: str, where: str) -> dict[str, Any]:
    """A definition as the library writes it: old files spell the same things in other ways."""
    import tokenizers

    try:
        parts: dict[str, Any] = json.loads(tokenizers.Tokenizer.from_str(definition).to_str())
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"tokenizer {where} is not a tokenizer.json: {error}") from None
    return parts


def _rules(parts: dict[str, Any]) -> dict[str, Any]:
    """All that decides how a text is cut, the vocabulary aside: an added token may stand there as well."""
    others = {name: value for name, value in parts.items() if name not in _GIVES_NO_IDS}
    model = {name: value for name, value in parts["model"].items() if name != "vocab"}
    return {**others, "model": model, "scores": _scores(parts)}


def _scores(parts: dict[str, Any]) -> dict[str, float]:
    """A Unigram model's score of each of its pieces that is no added token."""
    vocabulary, added = parts["model"].get("vocab"), _added(parts)
    if not isinstance(vocabulary, list):
        return {}
    return {piece: score for piece, score in vocabulary if piece not in added}


def _ids(parts: dict[str, Any]) -> dict[str, int]:
    """Every token's id, added ones included."""
    vocabulary = parts["model"].get("vocab") or {}
    own = {piece: n for n, (piece, _) in enumerate(vocabulary)} if isinstance(vocabulary, list) else vocabulary
    return own | {token["content"]: token["id"] for token in parts["added_tokens"]}


def _added(parts: dict[str, Any]) -> dict[str, tuple[int, bool, bool, bool, bool]]:
    """Added tokens, each with what decides where in a text it is found."""
    return {
        token["content"]: (
            token["id"],
            token["single_word"],
            token["lstrip"],
            token["rstrip"],
            token["normalized"],
        )
        for token in parts["added_tokens"]
    }
