"""Roles that classes of Hugging Face's tokenizers give to tokens where no file does, as in older folders. No torch."""

from __future__ import annotations

from megalm.data.tokenization.settings_files import ROLES

END_OF_TEXT = "<|endoftext|>"
"""Ends every document of a byte-level BPE that megalm trains; has the lowest id, 0."""

_Tokens = tuple[str | None, ...]
"""One for each of ``ROLES``, in their order: bos, eos, pad, unk, cls, sep, mask."""
_ALBERT: _Tokens = ("[CLS]", "[SEP]", "<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
_BERT: _Tokens = (None, None, "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_DEBERTA: _Tokens = ("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_GEMMA: _Tokens = ("<bos>", "<eos>", "<pad>", "<unk>", None, None, "<mask>")
_GPT2: _Tokens = (END_OF_TEXT, END_OF_TEXT, None, END_OF_TEXT, None, None, None)
_GPT_NEOX: _Tokens = (END_OF_TEXT, END_OF_TEXT, "<|padding|>", END_OF_TEXT, None, None, None)
_LLAMA: _Tokens = ("<s>", "</s>", None, "<unk>", None, None, None)
_MPNET: _Tokens = ("<s>", "</s>", "<pad>", "[UNK]", "<s>", "</s>", "<mask>")
_NONE: _Tokens = (None,) * len(ROLES)
_QWEN2: _Tokens = (None, END_OF_TEXT, END_OF_TEXT, END_OF_TEXT, None, None, None)
_ROBERTA: _Tokens = ("<s>", "</s>", "<pad>", "<unk>", "<s>", "</s>", "<mask>")
_T5: _Tokens = (None, "</s>", "<pad>", "<unk>", None, None, None)
_BY_CLASS: dict[str, _Tokens] = {
    "tokenizersbackend": _NONE,
    "pretrained": _NONE,
    **dict.fromkeys(("albert", "rembert"), _ALBERT),
    **dict.fromkeys(("bert", "convbert", "distilbert", "electra", "layoutlm", "mobilebert", "squeezebert"), _BERT),
    **dict.fromkeys(("deberta", "debertav2"), _DEBERTA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3text"), _GEMMA),
    **dict.fromkeys(("codegen", "gpt2", "gptj", "gptneo"), _GPT2),
    "gptneox": _GPT_NEOX,
    **dict.fromkeys(("codellama", "llama", "mistral", "mixtral"), _LLAMA),
    "mpnet": _MPNET,
    **dict.fromkeys(("qwen2", "qwen3"), _QWEN2),
    **dict.fromkeys(("bart", "blenderbot", "camembert", "longformer", "mbart", "roberta", "xlmroberta"), _ROBERTA),
    **dict.fromkeys(("mt5", "pegasus", "t5"), _T5),
}
"""Names of classes, without what all are called, and types of models that are tokenised by them ▶ their roles."""


def class_roles(name: object) -> dict[str, str | None] | None:
    """Roles ▶ tokens of a class; None: it is not known.

    Args:
        name: ``tokenizer_class`` of a ``tokenizer_config.json``, or ``model_type`` of a ``config.json``.
    """
    if not isinstance(name, str):
        return None
    kind = name.lower().replace("_", "").replace("-", "")
    kind = kind if kind in _BY_CLASS else kind.removesuffix("fast").removesuffix("tokenizer")
    tokens = _BY_CLASS.get(kind)
    return None if tokens is None else dict(zip(ROLES, tokens, strict=True))
