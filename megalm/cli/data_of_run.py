"""``megalm data show RUN``: which documents a step of a run saw, and which steps saw a document. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from megalm.config.compose import load_run_config
from megalm.config.support import LARGEST_INT
from megalm.config.violation import format_value
from megalm.data.shards.documents import DocumentSpan
from megalm.data.stream.ledger import Reading, SampleSource
from megalm.data.stream.sequences import Corpora
from megalm.errors import ConfigError
from megalm.runs.ledger import corpora_of_run, ledger_of_sample, steps_of_run


def show_lines(
    run_dir: str | Path, *, step: int | None, document: str | None, as_json: bool, overrides: Sequence[str] = ()
) -> Iterator[str]:
    """What to print.

    Args:
        run_dir: folder of the run.
        step: a step, which counts from 1; it may lie in the future.
        document: name of a document; exactly one of this and ``step`` is given.
        as_json: one JSON object per sample instead of lines for people.
        overrides: ``field=value`` changes to the run's config: ``data.path`` where the data have moved.

    Raises:
        ConfigError: the folder is no run, or step and document are not one of the two.
        DataError: the data are gone, are not those that the run was trained with, or have no such document.
    """
    if (step is None) == (document is None):
        raise ConfigError("megalm data show: give either --step N or --document NAME")
    if step is not None and step < 1:
        raise ConfigError(f"--step {step}: steps count from 1")
    if step is not None and step > LARGEST_INT:
        raise ConfigError(f"--step {format_value(step)}: no run has as many steps; at most {LARGEST_INT}")
    config = load_run_config(run_dir, overrides)
    folder = Path(run_dir)
    steps = steps_of_run(config, folder)
    corpora = corpora_of_run(config, folder)
    if step is not None:
        samples = steps.samples_of(step)
        sources = ledger_of_sample(config, corpora, folder, steps, samples[0]).sources_of_step(step)
        if as_json:
            yield from (json.dumps(asdict(source), ensure_ascii=False) for source in sources)
        else:
            yield from _step_lines(step, samples, corpora, sources, planned=step > steps.last)
        return
    assert document is not None
    readings = ledger_of_sample(config, corpora, folder, steps, max(steps.samples - 1, 0)).readings_of_document(
        document
    )
    if as_json:
        yield from (json.dumps(asdict(reading), ensure_ascii=False) for reading in readings)
    else:
        yield from _document_lines(document, readings, steps.last)


def _step_lines(
    step: int, samples: range, corpora: Corpora, sources: Iterator[SampleSource], *, planned: bool
) -> Iterator[str]:
    tokens = len(samples) * corpora.sequence_length
    yield (
        f"step {step:,}{' (not taken yet)' if planned else ''}: samples {samples[0]:,} to {samples[-1]:,}, "
        f"{len(samples):,} sequences, {tokens:,} tokens"
    )
    for source in sources:
        yield (
            f"sample {source.sample:,}  {source.dataset} epoch {source.epoch}  sequence {source.sequence:,}  "
            f"{source.shard} chunk {source.chunk:,}"
        )
        for document in source.documents:
            stop = source.start + corpora.sequence_length
            first, last = max(source.start - document.start, 0), min(stop, document.end - 1) - document.start
            yield f"    {document.name}  tokens {first:,} to {last:,} of {_tokens(document)}"


def _document_lines(name: str, readings: Sequence[Reading], steps: int) -> Iterator[str]:
    if not readings:
        yield f"{name}: none of the {steps:,} steps so far saw it"
        return
    seen = sorted({reading.step for reading in readings})
    yield f"{name}: seen in {len(seen):,} of {steps:,} steps so far"
    for reading in readings:
        yield (
            f"step {reading.step:,}  sample {reading.sample:,}  {reading.dataset} epoch {reading.epoch}  "
            f"tokens {reading.first:,} to {reading.last:,} of {_tokens(reading.document)}"
        )


def _tokens(document: DocumentSpan) -> str:
    return f"{document.tokens:,}"
