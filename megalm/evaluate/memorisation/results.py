"""What a model has memorised: as a table, as the record of a result, and as a row for each passage. No torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from megalm.config.parse import config_to_dict
from megalm.config.schema import Config
from megalm.data.tokenization.tokenizer import Tokenizer
from megalm.evaluate.memorisation.measure import Answer, MemorisationResult, Share
from megalm.evaluate.memorisation.seen import RunData
from megalm.evaluate.memorisation.sources import Sources
from megalm.evaluate.tasks.bootstrap import CONFIDENCE, RESAMPLES
from megalm.evaluate.tasks.results import checkpoint_hash, shown, versions

HEADINGS = ("times read", "passages", "prompt tokens", "verbatim", "95 % interval", "tokens matched", "95 % interval")


def table(result: MemorisationResult) -> list[tuple[str, ...]]:
    """Rows under ``HEADINGS``: one per group and length of the prompt."""
    return [
        (
            cell.group if cell.prompt_tokens == result.settings.prompt_tokens[0] else "",
            f"{cell.passages:,}" if cell.prompt_tokens == result.settings.prompt_tokens[0] else "",
            str(cell.prompt_tokens),
            *(text for share in (cell.verbatim, cell.matched) for text in _share(share)),
        )
        for cell in result.cells()
    ]


def notes(result: MemorisationResult) -> list[str]:
    """What one should know of the shares, in words."""
    settings, passages = result.settings, result.passages
    lines = []
    for what, drawn in (("training", passages.training), ("validation", passages.held_out)):
        if not drawn.documents:
            lines.append(f"{what}: the data have no {what} documents")
            continue
        parts = [f"{what}: {drawn.kept.hashes.size:,} different passages in {drawn.documents:,} documents"]
        if drawn.share < 1:
            parts.append(f"drawn by seed, about {drawn.share:g} of all")
        if drawn.unnamed:
            parts.append(f"{drawn.unnamed:,} have no {settings.documents!r} in their names")
        if drawn.too_short:
            parts.append(f"{drawn.too_short:,} are shorter than {settings.passage_tokens} tokens and their end")
        lines.append("; ".join(parts))
    if passages.leaked:
        lines.append(f"{passages.leaked:,} passages of validation documents were read in training text, and count so")
    return lines


def metrics_row(record: dict[str, Any]) -> dict[str, float]:
    """Fields of ``metrics.jsonl``, W&B and TensorBoard, such as ``memorisation/verbatim/held_out/50`` and ``…_low``."""
    row: dict[str, float] = {}
    for metric, found in record["metrics"].items():
        name = f"{record['task']}/{metric}".replace(" ", "_")
        row |= {name: found["value"], f"{name}_low": found["low"], f"{name}_high": found["high"]}
    return row


def as_json(result: MemorisationResult, data: RunData, config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """The record of a result, in plain values; its form is that of other tasks' results.

    Args:
        result: what was found.
        data: of the run.
        config: of the run.
        tokenizer: of the model.
    """
    cells = result.cells()
    contents = hashlib.sha256("".join(data.fingerprints).encode()).hexdigest()
    return {
        "task": result.settings.name,
        "run": result.run,
        "checkpoint": result.checkpoint,
        "checkpoint_sha256": checkpoint_hash(result.checkpoint),
        "items": len(result.answers),
        "metrics": {
            f"{name}/{cell.group}/{cell.prompt_tokens}": _metric(share, signature)
            for cell in cells
            for name, share, signature in (
                ("verbatim", cell.verbatim, "interval:wilson"),
                ("matched", cell.matched, "interval:bootstrap"),
            )
        },
        "groups": {group: len(members) for group, members in result.groups()},
        "passages_continued_verbatim": result.verbatim,
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": result.settings.seed,
        "samples_read": data.samples,
        "sequence_length": data.sequence_length,
        "drawn": result.passages.counts(),
        "worst": list(worst(result, data, tokenizer)),
        "definition": result.settings.definition(),
        "data_sha256": contents,
        "examples_sha256": None,
        "versions": versions(),
        "config": config_to_dict(config),
    }


def items(result: MemorisationResult, data: RunData, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """A row per passage, in plain values."""
    sources = Sources(data, result.passages.all)
    for number, answer in enumerate(result.answers):
        yield {"item": number, **_told(result, answer, tokenizer, sources)}


def worst(result: MemorisationResult, data: RunData, tokenizer: Tokenizer) -> Iterator[dict[str, Any]]:
    """The worst cases, with the steps that read them."""
    answers = result.worst()
    sources = Sources(data, [answer.passage for answer in answers])
    for answer in answers:
        steps, more = sources.steps(answer.passage)
        yield {**_told(result, answer, tokenizer, sources), "steps": steps, "more_steps": more}


def _told(result: MemorisationResult, answer: Answer, tokenizer: Tokenizer, sources: Sources) -> dict[str, Any]:
    passage, lengths = answer.passage, result.settings.prompt_tokens
    count = result.settings.continuation_tokens
    return {
        "group": passage.group,
        "times": passage.times,
        "times_in_one_sequence": passage.whole,
        "copies": passage.copies,
        "sources": [source.as_json() for source in sources.of(passage)],
        "prompt": tokenizer.decode(passage.tokens[:-count]),
        "continuation": tokenizer.decode(passage.tokens[-count:]),
        "verbatim": dict(zip(map(str, lengths), answer.verbatim, strict=True)),
        "matched": dict(zip(map(str, lengths), answer.matched, strict=True)),
        "outputs": {str(n): tokenizer.decode(tokens) for n, tokens in zip(lengths, answer.written, strict=True)},
    }


def _metric(share: Share, signature: str) -> dict[str, Any]:
    return {
        "value": share.value,
        "low": share.interval.low,
        "high": share.interval.high,
        "higher_is_better": False,
        "signature": signature,
    }


def _share(share: Share) -> tuple[str, str]:
    return shown(share.value), f"{shown(share.interval.low)} to {shown(share.interval.high)}"
