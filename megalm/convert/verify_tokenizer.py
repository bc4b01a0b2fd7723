"""Checks that a conversion kept the tokenizer: tokens, their roles, ids, and chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megalm.convert.huggingface.token_ids import TokenIds
from megalm.convert.verify import LIBRARY, has_library
from megalm.data.shards.vocabulary import Relation, Vocabulary, relation
from megalm.data.tokenization.settings_files import ROLES
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import CheckpointError

_SAMPLES = ("It's 7 o'clock; naïve ☃ snowmen.\n\n\tdef f(x): return x**2", " two  spaces", "")
"""Texts with which the library's tokenizers are compared."""


def compare_tokenizers(source: Tokenizer, target: Tokenizer | None, *, source_at: Path, target_at: Path) -> str:
    """What was found of a tokenizer in a source and in what was written, read again; in words.

    Raises:
        CheckpointError: naming everything in which they differ.
    """
    if target is None:
        raise CheckpointError("the tokenizer was written, and cannot be read again")
    found = relation(Vocabulary.of(source, source_at), Vocabulary.of(target, target_at))
    problems = [] if found is Relation.SAME else ["the tokenizer written is not the one that was read: ids differ"]
    pairs: dict[str, tuple[object, object]] = {
        f"{role}_token": (source.roles.token(role), target.roles.token(role)) for role in ROLES
    }
    pairs |= {f"{role}_token's id": (source.role_id(role), target.role_id(role)) for role in ROLES}
    pairs["start of a document"] = source.roles.before, target.roles.before
    pairs["end of a document"] = source.roles.end, target.roles.end
    pairs["special tokens"] = source.special_tokens, target.special_tokens
    pairs["chat template"] = source.roles.chat_template, target.roles.chat_template
    problems += _differences(pairs)
    if problems:
        raise CheckpointError("\n".join(problems))
    roles = [f"{role} {token}" for role in ROLES if (token := source.roles.token(role)) is not None]
    template = "the chat template" if source.roles.chat_template is not None else "no chat template"
    return f"tokenizer: {', '.join(roles) or 'no roles'}; {len(source.special_tokens)} special tokens; {template}"


def compare_ids(source: TokenIds | None, target: TokenIds | None) -> None:
    """Check that the special-token ids of the source were written.

    Raises:
        CheckpointError: naming everything in which they differ.
    """
    if source is None or target is None:
        return
    pairs: dict[str, tuple[object, object]] = {
        f"config.json: {key}": (source.config.get(key, "absent"), target.config.get(key, "absent"))
        for key in {**source.config, **target.config}
    }
    pairs["generation_config.json"] = source.generation, target.generation
    if problems := _differences(pairs):
        raise CheckpointError("\n".join(problems))


def compare_by_library(source: Path, target: Path) -> str | None:
    """The same as the library sees it, of two Hugging Face folders; None: it is not there, or loads no tokenizer.

    Raises:
        CheckpointError: naming everything in which they differ.
    """
    if not has_library():
        return None
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(source)
    except Exception:  # a folder that the library makes no tokenizer of proves nothing
        return None
    ours = AutoTokenizer.from_pretrained(target)
    names = ("special_tokens_map", "all_special_ids", "chat_template", "model_max_length", "padding_side")
    pairs: dict[str, tuple[Any, Any]] = {name: (getattr(theirs, name), getattr(ours, name)) for name in names}
    pairs |= {f"ids of {text!r}": (theirs(text).input_ids, ours(text).input_ids) for text in _SAMPLES}
    if problems := _differences({f"{LIBRARY}: {name}": pair for name, pair in pairs.items()}):
        raise CheckpointError("\n".join(problems))
    return f"{LIBRARY} loads the same tokenizer from both"


def _differences(pairs: dict[str, tuple[object, object]]) -> list[str]:
    return [f"{name}: {was!r} was read, {now!r} written" for name, (was, now) in pairs.items() if was != now]
