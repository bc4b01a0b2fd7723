"""Best-fit packing: every label once, from its own document, and little padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalm.data.prepare import packing
from megalm.data.prepare.packing import BestFitPacker, Row

PAD = 0


def pack(lengths: list[int], length: int) -> list[Row]:
    packer, rows, start = BestFitPacker(length, PAD), [], 1
    for number, size in enumerate(lengths):
        tokens = np.arange(start, start + size, dtype=np.uint32)
        rows += packer.add(tokens, None, str(number))
        start += size + 1  # a gap, so that no token follows another across documents
    return [*rows, *packer.close()]


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=40), length=st.integers(2, 16))
def test_every_token_but_a_documents_first_is_learnt_once_from_the_one_before_it(lengths, length) -> None:
    learnt = []
    for row in pack(lengths, length):
        assert row.tokens.size == row.mask.size == sum(row.lengths) == length
        assert len(row.names) == len(row.lengths)
        assert row.mask[0] == 0, "the first token would be a label of another row"
        for place in np.flatnonzero(row.mask).tolist():
            assert row.tokens[place] == row.tokens[place - 1] + 1
            learnt.append(int(row.tokens[place]))
    expected, start = [], 1
    for size in lengths:
        expected += range(start + 1, start + size)
        start += size + 1
    assert sorted(learnt) == expected
    assert sum(row.documents for row in pack(lengths, length)) == len(lengths)


def test_documents_that_fit_are_not_cut() -> None:
    rows = pack([10, 6, 16, 3, 13], 16)
    assert sorted(tuple(sorted(row.names)) for row in rows) == [("0", "1"), ("2",), ("3", "4")]


def test_masks_of_supervised_data_are_kept() -> None:
    packer = BestFitPacker(8, PAD)
    (row,) = [
        *packer.add(np.arange(1, 9, dtype=np.uint32), np.array([1, 0, 0, 1, 1, 0, 0, 1], dtype=np.uint8), "a"),
        *packer.close(),
    ]
    assert row.mask.tolist() == [0, 0, 0, 1, 1, 0, 0, 1]


def test_little_is_padding_and_few_rows_are_open(monkeypatch) -> None:
    lengths = np.random.default_rng(0).lognormal(5.5, 1.0, 4000).astype(int).clip(2, 3000).tolist()
    rows = pack(lengths, 1024)
    padding = sum(int((row.tokens == PAD).sum()) for row in rows)
    assert padding / (len(rows) * 1024) < 0.01
    monkeypatch.setattr(packing, "MAX_OPEN", 8)
    packer, waiting = BestFitPacker(1024, PAD), 0
    for size in lengths:
        for _ in packer.add(np.ones(size, dtype=np.uint32), None, ""):
            pass
        waiting = max(waiting, packer._open)
    assert waiting <= 8


def test_a_sequence_needs_two_tokens() -> None:
    with pytest.raises(ValueError, match="sequences of 1 tokens hold no label"):
        BestFitPacker(1, PAD)
