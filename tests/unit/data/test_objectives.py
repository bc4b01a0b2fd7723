"""What is learnt from rows: pure functions of the row, the seed and the sample."""

from __future__ import annotations

import numpy as np
import pytest

from megalm.config.schema import Objective
from megalm.data.document import Document
from megalm.data.objectives import CausalLM, Example, MaskedLM, make_objective
from megalm.data.tokenization.document_tokens import encode_documents
from megalm.data.tokenization.training import train_byte_level_bpe, train_wordpiece
from megalm.errors import DataError

TEXTS = ["the quick brown fox jumps over the lazy dogs and foxes unhappily ever after"] * 4
WORDPIECE = train_wordpiece(TEXTS, 140)
SPECIAL = np.arange(5)


def masked(rows: np.ndarray, samples: np.ndarray | None = None, **changes) -> Example:
    is_special = np.zeros(1000, dtype=bool)
    is_special[SPECIAL] = True
    settings = {
        "seed": 7,
        "mask_id": 4,
        "ordinary": np.arange(5, 1000),
        "is_special": is_special,
        "continues_word": None,
        "probability": 0.15,
    }
    mask, valid = changes.pop("mask", None), changes.pop("valid", np.full(len(rows), rows.shape[1] - 1))
    samples = np.arange(len(rows)) if samples is None else samples
    return MaskedLM(**{**settings, **changes})(rows, mask, valid, samples)


def some_rows(rows: int = 64, length: int = 512) -> np.ndarray:
    return np.random.default_rng(0).integers(5, 1000, (rows, length + 1))


def test_next_tokens_are_views_and_the_mask_stops_where_padding_begins() -> None:
    rows = some_rows(3, 8)
    example = CausalLM()(rows, None, np.array([8, 5, 0]), np.arange(3))
    assert np.shares_memory(example.tokens, rows)
    assert example.labels.tolist() == rows[:, 1:].tolist()
    assert example.loss_mask.sum(axis=1).tolist() == [8, 5, 0]
    assert example.loss_mask.dtype == np.float32


def test_supervised_rows_learn_the_labels_that_their_mask_names() -> None:
    rows, mask = some_rows(2, 6), np.array([[1, 0, 0, 1, 1, 0, 1], [1] * 7], dtype=np.uint8)
    example = CausalLM()(rows, mask, np.array([6, 4]), np.arange(2))
    assert example.loss_mask.tolist() == [[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 0, 0]]


def test_rates_are_those_of_the_paper() -> None:
    rows = some_rows()
    example = masked(rows)
    chosen = example.loss_mask.astype(bool)
    assert np.array_equal(example.labels, rows[:, :-1])
    assert np.array_equal(example.tokens[~chosen], example.labels[~chosen]), "what is not asked for is shown"
    count, total = int(chosen.sum()), chosen.size
    assert abs(count - 0.15 * total) < 4 * (0.15 * 0.85 * total) ** 0.5
    hidden = int((example.tokens[chosen] == 4).sum())
    kept = int((example.tokens[chosen] == example.labels[chosen]).sum())
    for found, share in ((hidden, 0.8), (kept, 0.1), (count - hidden - kept, 0.1)):
        assert abs(found - share * count) < 4 * (share * (1 - share) * count) ** 0.5
    replaced = example.tokens[chosen & (example.tokens != 4) & (example.tokens != example.labels)]
    assert replaced.min() >= 5, "a special token replaces nothing"
    assert len(set(replaced.tolist())) > 100


def test_a_mask_depends_on_seed_and_sample_and_on_nothing_else() -> None:
    rows = some_rows(16)
    whole = masked(rows)
    part = masked(rows[5:9], np.arange(5, 9))
    assert np.array_equal(part.tokens, whole.tokens[5:9])
    assert np.array_equal(part.loss_mask, whole.loss_mask[5:9])
    later = masked(rows, np.arange(100, 116))
    assert not np.array_equal(later.loss_mask, whole.loss_mask), "another epoch, another mask"
    assert not np.array_equal(masked(rows, seed=8).loss_mask, whole.loss_mask)


def test_special_tokens_and_padding_are_never_chosen_and_every_row_has_one() -> None:
    rows = some_rows(200, 8)
    rows[:, 3] = 2
    rows[0] = 1
    valid = np.full(200, 8)
    valid[1] = 2
    example = masked(rows, valid=valid)
    assert not example.loss_mask[:, 3].any()
    assert not example.loss_mask[0].any(), "a row without an ordinary token"
    assert not example.loss_mask[1, 3:].any(), "two labels are three tokens"
    assert (example.loss_mask[1:].sum(axis=1) >= 1).all()
    certain = masked(rows, probability=1.0, valid=valid)
    assert certain.loss_mask[2].tolist() == [1, 1, 1, 0, 1, 1, 1, 1]


def test_only_learnt_tokens_of_supervised_rows_are_chosen() -> None:
    rows, mask = some_rows(20, 30), np.zeros((20, 31), dtype=np.uint8)
    mask[:, 10:20] = 1
    example = masked(rows, mask=mask)
    assert not example.loss_mask[:, :10].any()
    assert not example.loss_mask[:, 20:].any()
    assert example.loss_mask.any(axis=1).all()


def test_whole_words_share_their_fate() -> None:
    tokenizer = WORDPIECE
    tokens, _, _ = encode_documents(tokenizer, [Document.plain("", " ".join(TEXTS) * 20)])
    length = tokens.size // 4
    rows = tokens[: 4 * length].reshape(4, length).astype(np.int64)
    objective = make_objective(Objective(name="mlm", whole_words=True), 3, tokenizer)
    example = objective(rows, None, np.full(4, length - 1), np.arange(4))
    continues = tokenizer.continues_word[example.labels]
    assert continues.any()
    inside = continues[:, 1:]
    assert np.array_equal(example.loss_mask[:, 1:][inside], example.loss_mask[:, :-1][inside])
    hidden = example.tokens == tokenizer.mask_id
    assert np.array_equal(hidden[:, 1:][inside], hidden[:, :-1][inside])


def test_a_special_token_ends_a_word() -> None:
    """What continues a word after the end of a document belongs to no word before it."""
    continues = np.zeros(1000, dtype=bool)
    continues[500:] = True
    rows = np.full((400, 7), 600)
    rows[:, 0], rows[:, 3] = 10, 3
    chosen = masked(rows, continues_word=continues, probability=0.5).loss_mask.astype(bool)
    assert (chosen[:, 0] == chosen[:, 2]).all() and (chosen[:, 4] == chosen[:, 5]).all()
    assert (chosen[:, 0] != chosen[:, 4]).any(), "two words, two fates"
    assert not chosen[:, 3].any()
    objective = MaskedLM(7, 4, np.arange(5, 1000), np.arange(1000) < 5, continues, 0.5)
    assert objective._words(rows[:1], np.arange(7)).tolist() == [[0, 0, 0, 3, 4, 4, 4]], "where each word begins"


def test_masks_never_change() -> None:
    example = masked(some_rows(2, 24), np.array([10**9, 3]))
    assert np.flatnonzero(example.loss_mask[0]).tolist() == GOLDEN_CHOSEN
    assert example.tokens[1].tolist() == GOLDEN_TOKENS


GOLDEN_CHOSEN = [4, 23]
GOLDEN_TOKENS = [
    858,
    556,
    38,
    766,
    731,
    613,
    179,
    93,
    863,
    26,
    543,
    84,
    303,
    483,
    425,
    406,
    33,
    4,
    128,
    13,
    672,
    527,
    4,
    261,
]


def test_what_a_config_names() -> None:
    assert make_objective(Objective(), 1, WORDPIECE) == CausalLM()
    objective = make_objective(Objective(name="mlm", mask_probability=0.3), 1, WORDPIECE)
    assert (objective.mask_id, objective.probability) == (4, 0.3)
    assert not set(SPECIAL.tolist()) & set(objective.ordinary.tolist())
    with pytest.raises(DataError, match=r"objective\.name=mlm: the tokenizer has no \[MASK\] or <mask> token"):
        make_objective(Objective(name="mlm"), 1, train_byte_level_bpe(TEXTS, 300))
