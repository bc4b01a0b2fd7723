"""``megalm data show RUN``: which documents a step of a run saw, and which steps saw a document. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from megalm.checkpoint.manifest import read_manifest
from megalm.checkpoint.store import CHECKPOINTS_FOLDER, find_latest
from megalm.config.compose import load_run_config
from megalm.config.schema import Config
from megalm.config.support import LARGEST_INT
from megalm.config.violation import format_value
from megalm.data.shards.dataset import open_datasets
from megalm.data.shards.documents import DocumentSpan
from megalm.data.shards.vocabulary import Vocabulary, check_same
from megalm.data.stream.batch_size import BatchSize
from megalm.data.stream.ledger import Ledger, Reading, SampleSource, Steps
from megalm.data.stream.phases import DataState, fingerprint_of, new_state, order_of
from megalm.data.stream.sequences import Corpora
from megalm.data.tokenization.tokenizer import TOKENIZER_FILE
from megalm.errors import ConfigError, DataError
from megalm.objectives.registry import OBJECTIVES
from megalm.runs.folder import METRICS_FILE
from megalm.runs.record import attempt_rows, read_metrics, step_rows


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
    steps = _steps(config, Path(run_dir))
    datasets = open_datasets(config.data)
    corpora = Corpora.open(
        [dataset.below("train") for dataset in datasets],
        config.model.sequence_length,
        OBJECTIVES[config.objective.name].sequences_per_example,
    )
    own = Path(run_dir) / TOKENIZER_FILE
    if own.exists():
        model = Vocabulary.parse(own.read_text(encoding="utf-8", errors="replace"), str(own))
        for dataset in datasets:
            what = f"data.path={dataset.location}"
            check_same(model, Vocabulary.of_dataset(dataset), what, "so these are not what the run reads")
    if step is not None:
        samples = steps.samples_of(step)
        sources = _ledger(config, corpora, Path(run_dir), steps, samples[0]).sources_of_step(step)
        if as_json:
            yield from (json.dumps(asdict(source), ensure_ascii=False) for source in sources)
        else:
            yield from _step_lines(step, samples, corpora, sources, planned=step > steps.last)
        return
    assert document is not None
    readings = _ledger(config, corpora, Path(run_dir), steps, max(steps.samples - 1, 0)).readings_of_document(document)
    if as_json:
        yield from (json.dumps(asdict(reading), ensure_ascii=False) for reading in readings)
    else:
        yield from _document_lines(document, readings, steps.last)


def _steps(config: Config, run_dir: Path) -> Steps:
    """The record of the steps so far, and the plan of those to come.

    Raises:
        DataError: the record does not say how many samples came before it.
    """
    path = run_dir / METRICS_FILE
    rows = read_metrics(path) if path.exists() else []
    taken = step_rows(rows)
    begins = taken[0]["step"] - 1 if taken else max((row["step"] for row in attempt_rows(rows)), default=0)
    latest = find_latest(run_dir / CHECKPOINTS_FOLDER)
    if not rows and latest is not None:
        raise DataError(
            f"{path}: missing, and the run is at step {latest.step}; only this record says which samples a step took"
        )
    earlier = next((row["samples"] for row in attempt_rows(rows) if row["step"] == begins), 0)
    tokens = max((row["tokens"] for row in rows if "tokens" in row), default=0)
    samples = taken[-1]["samples"] if taken else earlier
    planned = BatchSize.of(config.train, config.model.sequence_length).resumed(samples, tokens)
    if begins and not earlier:
        raise DataError(f"{path}: begins with step {begins + 1}, and nothing says how many samples came before it")
    return Steps([row["samples"] for row in taken], planned, begins, earlier)


def _ledger(config: Config, corpora: Corpora, run_dir: Path, steps: Steps, sample: int) -> Ledger:
    """The ledger of the phase that a sample belongs to; the config's data must be those of that phase."""
    order = order_of(corpora, config.data, config.run.seed)
    fingerprint = fingerprint_of(corpora, order, config.data, config.run.seed)
    latest = find_latest(run_dir / CHECKPOINTS_FOLDER)
    state = (
        new_state(config.data.phase, fingerprint)
        if latest is None
        else DataState.from_dict(read_manifest(latest.path).data)
    )
    number = max(n for n, phase in enumerate(state.phases) if phase.start <= sample)
    phase = state.phases[number]
    if phase.number != config.data.phase:
        raise DataError(
            f"data.phase={config.data.phase}: sample {sample} was read in phase {phase.number}; give its data: "
            f"data.phase={phase.number} model.sequence_length={phase.sequence_length} data.path=…"
        )
    DataState(0, (phase,)).continued(phase.number, fingerprint)  # raises where something differs
    end = state.phases[number + 1].start if number + 1 < len(state.phases) else max(steps.samples, phase.start)
    return Ledger(corpora, order, start=phase.start, end=end, steps=steps)


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
