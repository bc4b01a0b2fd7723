"""What is learnt from rows: pure functions of the row, the seed and the sample."""

from __future__ import annotations

import numpy as np
import pytest

from megalm.config.schema import Objective as Settings
from megalm.config.support import CHOICES
from megalm.data.document import Document
from megalm.data.stream.batch import Batch, Rows
from megalm.data.tokenization.document_tokens import encode_documents
from megalm.data.tokenization.training import train_byte_level_bpe, train_wordpiece
from megalm.errors import DataError
from megalm.objectives.clm import CausalLM, next_tokens
from megalm.objectives.mlm import MaskedLM, Masking
from megalm.objectives.registry import OBJECTIVES, make_objective
from megalm.objectives.sft import completions

TEXTS = ["the quick brown fox jumps over the lazy dogs and foxes unhappily ever after"] * 4
WORDPIECE = train_wordpiece(TEXTS, 140)
SPECIAL = np.arange(5)


def masked(rows: np.ndarray, samples: np.ndarray | None = None, **changes) -> Batch:
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
    return Masking(**{**settings, **changes})(Rows(rows, mask, valid), samples)


def some_rows(rows: int = 64, length: int = 512) -> np.ndarray:
    return np.random.default_rng(0).integers(5, 1000, (rows, length + 1))


def test_next_tokens_are_views_and_the_mask_stops_where_padding_begins() -> None:
    rows = some_rows(3, 8)
    batch = next_tokens(Rows(rows, None, np.array([8, 5, 0])), np.arange(3))
    assert np.shares_memory(batch.tokens, rows)
    assert batch.labels.tolist() == rows[:, 1:].tolist()
    assert batch.loss_mask.sum(axis=1).tolist() == [8, 5, 0]
    assert batch.loss_mask.dtype == np.float32


def test_supervised_rows_learn_the_labels_that_their_mask_names() -> None:
    rows, mask = some_rows(2, 6), np.array([[1, 0, 0, 1, 1, 0, 1], [1] * 7], dtype=np.uint8)
    for make_batch in (next_tokens, completions):
        batch = make_batch(Rows(rows, mask, np.array([6, 4])), np.arange(2))
        assert batch.loss_mask.tolist() == [[0, 0, 1, 1, 0, 1], [1, 1, 1, 1, 0, 0]]


def test_fine_tuning_refuses_data_that_do_not_say_what_is_a_completion() -> None:
    with pytest.raises(DataError, match=r"objective\.name=sft: the data have no loss mask.*objective\.name=clm"):
        completions(Rows(some_rows(2, 6), None, np.array([6, 6])), np.arange(2))


def test_rates_are_those_of_the_paper() -> None:
    rows = some_rows()
    batch = masked(rows)
    chosen = batch.loss_mask.astype(bool)
    assert np.array_equal(batch.labels, rows[:, :-1])
    assert np.array_equal(batch.tokens[~chosen], batch.labels[~chosen]), (
        "tokens that are not to be predicted stay unchanged"
    )
    count, total = int(chosen.sum()), chosen.size
    assert abs(count - 0.15 * total) < 4 * (0.15 * 0.85 * total) ** 0.5
    hidden = int((batch.tokens[chosen] == 4).sum())
    kept = int((batch.tokens[chosen] == batch.labels[chosen]).sum())
    for found, share in ((hidden, 0.8), (kept, 0.1), (count - hidden - kept, 0.1)):
        assert abs(found - share * count) < 4 * (share * (1 - share) * count) ** 0.5
    replaced = batch.tokens[chosen & (batch.tokens != 4) & (batch.tokens != batch.labels)]
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
    batch = masked(rows, valid=valid)
    assert not batch.loss_mask[:, 3].any()
    assert not batch.loss_mask[0].any(), "a row without an ordinary token"
    assert not batch.loss_mask[1, 3:].any(), "two labels are three tokens"
    assert (batch.loss_mask[1:].sum(axis=1) >= 1).all()
    certain = masked(rows, probability=1.0, valid=valid)
    assert certain.loss_mask[2].tolist() == [1, 1, 1, 0, 1, 1, 1, 1]


def test_only_learnt_tokens_of_supervised_rows_are_chosen() -> None:
    rows, mask = some_rows(20, 30), np.zeros((20, 31), dtype=np.uint8)
    mask[:, 10:20] = 1
    batch = masked(rows, mask=mask)
    assert not batch.loss_mask[:, :10].any()
    assert not batch.loss_mask[:, 20:].any()
    assert batch.loss_mask.any(axis=1).all()


def test_whole_words_share_their_fate() -> None:
    tokenizer = WORDPIECE
    tokens, _, _ = encode_documents(tokenizer, [Document.plain("", " ".join(TEXTS) * 20)])
    length = tokens.size // 4
    rows = tokens[: 4 * length].reshape(4, length).astype(np.int64)
    make_batch = MaskedLM(Settings(name="mlm", whole_words=True)).make_batch(tokenizer, 3)
    batch = make_batch(Rows(rows, None, np.full(4, length - 1)), np.arange(4))
    continues = tokenizer.continues_word[batch.labels]
    assert continues.any()
    inside = continues[:, 1:]
    assert np.array_equal(batch.loss_mask[:, 1:][inside], batch.loss_mask[:, :-1][inside])
    hidden = batch.tokens == tokenizer.mask_id
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
    objective = Masking(7, 4, np.arange(5, 1000), np.arange(1000) < 5, continues, 0.5)
    assert objective._words(rows[:1], np.arange(7)).tolist() == [[0, 0, 0, 3, 4, 4, 4]], "where each word begins"


def test_masks_never_change() -> None:
    batch = masked(some_rows(2, 24), np.array([10**9, 3]))
    assert np.flatnonzero(batch.loss_mask[0]).tolist() == GOLDEN_CHOSEN
    assert batch.tokens[1].tolist() == GOLDEN_TOKENS


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
    assert tuple(OBJECTIVES) == CHOICES["objective.name"]
    assert type(make_objective(Settings())) is CausalLM
    assert make_objective(Settings()).make_batch(WORDPIECE, 1) is next_tokens
    masking = make_objective(Settings(name="mlm", mask_probability=0.3)).make_batch(WORDPIECE, 1)
    assert (masking.mask_id, masking.probability) == (4, 0.3)
    assert not set(SPECIAL.tolist()) & set(masking.ordinary.tolist())
    with pytest.raises(DataError, match=r"objective\.name=mlm: the tokenizer has no \[MASK\] or <mask> token"):
        make_objective(Settings(name="mlm")).make_batch(train_byte_level_bpe(TEXTS, 300), 1)
