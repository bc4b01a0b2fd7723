"""A ``tokenizer.json`` that puts around a text what megalm puts around a document: for programs that read it alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import models, processors

from megalm.data.tokenization.roles import around


def with_marks(definition: str, before: Sequence[str], after: Sequence[str]) -> str:
    """A definition whose post-processor puts these tokens around a text; the same text where it does that already.

    Args:
        definition: text of a ``tokenizer.json``.
        before: tokens that go before a text.
        after: tokens that go after one.
    """
    tokenizer = tokenizers.Tokenizer.from_str(definition)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if around(tokenizer) == (tuple(before), tuple(after)):
        return definition
    # The library would write a Unigram's scores anew, some with another last digit; here all else stays as it is.
    contents = json.loads(definition)
    parts: list[Any] = _byte_levels(contents.get("post_processor"))
    if before or after:
        parts.append(_template(tokenizer, before, after))
    contents["post_processor"] = _described(parts)
    return json.dumps(contents, indent=2, ensure_ascii=False)


def _described(parts: Sequence[Any]) -> Any:
    """Post-processors, one after the other, as a ``tokenizer.json`` has them."""
    if not parts:
        return None
    bare = tokenizers.Tokenizer(models.BPE())
    bare.post_processor = parts[0] if len(parts) == 1 else processors.Sequence(list(parts))
    return json.loads(bare.to_str())["post_processor"]


def _template(tokenizer: tokenizers.Tokenizer, before: Sequence[str], after: Sequence[str]) -> Any:
    """Of a pair, the second text ends as the first does, and both share what begins them."""
    return processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, "$B:1", *(f"{token}:1" for token in after)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((*before, *after))],
    )


def _byte_levels(described: Any) -> list[Any]:
    """The parts of a post-processor that map bytes to places in a text, and add no tokens."""
    if not isinstance(described, dict):
        return []
    if described.get("type") == "ByteLevel":
        names = ("add_prefix_space", "trim_offsets", "use_regex")
        return [processors.ByteLevel(**{name: described[name] for name in names if name in described})]
    return [part for inside in described.get("processors", []) for part in _byte_levels(inside)]
