"""``megalm evaluate``: what a run's model loses on a validation split, or on raw text. No torch until ranks compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megalm.data.shards.dataset import AS_THE_MODELS, open_datasets, other_marks, with_validation
from megalm.data.shards.index import read_index
from megalm.data.shards.store import Store
from megalm.data.shards.vocabulary import Vocabulary, check_same
from megalm.data.stream.sequences import Corpora
from megalm.errors import DataError
from megalm.evaluate.text import RawText, check_stride, text_scores
from megalm.evaluate.units import size_of_split
from megalm.generate.asked import AskedModel
from megalm.generate.open import opened
from megalm.generate.requests import Progress
from megalm.objectives.registry import make_objective
from megalm.runs.find import KnownModel, find_model

SCORES = "megalm.evaluate.splits:scores"
"""What ranks call; they alone import torch."""


def run_evaluate(run: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluate a run's newest checkpoint over its validation split, whatever layout it was trained with.

    Args:
        run: folder of the run, or of one of its checkpoints.
        overrides: ``field=value`` changes to the run's config: ``data.path`` evaluates on other data,
            ``train.micro_batch_size`` sets the batch, ``parallel.tp``, ``parallel.pp``, ``launch.ranks`` the layout.

    Returns:
        See :func:`split_result`.

    Raises:
        ConfigError, CheckpointError, DataError: see :func:`megalm.runs.find.find_model`; and the data are not there, or
            were made by another tokenizer.
    """
    found = find_model(run, overrides)
    check_split(found)
    with opened(found, overrides) as model:
        return split_result(model)


def check_split(found: KnownModel) -> list[Store]:
    """The datasets that a model is evaluated on.

    Raises:
        DataError: there are none with validation documents, or they were made by another tokenizer.
    """
    config = found.config
    datasets = with_validation(open_datasets(config.data))
    if not datasets:
        raise DataError(
            f"data.path={' '.join(config.data.path)}: was prepared without validation documents; "
            "data.path=DIR evaluates on another dataset"
        )
    for dataset in datasets:
        check_same(
            found.vocabulary,
            Vocabulary.of_dataset(dataset, "val"),
            f"data.path={dataset.location}",
            "so its perplexity would mean nothing",
        )
    return list(datasets)


def split_result(model: AskedModel) -> dict[str, Any]:
    """Loss over the whole validation splits of the datasets that ``data.path`` names.

    Returns:
        ``run``, ``checkpoint`` and ``data`` as text; what the run's objective reports, for language models ``val_loss``
        in nats per token, ``val_perplexity``, ``val_accuracy`` (share of tokens that the model holds most likely),
        ``val_commonest`` (that of always guessing the commonest token) and ``tokens`` (how many these are means over);
        for models that predict every token ``word_perplexity``, ``bits_per_byte``, ``words`` and ``bytes``; and
        ``note``, where documents begin or end otherwise than those that the run was trained with.

    Raises:
        DataError: nothing in the split carries loss.
    """
    found, config = model.found, model.config
    datasets = check_split(found)
    objective = make_objective(config.objective)
    scores: dict[str, Any] = model.ranks.call(SCORES, None)
    units = f"{objective.unit}s"
    if not scores[f"val_{units}"]:
        raise DataError("the validation split has no tokens that a loss could be computed of; prepare more text")
    stores = [dataset.below("val") for dataset in datasets]
    marks = other_marks(model.tokenizer, read_index(stores[0]))
    note = f"{marks}: the perplexity is of documents as they are in these data; {AS_THE_MODELS}"
    return {
        "run": str(found.run),
        "checkpoint": str(found.checkpoint),
        "data": ", ".join(dataset.location for dataset in datasets),
        **{name: value for name, value in scores.items() if name != f"val_{units}"},
        **_per_word(model, stores, scores),
        units: scores[f"val_{units}"],
        **({} if marks is None else {"note": note}),
    }


def _per_word(model: AskedModel, stores: Sequence[Store], scores: dict[str, Any]) -> dict[str, Any]:
    """Perplexity per word and bits per byte, of objectives that predict every token of the text."""
    if not model.config.model.causal or "val_tokens" not in scores:
        return {}
    size = size_of_split(Corpora.open(stores, model.config.model.sequence_length), model.tokenizer)
    return {} if size is None else size.measures(scores["val_loss"] * scores["val_tokens"])


def text_result(
    model: AskedModel, text: RawText, stride: int | None, progress: Progress | None = None
) -> dict[str, Any]:
    """The same for raw text; see :func:`megalm.evaluate.text.text_scores`."""
    stride = check_stride(stride, model.config.model.sequence_length)
    return {
        "run": str(model.found.run),
        "checkpoint": str(model.found.checkpoint),
        "data": str(text.path),
        "stride": stride,
        **text_scores(model, text, stride=stride, progress=progress),
    }
