"""Tokenizers as published models bring them ▶ megalm's, and megalm's as the library's ``AutoTokenizer`` loads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megalm.config.schema import Model
from megalm.data.roles import END_OF_TEXT, MASKS, START
from megalm.data.settings_files import SETTINGS_FILE
from megalm.data.tokenizer import TOKENIZER_FILE, Tokenizer
from megalm.data.tokenizer_training import WORDPIECE_SPECIAL
from megalm.errors import DataError

_BPE_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
"""Vocabulary and merges of a byte-level BPE: as Hugging Face, and as OpenAI call the files."""
_WORDPIECE_FILE = "vocab.txt"
_SENTENCEPIECE_FILE = "tokenizer.model"
_ADDED_FILE = "added_tokens.json"
_ROLES_FILE = "special_tokens_map.json"

_END = "[SEP]"
_ORIGINAL_HASH = "megalm_tokenizer_sha256"
"""Where an export notes the tokenizer that it has added the ends of a text to."""

_ROLES = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<|startoftext|>", "<bos>"),
    "unk_token": ("[UNK]", "<unk>"),
    "pad_token": ("[PAD]", "<pad>", "<|padding|>"),
    "cls_token": (START,),
    "sep_token": (_END,),
    "mask_token": MASKS,
}
"""What the library calls roles ▶ what published tokenizers call the tokens that have them."""


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
        definition = _without_processor(definition, settings.get(_ORIGINAL_HASH))
        read = partial(_text_beside, folder, safe)
        return FoundTokenizer(Tokenizer.parse(definition, str(folder), read=read))
    except DataError as error:
        return FoundTokenizer(None, f"left out the tokenizer: {error}")


def save_for_library(tokenizer: Tokenizer, folder: Path, model: Model) -> None:
    """Write ``tokenizer.json`` and the ``tokenizer_config.json`` that ``AutoTokenizer`` wants."""
    tokenizer.save(folder)
    end = tokenizer.roles.end
    processed = None if model.causal else _with_processor(tokenizer.definition)
    if processed is not None:
        (folder / TOKENIZER_FILE).write_text(processed, encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.sequence_length,
        "clean_up_tokenization_spaces": False,
        # Version 4 of the library would give token types to every model: GPT-2 embeds them as words, Llama refuses.
        "model_input_names": ["input_ids", *(["token_type_ids"] if model.token_types else []), "attention_mask"],
        "eos_token": end,
        **_roles(tokenizer),
    }
    if model.causal:
        settings.setdefault("bos_token", end)
    if processed is not None:
        settings[_ORIGINAL_HASH] = tokenizer.sha256
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / SETTINGS_FILE).write_text(text, encoding="utf-8")


def _with_processor(definition: str) -> str | None:
    """A definition that makes of a text what an encoder is trained on, with its start and its end; None: as it is.

    megalm puts both there itself, so that what it trains says nothing of them.
    """
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(definition)
    if tokenizer.post_processor is not None:
        return None
    _mark_ends(tokenizer)
    return None if tokenizer.post_processor is None else str(tokenizer.to_str())


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


def _text_beside(folder: Path, safe: Callable[[Path, str], Path], name: str) -> str | None:
    file = safe(folder, name)
    return _text(file) if file.exists() else None


def special_ids(tokenizer: Tokenizer | None, model: Model) -> dict[str, int | None]:
    """The ids that ``config.json`` names; None where the tokenizer has no such token."""
    if tokenizer is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    ids = {role: tokenizer.special_tokens[token] for role, token in _roles(tokenizer).items()}
    end = tokenizer.eos_id if model.causal else None
    return {"bos_token_id": ids.get("bos_token", end), "eos_token_id": end, "pad_token_id": ids.get("pad_token")}


def _roles(tokenizer: Tokenizer) -> dict[str, str]:
    found = {role: [name for name in names if name in tokenizer.special_tokens] for role, names in _ROLES.items()}
    return {role: names[0] for role, names in found.items() if names}


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

    roles, numbers = (_configured(safe(folder, file)) for file in (_ROLES_FILE, _ADDED_FILE))
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
    _mark_ends(tokenizer)
    return str(tokenizer.to_str())


def _mark_ends(tokenizer: Any) -> None:
    """Let the library begin a text with ``[CLS]`` and end it with ``[SEP]``, where the tokenizer has both."""
    from tokenizers import processors

    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(_END)
    if start is not None and end is not None:
        tokenizer.post_processor = processors.BertProcessing((_END, end), (START, start))


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
    if (folder / _SENTENCEPIECE_FILE).exists():
        return f"{folder / _SENTENCEPIECE_FILE} is SentencePiece's; save it as {TOKENIZER_FILE} with transformers"
    pairs = " or ".join(f"{vocabulary} and {merges}" for vocabulary, merges in _BPE_PAIRS)
    return f"{folder} holds neither {TOKENIZER_FILE} nor {pairs} nor {_WORDPIECE_FILE}"
