"""From logits to tokens: limits, penalties, draws that do not depend on the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megalm.errors import ConfigError
from megalm.generate.choices import Choice, likeliest_of, token_of
from megalm.generate.choosing import choose, sample
from megalm.generate.requests import GenerateRequest, Sampling

LOGITS = torch.tensor([0.1, 3.0, 2.0, 2.5, -1.0]).log_softmax(-1)
PROBABILITIES = LOGITS.exp()


def reached(sampling: Sampling) -> set[int]:
    """Tokens that some draw gives."""
    draws = [step / 400 for step in range(400)]
    return set(sample(LOGITS.expand(400, -1), [sampling] * 400, draws).tolist())


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 2, 3}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.4}, {1}),
        ({"top_p": 0.7}, {1, 3}),
        ({"min_p": 0.5}, {1, 3}),
        ({"min_p": 1.0}, {1}),
        ({"top_k": 3, "top_p": 0.6}, {1, 3}),
        ({"temperature": 0.0}, {1}),
        ({"temperature": 1e-9}, {1}),
    ],
)
def test_limits_keep_the_likeliest(fields: dict[str, Any], kept: set[int]) -> None:
    assert reached(Sampling(**fields)) == kept


def test_draws_have_the_models_probabilities() -> None:
    count = 20_000
    drawn = sample(LOGITS.expand(count, -1), [Sampling()] * count, [(step + 0.5) / count for step in range(count)])
    shares = torch.bincount(drawn, minlength=5) / count
    torch.testing.assert_close(shares, PROBABILITIES, rtol=0, atol=2e-4)


@given(st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=6), st.integers(0, 5), st.floats(0.05, 3))
def test_a_row_does_not_depend_on_the_others(draws: list[float], top_k: int, temperature: float) -> None:
    rows = torch.randn(len(draws), 30, generator=torch.Generator().manual_seed(len(draws)))
    settings = [Sampling(temperature=temperature, top_k=top_k, top_p=0.9)] + [Sampling()] * (len(draws) - 1)
    together = sample(rows, settings, draws).tolist()
    assert together == [int(sample(rows[i : i + 1], settings[i : i + 1], draws[i : i + 1])) for i in range(len(draws))]


def test_excluded_tokens_are_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]])
    drawn = {int(sample(logits, [Sampling()], [draw])) for draw in (0.0, 0.25, 0.5, 0.75, 1 - 2**-53)}
    assert drawn == {1, 3}


def test_the_penalty_lowers_what_was_seen_whatever_its_sign() -> None:
    logits = torch.tensor([[2.0, 1.9, -1.0, -1.1]])
    greedy = Sampling(temperature=0.0, repetition_penalty=1.5)
    assert token_of(choose(logits, [Choice(greedy, seen=(0,))])[0].tolist())[0] == 1
    assert token_of(choose(-logits, [Choice(greedy, seen=(3,))])[0].tolist())[0] == 2
    assert token_of(choose(logits, [Choice(Sampling(temperature=0.0))])[0].tolist())[0] == 0


def test_rows_of_different_kinds_share_a_batch() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0), LOGITS])
    greedy = Sampling(temperature=0.0)
    asked = [Choice(greedy, count=2, reports=True), Choice(greedy), Choice(greedy, draws=False, count=7)]
    rows = choose(logits, asked).tolist()
    assert token_of(rows[0]) == (1, pytest.approx(float(LOGITS[1]), abs=1e-6))
    assert [token for token, _ in likeliest_of(rows[0], asked[0])] == [1, 3]
    assert token_of(rows[1])[0] == 3
    ranked = likeliest_of(rows[2], asked[2])
    assert [token for token, _ in ranked[:5]] == [1, 3, 2, 0, 4]
    assert [value for _, value in ranked[5:]] == [float("-inf")] * 2, "a vocabulary smaller than what is asked for"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_values_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**fields)


def test_all_mistakes_of_a_request_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        GenerateRequest(tokens=(), max_new_tokens=-1, samples=0, beams=0, stop=("",))
    assert len(caught.value.lines) == 5
