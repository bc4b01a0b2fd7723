"""BLEU and chrF by ``sacrebleu``, ROUGE by ``rouge-score``. No torch.

Papineni et al. 2002; Popović 2015 and 2017 (chrF++, ``word_order: 2``); Post 2018; Lin 2004.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import zip_longest
from typing import Any

import numpy as np

from megalm.evaluate.tasks.metrics.base import Array, Generated, Mean, Metric


class SacreBleu(Metric[Generated]):
    """A corpus metric of sacrebleu, 0 to 100, from its own statistics of segments."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        from sacrebleu.metrics import BLEU, CHRF

        self.name = name
        # Forced: a warning about tokenised text would be printed in the middle of a progress bar.
        self._metric: Any = BLEU(force=True, **options) if name == "bleu" else CHRF(**options)

    def statistics(self, answers: Sequence[Generated]) -> Array:
        """[N, K]: counts of n-grams, as sacrebleu's own significance tests resample them."""
        texts = [answer.text for answer in answers]
        # One stream per place in the list of references; None where an item has fewer.
        streams = list(zip_longest(*(answer.references or ("",) for answer in answers)))
        found = np.array(self._metric._extract_corpus_statistics(texts, streams), dtype=np.float64)
        self.signature = str(self._metric.get_signature())
        return found

    def values(self, sums: Array) -> Array:
        """Scores of corpora."""
        return np.array([self._metric._compute_score_from_stats(row).score for row in sums.astype(np.int64).tolist()])


class Rouge(Mean[Generated]):
    """Mean F-measure of ROUGE, 0 to 1; of several references the best.

    ``rougeLsum`` takes each line for a sentence.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        from rouge_score.rouge_scorer import RougeScorer

        self.name = name
        stemmer = options.get("stemmer", True)
        self._scorer: Any = RougeScorer([name], use_stemmer=stemmer)
        self.signature = f"stemmer:{'yes' if stemmer else 'no'}|version:{version('rouge-score')}"

    def of(self, answer: Generated) -> float:
        """Of one item."""
        return float(self._scorer.score_multi(answer.references or ("",), answer.text)[self.name].fmeasure)
