"""Ids of special tokens as a Hugging Face folder's ``config.json`` and ``generation_config.json`` give them.

A model that is converted and goes on to be converted back says there what it said before, to the last null. A model
that megalm has trained says what its tokenizer does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megalm.config.schema import Model
from megalm.convert.untrusted.json_fields import read_json
from megalm.data.tokenization.settings_files import GENERATION_FILE, MODEL_FILE
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.errors import CheckpointError

_ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask", "decoder_start", "forced_bos", "forced_eos")
_KEYS = tuple(f"{role}_token_id" for role in _ROLES)


@dataclass(frozen=True)
class TokenIds:
    """Ids of special tokens.

    Attributes:
        config: fields of ``config.json`` ▶ an id, a list of them, or None.
        generation: contents of ``generation_config.json``; None: there is no such file.
    """

    config: Mapping[str, Any]
    generation: Mapping[str, Any] | None

    @classmethod
    def of_folder(cls, folder: Path, safe: Callable[[Path, str], Path]) -> TokenIds | None:
        """Those of a Hugging Face folder; None: it has no ``config.json``."""
        config, generation = (_read(safe(folder, name)) for name in (MODEL_FILE, GENERATION_FILE))
        return None if config is None else cls(_ids(config), generation)

    @classmethod
    def of_record(cls, record: object) -> TokenIds | None:
        """What :meth:`to_record` gave; None where there is none, or somebody has changed it."""
        if not isinstance(record, dict) or not isinstance(record.get("config"), dict):
            return None
        generation = record.get("generation")
        return cls(_ids(record["config"]), generation if isinstance(generation, dict) else None)

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer | None, model: Model) -> TokenIds:
        """Those of a model that megalm has trained, by its tokenizer; all null without one."""
        if tokenizer is None:
            ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
            return cls(ids, {} if model.causal else None)
        end = tokenizer.eos_id if model.causal else None
        ids = {"bos_token_id": tokenizer.role_id("bos"), "eos_token_id": end, "pad_token_id": tokenizer.role_id("pad")}
        if not model.causal:
            return cls(ids, None)
        others = sorted(tokenizer.stop_ids - {end})
        known = {name: value for name, value in ids.items() if value is not None}
        ends = {"eos_token_id": [end, *others]} if others else {}
        return cls(ids, {**known, **tokenizer.files.values(GENERATION_FILE), **ends})

    def to_record(self) -> dict[str, Any]:
        """As a checkpoint's manifest keeps them."""
        return {"config": dict(self.config), "generation": None if self.generation is None else dict(self.generation)}

    @property
    def ends(self) -> list[int]:
        """Ids that end a text by ``config.json``."""
        value = self.config.get("eos_token_id")
        return list(value) if isinstance(value, list) else [] if value is None else [value]


def _ids(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: values[key] for key in _KEYS if key in values and _is_id(values[key])}


def _is_id(value: object) -> bool:
    return value is None or type(value) is int or (isinstance(value, list) and all(type(one) is int for one in value))


def _read(file: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none that can be read, which whoever needs it says."""
    try:
        return dict(read_json(file)) if file.exists() else None
    except CheckpointError:
        return None
