"""The metrics that task files can name. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from megalm.evaluate.tasks.metrics import likelihood
from megalm.evaluate.tasks.metrics.base import Check, Metric, MetricKind, one_of
from megalm.evaluate.tasks.metrics.ngrams import Rouge, SacreBleu
from megalm.evaluate.tasks.metrics.words import F1, NONE, SQUAD, ExactMatch
from megalm.evaluate.tasks.task import CLOZE, GENERATION, MULTIPLE_CHOICE, MetricChoice

EXTRA = "pip install 'megalm[eval]'"
_MODULES = {"sacrebleu": "sacrebleu", "rouge-score": "rouge_score"}
_FLAG = one_of(True, False)


def _text(value: Any) -> str | None:
    return None if isinstance(value, str) else "text"


_WORDS: dict[str, Check] = {"normalise": one_of(SQUAD, NONE), "no_answer": _text}

METRICS: dict[str, tuple[MetricKind, ...]] = {
    "exact_match": (MetricKind(GENERATION, partial(ExactMatch, "exact_match"), _WORDS),),
    "f1": (MetricKind(GENERATION, partial(F1, "f1"), {"no_answer": _text}),),
    "bleu": (
        MetricKind(
            GENERATION,
            partial(SacreBleu, "bleu"),
            {"tokenize": one_of("13a", "intl", "zh", "char", "none"), "lowercase": _FLAG},
            "sacrebleu",
        ),
    ),
    "chrf": (
        MetricKind(
            GENERATION, partial(SacreBleu, "chrf"), {"word_order": one_of(0, 1, 2), "lowercase": _FLAG}, "sacrebleu"
        ),
    ),
    **{
        name: (MetricKind(GENERATION, partial(Rouge, name), {"stemmer": _FLAG}, "rouge-score"),)
        for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")
    },
    **{
        name: (MetricKind(MULTIPLE_CHOICE, lambda _, name=name: likelihood.ChoiceAccuracy(name), {}),)  # type: ignore[misc]
        for name in likelihood.RANKED_BY
    },
    "perplexity": (MetricKind(CLOZE, lambda _: likelihood.perplexity(), {}),),
    "perplexity_per_token": (MetricKind(CLOZE, lambda _: likelihood.perplexity_per_token(), {}),),
    "bits_per_byte": (MetricKind(CLOZE, lambda _: likelihood.bits_per_byte(), {}),),
}
"""Name ▶ what it is, for each kind of task that it scores."""

METRICS["accuracy"] += (MetricKind(CLOZE, lambda _: likelihood.GreedyAccuracy(), {}),)


def metric_kind(name: str, kind: str) -> MetricKind | None:
    """A metric for a kind of task; None: there is none of that name."""
    return next((each for each in METRICS.get(name, ()) if each.kind == kind), None)


def names_of(kind: str) -> tuple[str, ...]:
    """The metrics that score a kind of task."""
    return tuple(name for name in METRICS if metric_kind(name, kind) is not None)


def missing_library(found: MetricKind) -> str | None:
    """The distribution that a metric needs and that is not installed."""
    return found.library if found.library and find_spec(_MODULES[found.library]) is None else None


def make_metrics(choices: Sequence[MetricChoice], kind: str) -> list[Metric[Any]]:
    """The metrics of a task that has been checked."""
    made = []
    for choice in choices:
        found = metric_kind(choice.name, kind)
        assert found is not None, choice
        made.append(found.make(choice.options))
    return made
