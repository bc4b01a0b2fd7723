"""Packed documents: a row of several trains exactly as each of them alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from megalm.config.schema import Model
from megalm.core.attention.attend import AttentionCore
from megalm.core.documents import Documents
from megalm.core.place import Place
from megalm.data.stream.batch import document_starts
from megalm.models.transformer import build_full_model

EOS = 0
LENGTHS = ((5, 9, 1, 17), (32,), (20, 12))
BASE = Model(num_layers=2, hidden_size=32, num_heads=4, sequence_length=32, vocab_size=41)
MODELS = {
    "gpt": BASE,
    "llama": replace(BASE, position="rotary", num_kv_heads=2, norm="rmsnorm", activation="swiglu", bias=False),
    "banded": replace(BASE, attention_windows=(0, 3), qk_norm=True),
    "bert": replace(BASE, causal=False, residual="post_norm", head="masked_lm", embedding_norm=True),
}


def packed(dtype_seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(dtype_seed)
    rows = []
    for lengths in LENGTHS:
        documents = [torch.randint(1, 41, (n,), generator=generator) for n in lengths]
        for document in documents:
            document[-1] = EOS
        rows.append(torch.cat(documents))
    return torch.stack(rows)


def documents_of(tokens: torch.Tensor) -> Documents:
    return Documents.from_starts(torch.from_numpy(document_starts(tokens.numpy(), EOS)))


def test_documents_end_with_their_last_token_and_padding_is_one_more() -> None:
    tokens = torch.tensor([[7, 8, 0, 9, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 0], [0, 5, 5, 0, 6, 6, 6, 6]])
    documents = documents_of(tokens)
    assert documents.lengths == ((3, 2, 3), (8,), (1, 3, 4))
    assert documents.numbers.tolist()[0] == [0, 0, 0, 1, 1, 2, 2, 2]
    assert documents.within.tolist()[0] == [0, 1, 2, 0, 1, 0, 1, 2]
    assert [len(set(row)) for row in documents.numbers.tolist()] == [3, 1, 3]


@pytest.mark.parametrize("name", MODELS)
def test_a_packed_row_trains_as_its_documents_alone(name: str) -> None:
    model = build_full_model(MODELS[name], 41, seed=5, dtype=torch.float64)
    tokens, weights = packed(), torch.rand(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    documents = documents_of(tokens)
    assert documents.lengths == LENGTHS
    logits = model(tokens, Place(torch.arange(32), documents=documents))
    (F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none") * weights.flatten()).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = slice(start, start + length)
            alone = model(tokens[row : row + 1, part])
            torch.testing.assert_close(alone[0], logits[row, part], atol=1e-6, rtol=0)
            loss = F.cross_entropy(alone[0], tokens[row, part], reduction="none") * weights[row, part]
            loss.sum().backward()
            start += length
    for parameter_name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[parameter_name], atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 4])
def test_the_block_mask_of_accelerators_sees_the_same(causal: bool, window: int) -> None:
    """Flex attention runs forward on the CPU; its backward needs a GPU."""
    documents = documents_of(packed())
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(3, 4, 32, 16, generator=generator)
    key, value = torch.randn(2, 3, 2, 32, 16, generator=generator).unbind()
    core = AttentionCore(causal=causal, window=window, dropout=0.0, seed=1, layer=0)
    each = core(query, key, value, torch.arange(4), None, documents)
    blocks = documents.attend_in_blocks(query, key, value, causal=causal, window=window)
    torch.testing.assert_close(each, blocks, atol=1e-5, rtol=1e-5)


def test_dropout_of_probabilities_stays_within_documents() -> None:
    documents = documents_of(packed())
    core = AttentionCore(causal=False, window=0, dropout=0.3, seed=1, layer=0).train()
    query, key = torch.randn(2, 3, 2, 32, 16, generator=torch.Generator().manual_seed(3)).unbind()
    value = F.one_hot(documents.numbers.long(), 16).float()[:, None].expand(3, 2, 32, 16)
    mixed = core(query, key, value, torch.arange(2), torch.arange(3), documents)
    others = mixed * (1 - value)
    assert float(others.abs().max()) == 0.0
    assert float(mixed.max()) > 1.0, "what is kept is scaled up"


def test_attention_costs_the_sum_of_squares() -> None:
    """Counted, not timed: the scores of a row of 16 documents are a sixteenth of those of the whole row."""
    tokens = torch.ones(1, 256, dtype=torch.int64)
    tokens[:, 15::16] = EOS
    scores = []

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores.append(query.shape[2] * key.shape[2])
        return value

    value = torch.randn(1, 2, 256, 16)
    assert torch.equal(documents_of(tokens).attend_each(attend, value, value, value), value)
    assert sum(scores) * 16 == 256**2
