"""Tokenizers as published models bring them ▶ megalm's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.convert.huggingface.library_tokenizer import ORIGINAL_HASH, TEMPLATES_FOLDER, mark_ends
from megalm.convert.huggingface.token_ids import TokenIds
from megalm.data.tokenization.roles import END_OF_TEXT
from megalm.data.tokenization.settings_files import GENERATION_FILE, SETTINGS_FILE, SPECIAL_FILE, TEMPLATE_FILE
from megalm.data.tokenization.tokenizer import TOKENIZER_FILE, Tokenizer
from megalm.data.tokenization.training import WORDPIECE_SPECIAL
from megalm.errors import DataError

_OPENAI = ("encoder.json", "vocab.bpe")
_BPE_PAIRS = (("vocab.json", "merges.txt"), _OPENAI)
"""Vocabulary and merges of a byte-level BPE: as Hugging Face, and as OpenAI call the files."""
_WORDPIECE_FILE = "vocab.txt"
_SENTENCEPIECE_FILES = ("tokenizer.model", "sentencepiece.bpe.model", "spiece.model")
"""As Llama, XLM-R and T5 call them."""
_ADDED_FILE = "added_tokens.json"


@dataclass(frozen=True)
class FoundTokenizer:
    """The tokenizer of a folder.

    Attributes:
        tokenizer: None where there is none that megalm can use.
        note: why not, or what a user should know; empty: all is well.
    """

    tokenizer: Tokenizer | None
    note: str = ""


def find_tokenizer(folder: Path | None, *, safe: Callable[[Path, str], Path]) -> FoundTokenizer:
    """The tokenizer that a folder holds in one form or another.

    Args:
        folder: None: there is none.
        safe: gives the path of a file in the folder, or raises where it leaves it.
    """
    if folder is None:
        return FoundTokenizer(None, "no tokenizer: none lies with the weights")
    try:
        definition = _definition(folder, safe)
        if definition is None:
            return FoundTokenizer(None, f"no tokenizer: {_why_none(folder)}")
        settings = _configured(safe(folder, SETTINGS_FILE))
        definition = _without_processor(definition, settings.get(ORIGINAL_HASH))
        return FoundTokenizer(Tokenizer.parse(definition, str(folder), read=_Beside(folder, safe)))
    except DataError as error:
        return FoundTokenizer(None, f"left out the tokenizer: {error}")


def _without_processor(definition: str, original: object) -> str:
    """The tokenizer that an export has added ends to, by the hash it noted: data were made with that one."""
    import tokenizers

    if not isinstance(original, str):
        return definition
    try:
        tokenizer = tokenizers.Tokenizer.from_str(definition)
    except Exception:  # the library raises bare Exception; whoever parses it next says what is wrong
        return definition
    tokenizer.post_processor = None
    text = str(tokenizer.to_str())
    return text if hashlib.sha256(text.encode()).hexdigest() == original else definition


class _Beside:
    """Texts of the files beside a tokenizer, by their names.

    What a run has no place for is said in a file that it has: chat templates of other names than ``default`` lie in a
    folder of their own, and ends of a text may be named in the model's ``config.json`` alone.
    """

    def __init__(self, folder: Path, safe: Callable[[Path, str], Path]) -> None:
        self._folder, self._safe = folder, safe

    def __call__(self, name: str) -> str | None:
        """The text of a file; None: it is not there."""
        file = self._safe(self._folder, name)
        text = _text(file) if file.exists() else None
        if name == SETTINGS_FILE:
            return self._settings(text)
        if name == GENERATION_FILE and text is None:
            ids = TokenIds.of_folder(self._folder, self._safe)
            return json.dumps({"eos_token_id": ids.ends}) if ids is not None and len(ids.ends) > 1 else None
        return text

    def _settings(self, text: str | None) -> str | None:
        if text is None and (self._folder / _OPENAI[0]).exists() and not (self._folder / TOKENIZER_FILE).exists():
            return json.dumps({"tokenizer_class": "GPT2Tokenizer"})  # OpenAI's own files: no others are called so
        others = self._folder / TEMPLATES_FOLDER
        named = [] if others.is_symlink() else sorted(others.glob("*.jinja"))
        default = self._safe(self._folder, TEMPLATE_FILE)
        if not named or not default.exists():
            return text
        files = {"default": default} | {file.stem: self._safe(others, file.name) for file in named}
        templates = [{"name": name, "template": _text(file)} for name, file in files.items()]
        return json.dumps({**json.loads(text or "{}"), "chat_template": templates}, indent=2, ensure_ascii=False)


def _definition(folder: Path, safe: Callable[[Path, str], Path]) -> str | None:
    """The text of a ``tokenizer.json``, or of one made from older files; None where there are neither."""
    file = safe(folder, TOKENIZER_FILE)
    if file.exists():
        return _text(file)
    for vocabulary, merges in _BPE_PAIRS:
        if (folder / vocabulary).exists() and (folder / merges).exists():
            return _with_added(byte_level_bpe(safe(folder, vocabulary), safe(folder, merges)), folder, safe)
    file = safe(folder, _WORDPIECE_FILE)
    if file.exists():
        lowercase = _configured(safe(folder, SETTINGS_FILE)).get("do_lower_case", True)
        return _with_added(wordpiece(file, lowercase=bool(lowercase)), folder, safe)
    return None


def _with_added(definition: str, folder: Path, safe: Callable[[Path, str], Path]) -> str:
    """A definition with the tokens that were added to a published vocabulary, in files beside it.

    Raises:
        DataError: their ids are not those that follow the vocabulary.
    """
    import tokenizers

    roles, numbers = (_configured(safe(folder, file)) for file in (SPECIAL_FILE, _ADDED_FILE))
    described = _configured(safe(folder, SETTINGS_FILE)).get("added_tokens_decoder")
    described = described if isinstance(described, dict) else {}
    special = set(filter(None, map(_content, _flat(roles.values()))))
    added = {name: number for name, number in numbers.items() if type(number) is int}
    for number, token in described.items():
        name = _content(token)
        if name and number.isdecimal():
            added[name] = int(number)
            special |= {name} if isinstance(token, dict) and token.get("special") is True else set()
    tokenizer = tokenizers.Tokenizer.from_str(definition)
    added |= {name: number for name in special if (number := tokenizer.token_to_id(name)) is not None}
    for name, number in sorted(added.items(), key=lambda item: item[1]):
        token = tokenizers.AddedToken(name, normalized=name not in special, special=name in special)
        (tokenizer.add_special_tokens if name in special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(name) != number:
            raise DataError(
                f"{folder}: added token {name}={number} does not follow the vocabulary, where it would be "
                f"{tokenizer.token_to_id(name)}; save it as {TOKENIZER_FILE} with transformers"
            )
    return str(tokenizer.to_str())


def _content(token: object) -> str | None:
    """The text of a token, given as such or as the library describes one."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def _flat(values: Iterable[object]) -> list[object]:
    return [one for value in values for one in (value if isinstance(value, list) else [value])]


def byte_level_bpe(vocabulary: Path, merges: Path) -> str:
    """The ``tokenizer.json`` of GPT-2's tokenizer, of the files that it was published as.

    Raises:
        DataError: the files are not what they should be.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    try:
        words, pairs = models.BPE.read_file(str(vocabulary), str(merges))
        tokenizer = tokenizers.Tokenizer(models.BPE(words, pairs))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{vocabulary}, {merges}: no vocabulary and merges of a BPE: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    _mark_special(tokenizer, (END_OF_TEXT,))
    return str(tokenizer.to_str())


def wordpiece(vocabulary: Path, *, lowercase: bool) -> str:
    """The ``tokenizer.json`` of BERT's tokenizer, of its ``vocab.txt``.

    Raises:
        DataError: the file is not what it should be.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    try:
        words = models.WordPiece.read_file(str(vocabulary))
        tokenizer = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{vocabulary}: no vocabulary of a WordPiece: {error}") from None
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _mark_special(tokenizer, WORDPIECE_SPECIAL)
    mark_ends(tokenizer)
    return str(tokenizer.to_str())


def _mark_special(tokenizer: Any, names: tuple[str, ...]) -> None:
    from tokenizers import AddedToken

    known = [name for name in names if tokenizer.token_to_id(name) is not None]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in known])


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None


def _configured(settings: Path) -> Mapping[str, Any]:
    """A ``tokenizer_config.json``; empty where there is none that can be read."""
    try:
        values = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _why_none(folder: Path) -> str:
    for file in _SENTENCEPIECE_FILES:
        if (folder / file).exists():
            return f"{folder / file} is SentencePiece's; save it as {TOKENIZER_FILE} with transformers"
    pairs = " or ".join(f"{vocabulary} and {merges}" for vocabulary, merges in _BPE_PAIRS)
    return f"{folder} holds neither {TOKENIZER_FILE} nor {pairs} nor {_WORDPIECE_FILE}"
