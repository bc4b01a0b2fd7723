"""The files beside a dataset's ``tokenizer.json``, wherever it lies. Older datasets have none. No torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from megalm.data.shards.store import MissingFile, RefusedFile, Store
from megalm.data.tokenization.settings_files import MODEL_FILE, SETTINGS_FILE, parse_object
from megalm.errors import DataError


def files_beside(store: Store) -> Callable[[str], str | None]:
    """What gives the text of a file beside a dataset's tokenizer, by its name; None where there is no such file.

    Not every server and command says that a file is not there: some refuse it, and some answer with a page of their
    own. So elsewhere than in a folder, a file of another kind than was asked for counts as missing.
    """
    if store.is_local:
        return partial(_text_of, store)
    settings = _meant(SETTINGS_FILE, _text_of(store, SETTINGS_FILE))

    def read(name: str) -> str | None:
        if name == SETTINGS_FILE:
            return settings
        # Where there are others, these are there.
        return None if settings is None or name == MODEL_FILE else _meant(name, _text_of(store, name))

    return read


def _text_of(store: Store, name: str) -> str | None:
    try:
        return store.read(name).decode("utf-8")
    except (MissingFile, RefusedFile):
        return None
    except UnicodeDecodeError as error:
        if not store.is_local:
            return None
        raise DataError(f"{store.path_of(name)}: is not text: {error}") from None


def _meant(name: str, text: str | None) -> str | None:
    """A text, if it is what a file of this name holds."""
    if text is None:
        return None
    if not name.endswith(".json"):
        return text if "{{" in text or "{%" in text else None
    try:
        parse_object(text, name)
    except DataError:
        return None
    return text
