"""Writes a tokenizer for the library's ``AutoTokenizer``; settings of a published tokenizer are kept unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megalm.config.schema import Model
from megalm.data.tokenization.postprocessor import with_marks
from megalm.data.tokenization.roles import START
from megalm.data.tokenization.settings_files import ROLES, SETTINGS_FILE, TEMPLATE_FILE
from megalm.data.tokenization.tokenizer import TOKENIZER_FILE, Tokenizer

ORIGINAL_HASH = "megalm_tokenizer_sha256"
"""Setting with the hash of the original tokenizer, in an export that adds start and end tokens to each text."""
TEMPLATES_FOLDER = "additional_chat_templates"
"""Folder in which the library keeps chat templates other than ``default``."""
_END = "[SEP]"


def save_for_library(tokenizer: Tokenizer, folder: Path, model: Model) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and the other files that ``AutoTokenizer`` reads."""
    tokenizer.save(folder)
    settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    if "tokenizer_class" not in settings:
        settings = _new_settings(tokenizer, model) | settings
    processed = _with_start(tokenizer) if model.causal else _with_processor(tokenizer.definition)
    settings.pop(ORIGINAL_HASH, None)
    if processed is not None:
        (folder / TOKENIZER_FILE).write_text(processed, encoding="utf-8")
        settings[ORIGINAL_HASH] = tokenizer.sha256
    if tokenizer.roles.chat_template is not None:
        settings["chat_template"] = _save_templates(tokenizer.roles.chat_template, settings, folder)
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / SETTINGS_FILE).write_text(text, encoding="utf-8")


def _new_settings(tokenizer: Tokenizer, model: Model) -> dict[str, Any]:
    """``tokenizer_config.json`` for a tokenizer that megalm trained."""
    roles = {f"{role}_token": token for role in ROLES if (token := tokenizer.roles.token(role)) is not None}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.sequence_length,
        "clean_up_tokenization_spaces": False,
        # Version 4 of the library would give token types to every model: GPT-2 embeds them as words, Llama refuses, and
        # RoBERTa has one alone.
        "model_input_names": ["input_ids", *(["token_type_ids"] if model.token_types > 1 else []), "attention_mask"],
        **roles,
    }


def _save_templates(template: str, settings: Mapping[str, Any], folder: Path) -> object:
    """Write chat templates as files, which newer versions of the library read; for older ones, what goes into JSON."""
    (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    named = settings.get("chat_template")
    if not isinstance(named, list):
        return template
    for one in named:
        name = one.get("name") if isinstance(one, dict) else None
        if isinstance(name, str) and name.isidentifier() and name != "default" and isinstance(one.get("template"), str):
            (folder / TEMPLATES_FOLDER).mkdir(exist_ok=True)
            (folder / TEMPLATES_FOLDER / f"{name}.jinja").write_text(one["template"], encoding="utf-8")
    return named


def _with_start(tokenizer: Tokenizer) -> str | None:
    """A definition that puts around a text what the model's documents have; None: it does that as it is.

    Version 5 of the library looks at the definition alone, and not at ``add_bos_token``.
    """
    made = with_marks(tokenizer.definition, tokenizer.roles.before, tokenizer.roles.after)
    return None if made == tokenizer.definition else made


def _with_processor(definition: str) -> str | None:
    """A definition that makes of a text what an encoder is trained on, with its start and its end; None: as it is.

    megalm puts both there itself, so that what it trains says nothing of them.
    """
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(definition)
    if tokenizer.post_processor is not None:
        return None
    mark_ends(tokenizer)
    return None if tokenizer.post_processor is None else str(tokenizer.to_str())


def mark_ends(tokenizer: Any) -> None:
    """Make the library begin a text with ``[CLS]`` and end it with ``[SEP]``, if the tokenizer has both."""
    from tokenizers import processors

    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(_END)
    if start is not None and end is not None:
        tokenizer.post_processor = processors.BertProcessing((_END, end), (START, start))
