"""Two models on the same items of a task, compared by paired bootstrap (Koehn 2004). No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megalm.errors import DataError
from megalm.evaluate.tasks.bootstrap import Difference, difference
from megalm.evaluate.tasks.results import finite_or_word, shown
from megalm.evaluate.tasks.run import TaskResult

HEADINGS = ("task", "metric", "A", "B", "A - B", "95 % interval", "A better", "B better", "p")


@dataclass(frozen=True)
class MetricComparison:
    """Two models by one metric of one task.

    Attributes:
        task: its name.
        metric: its name.
        difference: what differs.
    """

    task: str
    metric: str
    difference: Difference

    def row(self) -> tuple[str, ...]:
        """Under ``HEADINGS``; ``A better`` is the share of resamples in which A is."""
        found = self.difference
        return (
            self.task,
            self.metric,
            shown(found.first),
            shown(found.second),
            shown(found.first - found.second),
            f"{shown(found.interval.low)} to {shown(found.interval.high)}",
            f"{found.first_better:.1%}",
            f"{found.second_better:.1%}",
            f"{found.p_value:.3f}",
        )

    def as_json(self) -> dict[str, Any]:
        """In plain values."""
        found = asdict(self.difference)
        found["interval"] = {name: finite_or_word(value) for name, value in found["interval"].items()}
        numbers = {name: finite_or_word(value) for name, value in found.items() if name != "interval"}
        return {"task": self.task, "metric": self.metric, **numbers, "interval": found["interval"]}


def compare_results(first: Sequence[TaskResult], second: Sequence[TaskResult]) -> list[MetricComparison]:
    """Compare two models task by task, metric by metric; the resamples are those of the tasks' seeds.

    Args:
        first: results of A.
        second: results of B, of the same tasks in the same order.

    Raises:
        DataError: they were not asked the same.
    """
    found = []
    for a, b in zip(first, second, strict=True):
        _check_same(a, b)
        for one in a.metrics:
            other = b.metric(one.name)
            compared = difference(one.metric, one.statistics, other.statistics, seed=a.task.seed)
            found.append(MetricComparison(a.task.name, one.name, compared))
    return found


def _check_same(a: TaskResult, b: TaskResult) -> None:
    """The same task with the same items, by value, and the same metrics."""
    one, other = a.task.definition(), b.task.definition()
    differs = sorted(name for name in one if one[name] != other[name] and name != "data")
    if differs:
        right = "compare two runs by one task file and one command"
        raise DataError(f"task {a.task.name}: {', '.join(differs)} differ between the runs compared; {right}")
    pairs = zip(a.prepared.asked, b.prepared.asked, strict=False)
    different = next((x for x, y in pairs if x.question.identity != y.question.identity), None)
    if different is not None or len(a.answers) != len(b.answers):
        counts = f"{len(a.answers)} and {len(b.answers)} items"
        where = counts if different is None else different.question.item.place
        raise DataError(f"task {a.task.name}: not the same items ({where}); compare two runs on the same data")
