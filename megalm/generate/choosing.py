"""From logits to next tokens. Shapes: M rows, V vocabulary, C columns of what is reported of a row.

Every row has settings of its own, so that prompts of different settings share a batch. A draw is one uniform number per
row, given from outside: it is a function of the seed and the prompt (see ``units.py``), whatever else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megalm.generate.choices import Choice, columns_of
from megalm.generate.requests import Sampling


def choose(logits: Tensor, choices: Sequence[Choice]) -> Tensor:
    """Choose a token for each row, and report the likeliest.

    Args:
        logits: [M, V], any float dtype and device; minus infinity excludes a token.
        choices: of each row.

    Returns:
        [M, C] fp64. A row begins with the token and its log-probability where one is drawn; then the likeliest tokens,
        then their log-probabilities, as many as it asks for. Log-probabilities are at temperature 1; of drawn tokens
        before the penalty, of beam search after it.
    """
    logits = logits.float()
    result = logits.new_zeros(len(choices), columns_of(choices), dtype=torch.float64)
    drawn = [row for row, choice in enumerate(choices) if choice.draws]
    if drawn:
        _draw(logits, result, choices, drawn)
    ranked = [row for row, choice in enumerate(choices) if choice.count]
    if ranked:
        _rank(logits, result, choices, ranked)
    return result


def _draw(logits: Tensor, result: Tensor, choices: Sequence[Choice], rows: list[int]) -> None:
    settings = [choices[row].sampling for row in rows]
    own = logits if len(rows) == len(logits) else logits[rows]
    penalised = _penalised(own, [choices[row] for row in rows])
    if all(sampling.temperature == 0 for sampling in settings):
        tokens = penalised.argmax(dim=-1)
    else:
        uniforms = [choices[row].uniform for row in rows]
        tokens = sample(penalised, settings, uniforms)
    result[rows, 0] = tokens.double()
    told = [place for place, row in enumerate(rows) if choices[row].reports]
    if told:
        some = own[told]
        chosen = some.gather(1, tokens[told][:, None])[:, 0] - some.logsumexp(dim=-1)
        result[[rows[place] for place in told], 1] = chosen.double()


def _rank(logits: Tensor, result: Tensor, choices: Sequence[Choice], rows: list[int]) -> None:
    """The likeliest tokens; rows of one count and kind together."""
    for count, draws in {(choices[row].count, choices[row].draws) for row in rows}:
        same = [row for row in rows if (choices[row].count, choices[row].draws) == (count, draws)]
        values = logits[same].log_softmax(dim=-1)
        if not draws:
            values = _penalised(values, [choices[row] for row in same])
        top, tokens = values.topk(min(count, values.shape[-1]), dim=-1)
        start, kept = choices[same[0]].columns - 2 * count, top.shape[-1]
        result[same, start : start + kept] = tokens.double()
        result[same, start + count : start + count + kept] = top.double()
        if kept < count:  # a vocabulary smaller than what is asked for
            result[same, start + count + kept : start + 2 * count] = float("-inf")


def _penalised(values: Tensor, choices: Sequence[Choice]) -> Tensor:
    """The repetition penalty of Keskar et al. 2019, section 4.1, with the sign taken into account."""
    if not any(choice.seen for choice in choices):
        return values
    values = values.clone()
    for row, choice in enumerate(choices):
        if choice.seen:
            seen = torch.tensor(list(choice.seen), device=values.device)
            penalty, old = choice.sampling.repetition_penalty, values[row, seen]
            values[row, seen] = torch.where(old > 0, old / penalty, old * penalty)
    return values


def sample(logits: Tensor, settings: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """Draw a token per row by inverting the distribution function, in the order of the vocabulary.

    Args:
        logits: [M, V] fp32.
        settings: of each row; temperature 0 takes the likeliest.
        uniforms: draws in [0, 1).

    Returns:
        [M] int64.
    """

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    greedy = [sampling.temperature == 0 for sampling in settings]
    temperature = column([1.0 if sampling.temperature == 0 else sampling.temperature for sampling in settings])
    # Subtracting the largest first keeps a tiny temperature from overflowing to infinity.
    scaled = (logits.double() - logits.double().amax(dim=-1, keepdim=True)) / temperature
    scaled = _only_top_k(scaled, [sampling.top_k for sampling in settings])
    probabilities = scaled.softmax(dim=-1)
    probabilities = _only_top_p(probabilities, [sampling.top_p for sampling in settings])
    min_p = column([sampling.min_p for sampling in settings])
    if (min_p > 0).any():
        largest = probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.masked_fill(probabilities < min_p * largest, 0.0)
    steps = probabilities.cumsum(dim=-1)
    targets = column(uniforms) * steps[:, -1:]
    tokens = torch.searchsorted(steps, targets, right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)
    # A draw next to 1 may round up past the last token that has a probability.
    last = (probabilities > 0).int().cumsum(dim=-1).argmax(dim=-1)
    tokens = torch.minimum(tokens, last)
    return torch.where(torch.tensor(greedy, device=logits.device), logits.argmax(dim=-1), tokens)


def _only_top_k(scaled: Tensor, counts: Sequence[int]) -> Tensor:
    """Exclude what is below the k-th largest, so that equals of it stay."""
    size = scaled.shape[-1]
    kept = [min(count, size) or size for count in counts]
    most = max((count for count in kept if count < size), default=0)
    if not most:
        return scaled
    top = scaled.topk(most, dim=-1).values
    index = torch.tensor([min(count, most) - 1 for count in kept], device=scaled.device)[:, None]
    bound = top.gather(1, index)
    unbounded = torch.tensor([count == size for count in kept], device=scaled.device)[:, None]
    return scaled.masked_fill((scaled < bound) & ~unbounded, float("-inf"))


def _only_top_p(probabilities: Tensor, shares: Sequence[float]) -> Tensor:
    """Exclude what comes after the likeliest tokens that together have the share: the one that reaches it stays."""
    if min(shares) >= 1.0:
        return probabilities
    share = torch.tensor(shares, dtype=probabilities.dtype, device=probabilities.device)[:, None]
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    ordered = ordered.masked_fill((before >= share) & (share < 1.0), 0.0)
    return torch.zeros_like(probabilities).scatter_(1, tokens, ordered)
