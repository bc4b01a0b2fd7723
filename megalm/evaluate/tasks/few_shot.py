"""The worked examples before an item, drawn by seed. No torch.

An item's examples are a function of the seed, the item's number and the questions that examples are drawn from; not of
how many items are asked, nor in which order. The first k of more examples are those of k.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from megalm.evaluate.tasks.prompts import Question

_SHARED = "shared"


class ExamplePool:
    """Questions that examples are drawn from.

    No item has an example that asks the same (its own question, or another of the same prompt), nor two such examples.

    Args:
        questions: to draw from.
        seed: of the draws.
        shared: every item has the same examples; but one whose own question is among them has the next ones.
    """

    def __init__(self, questions: Sequence[Question], *, seed: int, shared: bool) -> None:
        self._questions, self._seed, self._shared = questions, seed, shared
        self._prompts = {question.prompt for question in questions}

    def available(self, question: Question) -> int:
        """How many different examples there are for an item."""
        return len(self._prompts) - (question.prompt in self._prompts)

    def examples(self, question: Question, count: int) -> list[Question]:
        """``count`` examples for an item, which must be available; drawn one by one without replacement."""
        drawn: list[Question] = []
        seen = {question.prompt}
        numbers = self._numbers(_SHARED if self._shared else str(question.item.number))
        while len(drawn) < count:
            candidate = self._questions[next(numbers)]
            if candidate.prompt not in seen:
                seen.add(candidate.prompt)
                drawn.append(candidate)
        return drawn

    def _numbers(self, stream: str) -> Iterator[int]:
        """Numbers of questions, each once, in an order of the seed and the stream.

        A Fisher-Yates shuffle as far as it is read, with SHA-256 for draws: the same on every platform and version.
        """
        moved: dict[int, int] = {}
        size = len(self._questions)
        for place in range(size):
            digest = hashlib.sha256(f"{self._seed}/{stream}/{place}".encode()).digest()
            other = place + int.from_bytes(digest[:16], "big") % (size - place)
            yield moved.get(other, other)
            moved[other] = moved.get(place, place)
