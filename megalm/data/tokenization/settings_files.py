"""The files beside a ``tokenizer.json``, which say what its tokens are for. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megalm.errors import DataError

if TYPE_CHECKING:
    import tokenizers

SETTINGS_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
MODEL_FILE = "config.json"
"""A model's; it is read for the id of its end of a text, and never kept with a tokenizer."""
ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
"""What tokens are for, as the files call it: ``bos_token`` and so on."""
KEPT_FILES = (SETTINGS_FILE, SPECIAL_FILE, GENERATION_FILE, TEMPLATE_FILE)
"""What goes with a ``tokenizer.json`` wherever that goes."""


@dataclass(frozen=True)
class SettingsFiles:
    """The files beside a ``tokenizer.json``.

    Attributes:
        texts: names of ``KEPT_FILES`` that are there ▶ their texts.
        model: contents of the model's ``config.json``; empty: there is none.
    """

    texts: Mapping[str, str] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, read: Callable[[str], str | None]) -> SettingsFiles:
        """Read them by their names with ``read``, which gives None for a missing file.

        Raises:
            DataError: one is not JSON of the kind that it should be.
        """
        texts = {name: text for name in KEPT_FILES if (text := read(name)) is not None}
        for name, kept in texts.items():
            if name.endswith(".json"):
                parse_object(kept, name)
        text = read(MODEL_FILE)
        try:
            model = {} if text is None else parse_object(text, MODEL_FILE)
        except DataError:  # whoever reads the model says so; a tokenizer's folder may hold another program's file
            model = {}
        return cls(texts, model)

    def values(self, name: str) -> dict[str, Any]:
        """Contents of a JSON file; empty where it is not there."""
        return parse_object(self.texts[name], name) if name in self.texts else {}

    def kept_with(self, settings: Mapping[str, Any]) -> SettingsFiles:
        """What is kept of them, with other contents of ``tokenizer_config.json``."""
        return SettingsFiles({**self.texts, SETTINGS_FILE: json.dumps(settings)})


def parse_object(text: str, name: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        DataError: it is none.
    """
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name}: is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise DataError(f"{name}: is a JSON {type(values).__name__}, not an object")
    return values


def token_content(token: object) -> str | None:
    """The text of a token, given as such or as the library describes one."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) and text else None


def mark_special(tokenizer: tokenizers.Tokenizer, files: SettingsFiles) -> None:
    """Mark tokens as special that the files say are, so that no text spells them; ids stay what they are.

    Some people pad with an ordinary word, which stays one.
    """
    settings = files.values(SETTINGS_FILE)
    special: list[object] = []
    for values in (files.values(SPECIAL_FILE), settings):
        special += [values.get(f"{role}_token") for role in ROLES if role not in ("pad", "unk")]
        for key in ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens"):
            special += _members(values.get(key))
    described = _members(settings.get("added_tokens_decoder"))
    special += [token for token in described if isinstance(token, dict) and token.get("special") is True]
    mark_tokens(tokenizer, filter(None, map(token_content, special)))


def mark_tokens(tokenizer: tokenizers.Tokenizer, names: Iterable[str]) -> None:
    """Mark those of some tokens as special that are in the vocabulary and are not marked yet."""
    import tokenizers

    marked = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    new = [n for n in dict.fromkeys(names) if n not in marked and tokenizer.token_to_id(n) is not None]
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in new])


def _members(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
