"""Tokenizers: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019), WordPiece (Devlin et al. 2019), or any that
comes as a Hugging Face ``tokenizer.json``, which is also how megalm stores them. No torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megalm.data.document import Document
from megalm.errors import DataError

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
"""What Hugging Face's libraries keep beside a tokenizer: here the name of the token that ends a document."""
END_OF_TEXT = "<|endoftext|>"
"""Ends every document of a byte-level BPE that megalm trains; has the lowest id, 0."""
ENDS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
"""What published tokenizers call the token that ends a document; the first that a tokenizer has is taken."""
START = "[CLS]"
"""Begins every document, where a tokenizer has it."""
MASKS = ("[MASK]", "<mask>")
"""What published tokenizers call the token that stands for a masked one."""
WORDPIECE_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SMALLEST_VOCABULARY = 257
"""Every byte and the end-of-text token."""
_WORD_STARTS = ("Ġ", "▁", " ", "Ċ", "ĉ")
"""What the first token of a word begins with, where it is not ``##`` that marks the others."""


class Tokenizer:
    """Text ▶ token ids ▶ text; a byte-level BPE without loss for any UTF-8 text.

    Text that spells a special token stays text: a document about ``<|endoftext|>`` does not end there.
    """

    def __init__(self, definition: str, *, eos: str | None = None, eos_id: int | None = None) -> None:
        """Take the text of a ``tokenizer.json``; the end of a document by name, by id, or (None) by its usual names."""
        # One process per core is how megalm tokenises; threads inside each would only compete.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        self.definition = definition
        self._tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(definition)
        self._tokenizer.encode_special_tokens = True
        # Many a published tokenizer.json cuts or pads texts at its model's length; no token may be lost.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos_id = self._find_end(eos) if eos_id is None else eos_id
        self.start_id: int | None = self._tokenizer.token_to_id(START)
        self.mask_id: int | None = next((i for i in map(self._tokenizer.token_to_id, MASKS) if i is not None), None)

    @classmethod
    def load(cls, path: str | Path, *, eos: str | None = None) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Args:
            path: of the file.
            eos: the token that ends a document; None: the ``eos_token`` of a ``tokenizer_config.json`` beside the file,
                as Hugging Face lays them out, or a usual name.

        Raises:
            DataError: the file is missing or is no tokenizer, or no token of it ends a document.
        """
        try:
            definition = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise DataError(f"tokenizer {path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"tokenizer {path} is not a tokenizer.json: {error}") from None
        return cls.parse(definition, str(path), eos=_configured_end(Path(path).parent) if eos is None else eos)

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json`` and, for the token that ends a document, ``tokenizer_config.json`` beside it."""
        (folder / TOKENIZER_FILE).write_text(self.definition, encoding="utf-8")
        settings = {"eos_token": self._tokenizer.id_to_token(self.eos_id)}
        (folder / SETTINGS_FILE).write_text(json.dumps(settings, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def parse(cls, definition: str, name: str, *, eos: str | None = None, eos_id: int | None = None) -> Tokenizer:
        """The tokenizer that a text defines; ``name`` is what messages call it."""
        try:
            return cls(definition, eos=eos, eos_id=eos_id)
        except DataError as error:
            raise DataError(f"tokenizer {name}: {error}") from None
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer {name} is not a tokenizer.json: {error}") from None

    @cached_property
    def vocab_size(self) -> int:
        """Token ids are below this, special tokens included; unused ids between them count."""
        return int(max(self._tokenizer.get_vocab(with_added_tokens=True).values())) + 1

    @cached_property
    def sha256(self) -> str:
        """Hash of the definition: equal hashes give equal tokens."""
        return hashlib.sha256(self.definition.encode()).hexdigest()

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
        """Token ids of one text, without an end-of-text token."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_documents(
        self, documents: Sequence[Document]
    ) -> tuple[NDArray[np.uint32], NDArray[np.int64], NDArray[np.uint8] | None]:
        """Tokens of many documents, end to end, each with its start token, if there is one, and its end token.

        Returns:
            The tokens, [T]; the length of each document, [D]; and [T], 1 where a token carries loss: those of segments
            that are learnt, and the end after one; None where all are.

        Raises:
            DataError: a segment names a special token that the tokenizer has not.
        """
        texts = [str(s.text) for document in documents for s in document.segments if not s.special]
        encoded = iter(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        parts: list[Sequence[int]] = []
        learnt: list[bool] = []
        lengths = np.zeros(len(documents), dtype=np.int64)
        for number, document in enumerate(documents):
            before = len(parts)
            if self.start_id is not None:
                parts.append((self.start_id,))
                learnt.append(document.segments[0].learnt)
            for segment in document.segments:
                parts.append((self._special_id(str(segment.text)),) if segment.special else next(encoded).ids)
                learnt.append(segment.learnt)
            parts.append((self.eos_id,))
            learnt.append(document.segments[-1].learnt)
            lengths[number] = sum(map(len, parts[before:]))
        flat = np.empty(int(lengths.sum()), dtype=np.uint32)
        start = 0
        for part in parts:
            flat[start : start + len(part)] = part
            start += len(part)
        mask = None if all(learnt) else np.repeat(np.array(learnt, dtype=np.uint8), [len(part) for part in parts])
        return flat, lengths, mask

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def name_of(self, number: int) -> str:
        """How the vocabulary spells a token; ``no token`` for an id without one."""
        return str(self._tokenizer.id_to_token(number) or "no token")

    def _find_end(self, eos: str | None) -> int:
        for name in ENDS if eos is None else (eos,):
            number = self._tokenizer.token_to_id(name)
            if number is not None:
                return int(number)
        has = ", ".join(self.special_tokens) or "no special tokens at all"
        if eos is not None:
            raise DataError(f"--eos {eos}: it has no such token; it has {has}")
        raise DataError(f"no token of it is known to end a document (it has {has}); name one with --eos")

    def _special_id(self, name: str) -> int:
        number = self._tokenizer.token_to_id(name)
        if number is None:
            raise DataError(
                f"the tokenizer has no token {name}, which marks turns of a conversation; train one with "
                "tools/train_tokenizer.py --special-token '<|im_start|>' '<|im_end|>'"
            )
        return int(number)


def _configured_end(folder: Path) -> str | None:
    """The ``eos_token`` of a folder's ``tokenizer_config.json``, as a name or as Hugging Face's description of one."""
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    end = settings.get("eos_token") if isinstance(settings, dict) else None
    end = end.get("content") if isinstance(end, dict) else end
    return end if isinstance(end, str) else None


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's splitting rule; the same texts give the same tokenizer.

    Args:
        texts: what to learn from.
        vocab_size: tokens, special ones included.
        special_tokens: besides the end-of-text token.

    Raises:
        DataError: the vocabulary has no room for the 256 bytes and the special tokens.
    """
    smallest = SMALLEST_VOCABULARY + len(special_tokens)
    if vocab_size < smallest:
        raise DataError(f"vocab_size={vocab_size}: too small for 256 bytes and {END_OF_TEXT}; at least {smallest}")
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *special_tokens],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer.to_str())


def train_wordpiece(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (), *, lowercase: bool = False
) -> Tokenizer:
    """Train a WordPiece as BERT's: words split at spaces and punctuation, parts after the first begin with ``##``.

    Characters that are not among the most frequent become ``[UNK]``, so text is not always recovered from tokens.

    Args:
        texts: what to learn from.
        vocab_size: tokens, special ones included.
        special_tokens: besides ``[PAD]``, ``[UNK]``, ``[CLS]``, ``[SEP]`` and ``[MASK]``.
        lowercase: fold case and strip accents, as BERT's uncased models do.

    Raises:
        DataError: the vocabulary is too small for an alphabet.
    """
    special = [*WORDPIECE_SPECIAL, *special_tokens]
    smallest = len(special) + 100
    if vocab_size < smallest:
        raise DataError(f"vocab_size={vocab_size}: too small for special tokens and an alphabet; at least {smallest}")
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        limit_alphabet=min(1000, vocab_size // 3),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer.to_str())
