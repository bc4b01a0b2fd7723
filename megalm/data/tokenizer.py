"""Byte-level BPE tokenizers (Sennrich et al. 2016; Radford et al. 2019), stored as Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megalm.errors import DataError

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
"""Ends every document; has the lowest id that training gives out, 0."""
SMALLEST_VOCABULARY = 257
"""Every byte and the end-of-text token."""


class Tokenizer:
    """Text ▶ token ids ▶ text, without loss for any UTF-8 text.

    Text that spells a special token stays text: a document about ``<|endoftext|>`` does not end there.
    """

    def __init__(self, definition: str) -> None:
        """``definition`` is the text of a ``tokenizer.json``."""
        # One process per core is how megalm tokenises; threads inside each would only compete.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        self.definition = definition
        self._tokenizer: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(definition)
        self._tokenizer.encode_special_tokens = True
        # Many a published tokenizer.json cuts or pads texts at its model's length; no token may be lost.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        eos = self._tokenizer.token_to_id(END_OF_TEXT)
        if eos is None:
            raise DataError(f"the tokenizer has no {END_OF_TEXT} token; train one with tools/train_tokenizer.py")
        self.eos_id = int(eos)
        self._vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a ``tokenizer.json``.

        Raises:
            DataError: the file is missing or is no tokenizer.
        """
        try:
            return cls(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"tokenizer {path} cannot be read: {error.strerror}") from None
        except DataError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"tokenizer {path} is not a tokenizer.json: {error}") from None

    @property
    def vocab_size(self) -> int:
        """Token ids are below this, special tokens included; unused ids between them count."""
        return self._vocab_size

    @property
    def sha256(self) -> str:
        """Hash of the definition: equal hashes give equal tokens."""
        return hashlib.sha256(self.definition.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without an end-of-text token."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_documents(self, texts: Sequence[str]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Tokens of many documents, each followed by end-of-text, end to end; and the length of each."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        lengths = np.array([len(e.ids) + 1 for e in encodings], dtype=np.int64)
        flat = np.empty(int(lengths.sum()), dtype=np.uint32)
        start = 0
        for encoding, length in zip(encodings, lengths.tolist(), strict=True):
            flat[start : start + length - 1] = encoding.ids
            flat[start + length - 1] = self.eos_id
            start += length
        return flat, lengths

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's splitting rule; the same texts give the same tokenizer.

    Raises:
        DataError: the vocabulary has no room for the 256 bytes and the end-of-text token.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise DataError(
            f"vocab_size={vocab_size}: too small for 256 bytes and {END_OF_TEXT}; at least {SMALLEST_VOCABULARY}"
        )
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer.to_str())
