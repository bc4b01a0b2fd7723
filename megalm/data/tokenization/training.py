"""Training a tokenizer: byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) or WordPiece (Devlin et al. 2019).

No torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megalm.data.tokenization.library_classes import END_OF_TEXT
from megalm.data.tokenization.roles import Marks
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import DataError

WORDPIECE_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SMALLEST_VOCABULARY = 257
"""Every byte and the end-of-text token."""


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


def with_special_tokens(tokenizer: Tokenizer, names: Sequence[str], *, marks: Marks | None = None) -> Tokenizer:
    """A tokenizer with special tokens added after all others: what it gave before has the same ids.

    Args:
        tokenizer: the one that a model knows.
        names: of the tokens.
        marks: what is decided of a document's marks otherwise than the tokenizer's files say.

    Raises:
        DataError: a token is there already as an ordinary word, whose texts would be cut otherwise.
    """
    import tokenizers

    known = tokenizer.special_tokens
    library = tokenizers.Tokenizer.from_str(tokenizer.definition)
    for name in names:
        number = library.token_to_id(name)
        if number is not None and name not in known:
            raise DataError(f"--special-token {name}: is an ordinary word of this tokenizer, token {number}")
    library.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
    return Tokenizer(str(library.to_str()), files=tokenizer.files, marks=marks)
