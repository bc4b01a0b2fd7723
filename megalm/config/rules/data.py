"""Rules about datasets: their vocabulary, their sequence length, their documents."""

from __future__ import annotations

from collections.abc import Iterator

from megalm.config.job import Job, Rule, needs, value_of
from megalm.config.violation import Fix, Violation, spoken_list


def vocabulary_holds_the_data(job: Job) -> Iterator[Violation]:
    """The model has a row for every word of its datasets."""
    vocab_size = job.config.model.vocab_size
    largest = max(job.datasets, key=lambda dataset: dataset.vocab_size, default=None)
    if largest is not None and vocab_size is not None and vocab_size < largest.vocab_size:
        yield Violation(
            "model.vocab_size",
            vocab_size,
            f"the dataset {largest.location} has {largest.vocab_size} words",
            fixes=(Fix("model.vocab_size", (largest.vocab_size, None)),),
        )


@needs("model.sequence_length")
def sequences_fit_the_data(job: Job) -> Iterator[Violation]:
    """A sequence is a whole fraction of a chunk of every dataset, and as long as a packed one was packed for."""
    length = job.config.model.sequence_length
    wrong = []
    for dataset in job.datasets:
        if dataset.packed_length not in (0, length):
            wrong.append(f"the dataset {dataset.location} was packed for sequences of {dataset.packed_length} tokens")
        elif dataset.chunk_tokens % length:
            wrong.append(
                f"does not divide the chunks of {dataset.chunk_tokens} tokens of the dataset {dataset.location}"
            )
    if not wrong:
        return
    none = "" if job.data_lengths else "datasets of data.path that take one common length: prepare one of them again"
    yield Violation(
        "model.sequence_length",
        length,
        spoken_list(dict.fromkeys(wrong), "and"),
        none,
        fixes=(Fix("model.sequence_length", job.data_lengths),),
    )


def one_number_per_dataset(job: Job) -> Iterator[Violation]:
    """Weights and limits are given for every dataset of a blend, or for none."""
    datasets = len(job.config.data.path)
    for field in ("data.weights", "data.max_epochs"):
        value = value_of(job.config, field)
        if value and len(value) != datasets:
            yield Violation(
                field, list(value), f"{len(value)} numbers for the {datasets} of data.path", f"one each, or {field}=[]"
            )


def pipes_name_their_file(job: Job) -> Iterator[Violation]:
    """A command that fetches a file is told which."""
    for path in job.config.data.path:
        if path.startswith("pipe:") and "{file}" not in path:
            yield Violation(
                "data.path",
                path,
                "there is no {file} in the command, so that it would print the same file for every name",
                "pipe:COMMAND … {file} …",
            )


def documents_are_seen_whole(job: Job) -> Iterator[Violation]:
    """Attention within documents needs whole sequences on one rank, and no graph of a fixed shape."""
    config = job.config
    if not config.data.reset_at_documents:
        return
    off = Fix("data.reset_at_documents", (False,))
    if config.parallel.cp > 1 and config.parallel.cp_attention == "ring":
        yield Violation(
            "parallel.cp_attention",
            "ring",
            "ring attention does not support data.reset_at_documents",
            fixes=(Fix("parallel.cp_attention", ("ulysses",)), off),
        )
    if config.engine.compiles:
        yield Violation(
            "engine.compile",
            True,
            "with data.reset_at_documents it would compile again for every new set of document lengths",
            fixes=(Fix("engine.compile", (False,)), off),
        )


RULES: tuple[Rule, ...] = (
    vocabulary_holds_the_data,
    sequences_fit_the_data,
    one_number_per_dataset,
    pipes_name_their_file,
    documents_are_seen_whole,
)
