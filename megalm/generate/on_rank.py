"""What ranks compute when a model is asked: see ``ranks.py`` for how they are told."""

from __future__ import annotations

from typing import Any

from megalm.generate.engine import Engine
from megalm.generate.one_row import lay_out_for_one_row
from megalm.generate.ranks import OnRank
from megalm.generate.requests import Asked, Completion, GenerateRequest, Score, ScoreRequest
from megalm.generate.units import make_unit


def generate(rank: OnRank, asked: Asked) -> list[list[Completion]]:
    """The completions of :class:`GenerateRequest`; reports each request's as it is done, and text as it grows."""
    engine, numbers = _engine(rank, asked), _own(rank, len(asked.requests))
    requests: tuple[GenerateRequest, ...] = asked.requests
    longest, tokenizer = rank.trained.config.model.sequence_length, rank.trained.tokenizer

    def grew(number: int, sample: int, piece: str) -> None:
        rank.emit(("text", number, sample, piece))

    units, found = [], dict[int, list[Completion]]()
    for number in numbers:
        if requests[number].max_new_tokens == 0:
            found[number] = [Completion(tokens=(), text="", finish="length")] * requests[number].samples
            continue
        listener = None
        if asked.streams and rank.leads:
            listener = lambda sample, piece, number=number: grew(number, sample, piece)  # noqa: E731
        units.append(make_unit(number, requests[number], tokenizer, longest, listener))
    for unit in engine.generate(units):
        found[unit.number] = unit.completions()
        rank.emit(("done", unit.number, found[unit.number]))
    return _all(rank, found, len(requests))


def score(rank: OnRank, asked: Asked) -> list[Score]:
    """The scores of :class:`ScoreRequest`; reports how many more are done."""
    engine, numbers = _engine(rank, asked), _own(rank, len(asked.requests))
    requests: tuple[ScoreRequest, ...] = asked.requests
    found: dict[int, Score] = {}
    for place, scored in engine.score([requests[number] for number in numbers]):
        found[numbers[place]] = scored
        rank.emit(("scored", 1))
    return _all(rank, found, len(requests))


def _engine(rank: OnRank, asked: Asked) -> Engine:
    trained = rank.trained
    if asked.batch_size == 1 and not trained.in_training:
        lay_out_for_one_row(trained.model)
    return Engine(trained.model, trained.context, words=trained.tokenizer.vocab_size, batch_size=asked.batch_size)


def _own(rank: OnRank, count: int) -> list[int]:
    """The numbers of the requests that this rank's replica computes."""
    context = rank.trained.context
    return list(range(context.coordinates.dp, count, context.topology.dp))


def _all(rank: OnRank, found: dict[int, Any], count: int) -> list[Any]:
    """What all replicas have found, by the requests' numbers; on rank 0."""
    merged: dict[int, Any] = {}
    for replica, each in enumerate(rank.from_replicas(found)):
        merged |= each
        if replica:
            for number, value in each.items():
                rank.emit(("scored", 1) if isinstance(value, Score) else ("done", number, value))
    return [merged[number] for number in range(count)] if rank.leads else []
