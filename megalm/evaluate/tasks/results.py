"""Results of tasks: as a table, as rows of a run's record, and as files in its folder. No torch.

results/TASK-CHECKPOINT-HASH.json    what was asked of what, and every metric
results/TASK-CHECKPOINT-HASH.jsonl   every item: what the model saw, what it answered, what is right, and its scores

HASH is of the task, its data and the weights: the same evaluation replaces its files, any other has files of its own.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megalm.checkpoint.durable import flush, replace_text
from megalm.checkpoint.manifest import MANIFEST_FILE
from megalm.config.parse import config_to_dict
from megalm.config.schema import Config
from megalm.errors import DataError
from megalm.evaluate.tasks.bootstrap import CONFIDENCE, RESAMPLES
from megalm.evaluate.tasks.metrics.base import Chosen, Completed, Generated
from megalm.evaluate.tasks.run import MetricResult, TaskResult
from megalm.runs.folder import RESULTS_FOLDER
from megalm.version import __version__

_LIBRARIES = ("torch", "tokenizers", "sacrebleu", "rouge-score", "datasets")
_PLACES = frozenset({"data", "examples_data"})
"""Fields that say where data are; a result is named after what they hold."""
HEADINGS = ("task", "items", "examples", "metric", "value", "95 % interval")


def metrics_row(results: Iterable[TaskResult]) -> dict[str, float]:
    """Fields of ``metrics.jsonl``, W&B and TensorBoard: ``TASK/METRIC``, ``…_low`` and ``…_high``."""
    row: dict[str, float] = {}
    for result in results:
        for found in result.metrics:
            name = f"{result.task.name}/{found.name}"
            row |= {name: found.value, f"{name}_low": found.interval.low, f"{name}_high": found.interval.high}
    return row


def table(results: Iterable[TaskResult]) -> list[tuple[str, ...]]:
    """Rows under ``HEADINGS``: one per task and metric, the headline first."""
    return [
        (
            result.task.name if number == 0 else "",
            str(len(result.answers)) if number == 0 else "",
            str(result.task.examples) if number == 0 else "",
            found.name,
            shown(found.value),
            f"{shown(found.interval.low)} to {shown(found.interval.high)}",
        )
        for result in results
        for number, found in enumerate(result.metrics)
    ]


def signatures(results: Iterable[TaskResult]) -> list[str]:
    """What defines each metric, for who compares numbers: one line each."""
    return [
        f"{result.task.name}/{found.name}: {found.metric.signature}"
        for result in results
        for found in result.metrics
        if found.metric.signature
    ]


def shown(value: float) -> str:
    """A metric's value, of four or more digits."""
    return f"{value:,.2f}" if abs(value) >= 10 else f"{value:.4f}"


def as_json(result: TaskResult, config: Config) -> dict[str, Any]:
    """The record of one result, in plain values.

    Args:
        result: what was reached.
        config: of the run.
    """
    loaded = result.prepared.loaded
    asked = result.prepared.asked
    return {
        "task": result.task.name,
        "run": result.run,
        "checkpoint": result.checkpoint,
        "checkpoint_sha256": checkpoint_hash(result.checkpoint),
        "items": len(asked),
        "metrics": {found.name: _metric(found) for found in result.metrics},
        "headline": result.metrics[0].name,
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": result.task.seed,
        "items_with_fewer_examples": sum(each.dropped > 0 for each in asked),
        "prompts_cut": sum(each.cut > 0 for each in asked),
        "texts_unfinished": result.unfinished,
        "definition": result.task.definition(),
        "data_sha256": loaded.data_hash,
        "examples_sha256": loaded.examples_hash,
        "versions": versions(),
        "config": config_to_dict(config),
    }


def items(result: TaskResult) -> Iterator[dict[str, Any]]:
    """A row per item, in plain values."""
    values = {found.name: found.of_items() for found in result.metrics}
    for number, (asked, answer) in enumerate(zip(result.prepared.asked, result.answers, strict=True)):
        row: dict[str, Any] = {
            "item": asked.question.item.number,
            "place": asked.question.item.place,
            "prompt": asked.prompt,
            "examples": list(asked.examples),
        }
        row |= {name: value for name, value in (("dropped", asked.dropped), ("cut", asked.cut)) if value}
        if result.raw:
            row |= {"output": result.raw[number].text, "finish": result.raw[number].finish}
        row |= _told(answer, asked.question.target)
        yield {**row, "scores": {name: finite_or_word(found[number]) for name, found in values.items()}}


def save_results(run_dir: Path, results: Sequence[TaskResult], config: Config) -> list[Path]:
    """Write both files of each result; see :func:`save_records`."""
    return save_records(run_dir, [(as_json(result, config), items(result)) for result in results])


def save_records(run_dir: Path, records: Iterable[tuple[dict[str, Any], Iterable[dict[str, Any]]]]) -> list[Path]:
    """Write records and their rows into the folder of the run; the ``.json`` last, so that it has its items.

    Returns:
        The ``.json`` files.

    Raises:
        DataError: the folder cannot be written.
    """
    folder = run_dir / RESULTS_FOLDER
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for record, rows in records:
            path = folder / f"{file_stem(record)}.json"
            lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
            replace_text(path.with_suffix(".jsonl"), "".join(f"{line}\n" for line in lines))
            replace_text(path, json.dumps(record, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
            written.append(path)
        flush(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from None
    return written


def file_stem(record: dict[str, Any]) -> str:
    """Name of the files of a result, without their endings."""
    definition = {name: value for name, value in record["definition"].items() if name not in _PLACES}
    same = [definition, *(record[name] for name in ("data_sha256", "examples_sha256", "checkpoint_sha256"))]
    digest = hashlib.sha256(json.dumps(same, sort_keys=True, default=str).encode()).hexdigest()[:8]
    return f"{record['task']}-{Path(record['checkpoint']).name}-{digest}"


def checkpoint_hash(checkpoint: str) -> str | None:
    """SHA-256 of a checkpoint's manifest, which has those of all its pieces; None: the folder has none."""
    try:
        return hashlib.sha256((Path(checkpoint) / MANIFEST_FILE).read_bytes()).hexdigest()
    except OSError:
        return None


def _metric(found: MetricResult) -> dict[str, Any]:
    return {
        "value": finite_or_word(found.value),
        "low": finite_or_word(found.interval.low),
        "high": finite_or_word(found.interval.high),
        "higher_is_better": found.metric.higher_is_better,
        "signature": found.metric.signature,
    }


def _told(answer: Generated | Chosen | Completed, target: str) -> dict[str, Any]:
    """What was answered, and what is right."""
    if isinstance(answer, Generated):
        return {"answer": answer.text, "references": list(answer.references)}
    if isinstance(answer, Completed):
        likelihood = {"log_probability": answer.log_probability, "tokens": answer.tokens, "greedy": answer.greedy}
        return {"target": target, **likelihood}
    choices = [
        {"text": score.text, "log_probability": score.log_probability, "tokens": score.tokens}
        | ({} if score.unconditional is None else {"unconditional": score.unconditional})
        for score in answer.scores
    ]
    return {"choices": choices, "right": answer.right}


def finite_or_word(value: float) -> float | str:
    """A number, or the word that a run's record has for one that JSON has not."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def versions() -> dict[str, str]:
    """Of megalm, Python and the libraries that a result depends on."""
    found = {"megalm": __version__, "python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found
