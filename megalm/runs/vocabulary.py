"""Which tokenizer a checkpoint's model was trained with, and whether a run's data were made by it. No torch.

A checkpoint records its tokenizer's hash; the tokenizer itself lies in the run's folder, or beside the checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megalm.checkpoint.manifest import Manifest, read_manifest
from megalm.config.schema import Config
from megalm.data.shards.dataset import AS_THE_MODELS, other_marks
from megalm.data.shards.index import read_index
from megalm.data.shards.store import Store
from megalm.data.shards.vocabulary import Relation, Vocabulary, added_tokens, relation, spoken
from megalm.data.tokenization.tokenizer import TOKENIZER_FILE, Tokenizer
from megalm.errors import CheckpointError, DataError
from megalm.runs.start import StartMode, StartPoint

TOKENIZER = "tokenizer"
"""Where a manifest's ``training`` says which tokenizer the model was trained with."""
WORD_EMBEDDING = "embedding.weight"


def tokenizer_record(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a checkpoint says of its tokenizer."""
    return {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}


def tokenizer_folder(checkpoint: Path) -> Path | None:
    """Where a checkpoint's tokenizer lies: in the run's folder, or beside the checkpoint; None: in neither."""
    home = checkpoint.resolve()
    return next((folder for folder in (home.parents[1], home.parent) if (folder / TOKENIZER_FILE).is_file()), None)


def rows_of(manifest: Manifest) -> int | None:
    """Words that a checkpoint's model has an embedding of; None where it is no language model's."""
    record = manifest.tensors.get(WORD_EMBEDDING)
    return None if record is None else record.shape[0]


def vocabulary_of(checkpoint: Path, manifest: Manifest) -> Vocabulary | None:
    """The tokenizer that a checkpoint's model was trained with; None where neither file nor record tells.

    Raises:
        DataError: its file is damaged.
    """
    recorded = manifest.training.get(TOKENIZER)
    folder = tokenizer_folder(checkpoint)
    found = None
    if folder is not None:
        path = folder / TOKENIZER_FILE
        found = Vocabulary.parse(path.read_text(encoding="utf-8", errors="replace"), str(path))
    if not isinstance(recorded, dict) or (found is not None and found.sha256 == recorded.get("sha256")):
        return found
    return Vocabulary(f"the tokenizer of {checkpoint}", int(recorded["vocab_size"]), str(recorded["sha256"]))


def check_own_tokenizer(checkpoint: Path, manifest: Manifest, tokenizer: Vocabulary) -> None:
    """Refuse a tokenizer beside a model that is not the one which it was trained with.

    Raises:
        CheckpointError: naming both.
    """
    recorded = manifest.training.get(TOKENIZER)
    if isinstance(recorded, dict) and recorded.get("sha256") != tokenizer.sha256:
        trained_with = Vocabulary(f"that of {checkpoint}", int(recorded["vocab_size"]), str(recorded["sha256"]))
        raise CheckpointError(
            f"tokenizer {tokenizer}: not the one that the model was trained with, {trained_with}, so that its ids mean "
            f"other words; put that {TOKENIZER_FILE} back, from where the data were prepared"
        )


def match_vocabulary(config: Config, start: StartPoint, stores: Sequence[Store]) -> StartPoint:
    """Prove that the model which a run starts from knows the tokens of the run's data, or can be made to.

    Returns:
        The start point, with whether rows are added to the vocabulary, and what the user should know of it.

    Raises:
        CheckpointError, DataError: the data were made by another tokenizer, the vocabulary would shrink, or it would
            grow and ``checkpoint.extend_vocab`` does not say so.
    """
    if start.path is None:
        return start
    manifest = read_manifest(start.path)
    model, data = vocabulary_of(start.path, manifest), Vocabulary.of_dataset(stores[0])
    found = Relation.SAME if model is None else relation(model, data)
    place = ", ".join(store.location for store in stores)
    if model is not None and (found is Relation.OTHER or (found is Relation.GROWN and _resumes(start))):
        raise CheckpointError(_refusal(start, place, model, data, found))
    notes = list(start.notes)
    if model is None:
        notes.append(
            f"no tokenizer lies with {start.path}: its model must have been trained with that of the data, {data}, and "
            "nothing tells whether it was"
        )
    if model is not None and found is Relation.GROWN:
        words = f"{data} is the tokenizer of {start.path} with {spoken(added_tokens(model, data))}"
        if not config.checkpoint.extend_vocab:
            raise CheckpointError(
                f"data.path={place}: {words}, which the model has never seen; checkpoint.extend_vocab=true gives them "
                f"rows in its embeddings, or prepare the data again with --tokenizer {model.where}"
            )
        notes.append(words)
    if model is not None and not _resumes(start):
        notes += _notes_on_marks(start.path, stores[0])
    rows = rows_of(manifest)
    if rows is None:
        return start
    wanted = config.model.vocab_size or data.size
    added = _added_rows(config, start, rows, wanted)
    if added:
        notes.append(
            f"{added:,} rows are added to the {rows:,} of the embeddings; the old ones are kept, the new ones begin as "
            "in a fresh model of this run.seed"
        )
    return replace(start, notes=tuple(notes), extends_vocab=added > 0)


def _notes_on_marks(checkpoint: Path, store: Store) -> list[str]:
    """That the data's documents begin or end otherwise than those that a model knows: it learns the new way."""
    folder = tokenizer_folder(checkpoint)
    if folder is None:
        return []
    try:
        marks = other_marks(Tokenizer.load(folder), read_index(store.below("train")))
    except DataError:  # a tokenizer that no longer says how a document ends
        return []
    return [] if marks is None else [f"data.path={store.location}: {marks}; {AS_THE_MODELS}"]


def _resumes(start: StartPoint) -> bool:
    return start.mode is StartMode.RESUME


def _added_rows(config: Config, start: StartPoint, rows: int, wanted: int) -> int:
    """How many rows the model gets more than its checkpoint has.

    Raises:
        CheckpointError: it may not have another number.
    """
    if wanted == rows or (wanted > rows and config.checkpoint.extend_vocab and not _resumes(start)):
        return wanted - rows
    size = "null" if config.model.vocab_size is None else f"{wanted}"
    data = f", {wanted:,} by the data" if config.model.vocab_size is None else ""
    remedy = f"set model.vocab_size={rows}"
    if wanted > rows:
        remedy = f"set model.vocab_size={rows} if the data have no more tokens"
        if not _resumes(start):
            remedy += "; checkpoint.extend_vocab=true adds rows"
    raise CheckpointError(f"model.vocab_size={size}{data}: the embeddings of {start.path} have {rows:,} rows; {remedy}")


def _refusal(start: StartPoint, place: str, model: Vocabulary, data: Vocabulary, found: Relation) -> str:
    """Why a run cannot go on from a model with data of another tokenizer."""
    again = f"prepare the data again with megalm prepare --tokenizer {model.where}"
    if model.definition is None:
        again = "prepare the data again with the tokenizer.json that the model was trained with"
    said = f"data.path={place}: made by another tokenizer than the model of {start.path}: {data}, not {model}"
    if found is Relation.GROWN:
        return (
            f"{said}; it is that one with {spoken(added_tokens(model, data))}, which a run that goes on cannot learn: "
            f"begin a new one with another run.name, checkpoint.finetune_from={start.path} and "
            f"checkpoint.extend_vocab=true, or {again}"
        )
    if relation(data, model) is Relation.GROWN:
        return (
            f"{said}; the model's has {spoken(added_tokens(data, model))}, and a run's tokenizer is that of its data; "
            f"{again}"
        )
    fresh = "or train a new model on these data" if _resumes(start) else "or leave out what it starts from"
    return f"{said}; the same ids mean other words there; {again}, {fresh}"
