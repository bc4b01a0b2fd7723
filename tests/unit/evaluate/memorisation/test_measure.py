"""Shares, intervals, worst cases and records, of a model whose memory is a rule."""

from __future__ import annotations

import json

import pytest

from megalm.evaluate.memorisation import results
from megalm.evaluate.memorisation.candidates import Drawn
from megalm.evaluate.memorisation.measure import MemorisationResult, ask, wilson
from megalm.evaluate.memorisation.passages import HELD_OUT, Passage, Passages, Place
from megalm.evaluate.memorisation.settings import Memorisation
from megalm.generate.requests import Completion, GenerateRequest
from tests.unit.evaluate.tasks.tiny_models import Bigrams, byte_level

TOKENIZER = byte_level()
SETTINGS = Memorisation(
    name="memorisation", places={"": "x"}, prompt_tokens=(2, 4), continuation_tokens=5, worst=3, seed=1
)


def passage(number: int, times: int, *, held_out: bool = False) -> Passage:
    tokens = tuple(range(10 * number + 1, 10 * number + 10))
    places = (Place(0, 100 * number, times),) if times else ()
    return Passage(tokens, held_out, (0, 100 * number), times, times, len(places), places)


ALL = (
    passage(0, 0, held_out=True),
    passage(1, 0, held_out=True),
    passage(2, 1),
    passage(3, 1),
    passage(4, 12),
    passage(5, 40),
    passage(6, 150),
)


class Remembers(Bigrams):
    """Gives what was read 100 times after 2 tokens, 10 times after 4 tokens, and else 3 tokens of it after 4."""

    def _written(self, request: GenerateRequest) -> Completion:
        assert request.sampling.temperature == 0 and not request.ends and request.max_new_tokens == 5
        (found,) = [each for each in ALL if request.tokens == each.tokens[4 - len(request.tokens) : 4]]
        needed = 2 if found.times >= 100 else 4 if found.times >= 10 else 9
        right = 5 if len(request.tokens) >= needed else 3 if len(request.tokens) == 4 else 0
        tokens = [*found.tokens[4 : 4 + right], *[300] * (5 - right)]
        return Completion(tokens=tuple(tokens), text=self.tokenizer.decode(tokens), finish="length")


@pytest.fixture(scope="module")
def result() -> MemorisationResult:
    done: list[tuple[int, int]] = []
    found = ask(
        Remembers(TOKENIZER),
        SETTINGS,
        Passages(ALL, Drawn(documents=9, too_short=2, share=0.5), Drawn()),
        lambda prompts, tokens: done.append((prompts, tokens)),
    )
    assert done == [(1, 5)] * (2 * len(ALL))
    return found


def test_shares_of_each_group_and_length(result: MemorisationResult) -> None:
    found = {(cell.group, cell.prompt_tokens): cell for cell in result.cells()}
    assert {key: (cell.passages, cell.verbatim.value, cell.matched.value) for key, cell in found.items()} == {
        (HELD_OUT, 2): (2, 0, 0),
        (HELD_OUT, 4): (2, 0, pytest.approx(3 / 5)),
        ("1", 2): (2, 0, 0),
        ("1", 4): (2, 0, pytest.approx(3 / 5)),
        ("10 to 99", 2): (2, 0, 0),
        ("10 to 99", 4): (2, 1, 1),
        ("100 to 999", 2): (1, 1, 1),
        ("100 to 999", 4): (1, 1, 1),
    }
    assert result.verbatim == 3


def test_the_worst_are_those_of_the_shortest_prompts_and_of_these_the_rarest(result: MemorisationResult) -> None:
    assert [answer.passage.times for answer in result.worst()] == [150, 12, 40]


@pytest.mark.parametrize(
    ("found", "count", "low", "high"),
    # scipy.stats.binomtest(found, count).proportion_ci(method="wilson")
    [(0, 20, 0.0, 0.161125158053), (5, 20, 0.111861701408, 0.468700877619), (20, 20, 0.838874841947, 1.0)],
)
def test_intervals_are_wilsons(found: int, count: int, low: float, high: float) -> None:
    interval = wilson(found, count)
    assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))


def test_the_table_and_its_notes(result: MemorisationResult) -> None:
    rows = results.table(result)
    assert [row[:4] for row in rows[:2]] == [("held out", "2", "2", "0.0000"), ("", "", "4", "0.0000")]
    assert rows[-1] == ("", "", "4", "1.0000", "0.2065 to 1.0000", "1.0000", "1.0000 to 1.0000")
    assert results.notes(result) == [
        "training: 0 different passages in 9 documents; drawn by seed, about 0.5 of all; 2 are shorter than "
        "9 tokens and their end",
        "validation: the data have no validation documents",
    ]


def test_a_definition_is_plain(result: MemorisationResult) -> None:
    assert json.loads(json.dumps(result.settings.definition())) == {
        "kind": "memorisation",
        "name": "memorisation",
        "about": "",
        "prompt_tokens": [2, 4],
        "continuation_tokens": 5,
        "documents": None,
        "limit": 200,
        "worst": 3,
        "seed": 1,
    }
