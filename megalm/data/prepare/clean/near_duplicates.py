"""MinHash (Broder 1997): documents that share most of their word 5-grams share a band of minima with high probability.

With b bands of r minima, documents with Jaccard similarity s share one with probability 1 − (1 − s^r)^b: for 14 bands
of 8, of pairs with s = 0.5, 0.7 and 0.8 these are 5 %, 56 % and 92 %.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megalm.data.prepare.clean.words import mix, ngram_hashes, words_of

BANDS, ROWS, SHINGLE_WORDS = 14, 8, 5
_STRETCH = 8192
"""Shingles hashed at a time: memory is this many times all minima."""


def bands(text: str) -> NDArray[np.uint64]:
    """[14] hashes of a document; two that share one at the same place are taken to be near duplicates.

    A text of fewer words than a shingle is one shingle.
    """
    words = words_of(text)
    shingles = ngram_hashes(words, min(SHINGLE_WORDS, max(len(words), 1)))
    if not shingles.size:  # no word at all: only like itself
        shingles = ngram_hashes([text], 1)
    minima = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for start in range(0, shingles.size, _STRETCH):
            part = shingles[start : start + _STRETCH, None]
            # Multiply-add: of the top bits, a 2-universal family (Dietzfelbinger et al. 1997).
            minima = np.minimum(minima, ((part * _FACTORS + _OFFSETS) >> np.uint64(16)).min(axis=0))
        rows = minima.reshape(BANDS, ROWS)
        result = np.arange(BANDS, dtype=np.uint64)
        for row in range(ROWS):
            result = mix(result * np.uint64(0x9E3779B97F4A7C15) + rows[:, row])
    return result


_FACTORS = mix(np.arange(1, BANDS * ROWS + 1, dtype=np.uint64)) | np.uint64(1)
_OFFSETS = mix(np.arange(1001, BANDS * ROWS + 1001, dtype=np.uint64))
